"""Does an adapter mean the same in PEFT? Its logits there against ours, on the same weights and tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backhand.adapters.checked_base import load_adapter_for
from backhand.errors import UsageError
from backhand.nn.decoder import Decoder
from backhand.nn.loading import open_model

BOUND = 1e-4
"""Relative difference of float32 logits below which the two are the same; about 1e-6 is seen."""


@dataclass(frozen=True)
class PeftParity:
    """How far PEFT's logits are from ours, in float32.

    Attributes:
        relative: ‖ours - PEFT's‖ / ‖PEFT's‖ over all positions.
        largest: largest difference of one logit.
        effect: ‖adapted - base‖ / ‖base‖ of our logits: what the adapter changes at all.
        positions: how many were compared.
    """

    relative: float
    largest: float
    effect: float
    positions: int

    @property
    def passed(self) -> bool:
        """Whether the difference is within `BOUND`, and far below what the adapter does."""
        return self.relative <= BOUND and self.relative <= 0.01 * self.effect


def peft_parity(model: str, adapter: Path, documents: Sequence[Sequence[int]]) -> PeftParity:
    """Load the adapter's files here and in PEFT, over the same base weights, and compare logits in float32.

    Args:
        model: the base model's name.
        adapter: directory with PEFT's files.
        documents: token ids of the probes, at least one each.

    Raises:
        UsageError: PEFT is not installed.
        ArtifactError: the adapter cannot be read, or is not of this base.
    """
    try:
        import peft
    except ImportError:
        raise UsageError(
            "PEFT is not installed", where="peft", next_step="pip install peft, or run with --no-peft"
        ) from None
    from backhand.nn.loading.transformers_model import load_transformers_model

    source = open_model(model)
    decoder = Decoder.from_source(source, dtype=torch.float32)
    base = _logits(decoder, documents)
    decoder.attach(load_adapter_for(source, adapter, decoder.module_shapes()).parameters())
    ours = _logits(decoder, documents)
    del decoder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted: Any = peft.PeftModel.from_pretrained(
            load_transformers_model(source, dtype=torch.float32, device="cpu"), str(adapter)
        )
    with torch.no_grad():
        theirs = torch.cat([adapted(input_ids=torch.tensor([list(ids)])).logits[0] for ids in documents]).double()
    return PeftParity(
        relative=float((ours - theirs).norm() / theirs.norm()),
        largest=float((ours - theirs).abs().max()),
        effect=float((ours - base).norm() / base.norm()),
        positions=ours.shape[0],
    )


def _logits(decoder: Decoder, documents: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.tensor([token for document in documents for token in document])
    return decoder.logits(ids, [len(document) for document in documents]).double()

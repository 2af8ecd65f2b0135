"""Compare the logits of an adapter in Backhand and in PEFT, from the same files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backhand.adapters.loading import load_adapter_for
from backhand.errors import UsageError
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.system import install

BOUND = 1e-4
"""Largest relative difference of equal float32 logits. Differences of about 1e-6 occur."""


@dataclass(frozen=True)
class PeftParity:
    """Differences between PEFT's logits and ours, in float32."""

    relative: float  # ‖ours - PEFT's‖ / ‖PEFT's‖ over all positions
    largest: float  # largest absolute difference
    effect: float  # ‖adapted - base‖ / ‖base‖ of our logits, the effect of the adapter

    @property
    def passed(self) -> bool:
        """True if the difference is within `BOUND` and far below the effect of the adapter."""
        return self.relative <= BOUND and self.relative <= 0.01 * self.effect


def peft_parity(model: str, adapter: Path, documents: Sequence[Sequence[int]]) -> PeftParity:
    """Load the adapter's files in Backhand and in PEFT, with the same base weights, and compare logits in float32.

    Args:
        documents: token ids of the probes, at least one per probe.

    Raises:
        UsageError: if PEFT is not installed.
        ArtifactError: if the adapter cannot be read, or belongs to another base model.
    """
    try:
        import peft
    except ImportError:
        raise UsageError(
            "PEFT is not installed", where="peft", next_step=f"{install('peft')}, or run with --no-peft"
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
    )


def _logits(decoder: Decoder, documents: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.tensor([token for document in documents for token in document])
    return decoder.logits(ids, [len(document) for document in documents]).double()

"""Prove invariances of the adapter gradient on a model and its rows, in the dtype that training uses.

- packed = unpacked: documents in one batch, or one batch per document;
- shared prefix = a prefix in each row: a common prefix computed once, or in every document;
- accumulated = one batch: the same documents in several micro-batches;
- recomputed = kept: `recompute` none, mlp and block.

The whole adapter gradient is compared, without dropout, whose masks depend on the packing. In float64 the first two
hold to about 1e-14. In the compute dtype each of two results has the rounding error that `GradientProofs.training_step`
has measured, so they may differ by twice that error. Merging is proved in `verify.merging`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.pack import pack
from backhand.errors import not_none
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.verify.blockwise_step import BlockwiseStep
from backhand.verify.head_loss import HeadLoss
from backhand.verify.measure import relative_error
from backhand.verify.model_gradients import FLOAT64_BOUND
from backhand.verify.report import Result, statement

MICRO_BATCHES = 3


def prove_invariances(
    decoder: Decoder, examples: Sequence[Example], rounding_bound: float, head_loss: HeadLoss | None = None
) -> Iterator[Result]:
    """Prove all invariances, one proof each.

    Args:
        examples: documents, each with a supervised token. A single document cannot be packed, so only recomputing is
            proved for it.
        rounding_bound: the largest allowed relative error of a gradient against float64.
        head_loss: the loss of an adapter with a head; None for Σ nats.
    """
    losses = _Losses(decoder, head_loss)
    bound, device = 2 * rounding_bound, decoder.device
    whole = pack(examples, device=device)
    together = losses.gradient([whole])
    if len(examples) > 1:
        exact = losses.exact_gradient([whole])

        def same(text: str, batches: list[PackedBatch], of_exact: str, detail: str = "") -> Iterator[Result]:
            gradient = losses.exact_gradient(batches)
            yield _same(f"{text}, gradient, float64", gradient, exact, FLOAT64_BOUND, of_exact)
            yield _same(f"{text}, gradient", losses.gradient(batches), together, bound, detail)

        how = f"{len(examples)} documents in one batch, and one by one"
        checked = "a check in the run's dtype, within its rounding; the line above is the proof"
        yield from same("packed = unpacked", [pack([example], device=device) for example in examples], how, checked)
        once = pack(examples, share=decoder.shares_prefixes, device=device)
        if saved := len(whole.input_ids) - len(once.input_ids):
            how = f"{saved} of {len(whole.input_ids)} tokens not computed again"
            yield from same("shared prefix = a prefix in each row", [once], how)
        parts = [examples[start::MICRO_BATCHES] for start in range(min(MICRO_BATCHES, len(examples)))]
        accumulated = losses.gradient([pack(part, device=device) for part in parts])
        yield _same("accumulated = one batch, gradient", accumulated, together, bound, f"{len(parts)} micro-batches")
    before = decoder.recompute
    try:
        decoder.recompute = "none"
        not_recomputed = losses.gradient([whole])
        for mode in ("mlp", "block"):
            decoder.recompute = mode
            yield _same(f"recomputed ({mode}) = kept, gradient", losses.gradient([whole]), not_recomputed, bound)
    finally:
        decoder.recompute = before


def _same(text: str, measured: Tensor, expected: Tensor, bound: float, detail: str = "") -> Result:
    return statement(text, relative_error(measured, expected), bound, detail, "invariances")


@dataclass(frozen=True)
class _Losses:
    """Gradients of the mean loss of a supervised token, or of a document if there is a head."""

    decoder: Decoder
    head_loss: HeadLoss | None

    def exact_gradient(self, batches: Sequence[PackedBatch]) -> Tensor:
        """Return the whole adapter gradient in float64, without the rounding errors of the compute dtype."""
        scaling = self._scaling(batches)
        steps = (BlockwiseStep(self.decoder, batch, None, scaling, None, self.head_loss) for batch in batches)
        return reduce(torch.add, (step.gradient() for step in steps))

    def gradient(self, batches: Sequence[PackedBatch]) -> Tensor:
        """Return the whole adapter gradient of one step over these micro-batches."""
        lora, scaling = not_none(self.decoder.lora), self._scaling(batches)
        lora.gradients.zero_()
        for batch in batches:
            if self.head_loss is not None:
                self.head_loss.engine_gradients(self.decoder, batch, scaling)
            else:
                self.decoder.loss_and_gradients(batch, scaling)
        return lora.gradients.clone()

    def _scaling(self, batches: Sequence[PackedBatch]) -> float:
        return 1.0 / sum(batch.supervised_tokens if self.head_loss is None else len(batch.ends) for batch in batches)

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
from functools import reduce

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.pack import pack
from backhand.errors import not_none
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.verify.blockwise_step import BlockwiseStep
from backhand.verify.measure import relative_error
from backhand.verify.model_gradients import FLOAT64_BOUND
from backhand.verify.report import Result, statement

MICRO_BATCHES = 3


def prove_invariances(decoder: Decoder, examples: Sequence[Example], rounding_bound: float) -> Iterator[Result]:
    """Prove all invariances, one proof each.

    Args:
        examples: documents, each with a supervised token. A single document cannot be packed, so only recomputing is
            proved for it.
        rounding_bound: the largest allowed relative error of a gradient against float64.
    """
    bound, device = 2 * rounding_bound, decoder.device
    whole = pack(examples, device=device)
    together = _gradient(decoder, [whole])
    if len(examples) > 1:
        exact = _exact_gradient(decoder, [whole])

        def same(text: str, batches: list[PackedBatch], of_exact: str, detail: str = "") -> Iterator[Result]:
            gradient = _exact_gradient(decoder, batches)
            yield _same(f"{text}, gradient, float64", gradient, exact, FLOAT64_BOUND, of_exact)
            yield _same(f"{text}, gradient", _gradient(decoder, batches), together, bound, detail)

        how = f"{len(examples)} documents in one batch, and one by one"
        checked = "a check in the run's dtype, within its rounding; the line above is the proof"
        yield from same("packed = unpacked", [pack([example], device=device) for example in examples], how, checked)
        once = pack(examples, share=decoder.shares_prefixes, device=device)
        if saved := len(whole.input_ids) - len(once.input_ids):
            how = f"{saved} of {len(whole.input_ids)} tokens not computed again"
            yield from same("shared prefix = a prefix in each row", [once], how)
        parts = [examples[start::MICRO_BATCHES] for start in range(min(MICRO_BATCHES, len(examples)))]
        accumulated = _gradient(decoder, [pack(part, device=device) for part in parts])
        yield _same("accumulated = one batch, gradient", accumulated, together, bound, f"{len(parts)} micro-batches")
    before = decoder.recompute
    try:
        decoder.recompute = "none"
        not_recomputed = _gradient(decoder, [whole])
        for mode in ("mlp", "block"):
            decoder.recompute = mode
            yield _same(f"recomputed ({mode}) = kept, gradient", _gradient(decoder, [whole]), not_recomputed, bound)
    finally:
        decoder.recompute = before


def _same(text: str, measured: Tensor, expected: Tensor, bound: float, detail: str = "") -> Result:
    return statement(text, relative_error(measured, expected), bound, detail, "invariances")


def _exact_gradient(decoder: Decoder, batches: Sequence[PackedBatch]) -> Tensor:
    """Return the whole adapter gradient in float64, without the rounding errors of the compute dtype."""
    scaling = 1.0 / sum(batch.supervised_tokens for batch in batches)
    return reduce(torch.add, (BlockwiseStep(decoder, batch, None, scaling).gradient() for batch in batches))


def _gradient(decoder: Decoder, batches: Sequence[PackedBatch]) -> Tensor:
    """Return the whole adapter gradient of one step over these micro-batches."""
    lora, scaling = not_none(decoder.lora), 1.0 / sum(batch.supervised_tokens for batch in batches)
    lora.gradients.zero_()
    for batch in batches:
        decoder.loss_and_gradients(batch, scaling)
    return lora.gradients.clone()

"""What must not change the result, measured on a model and its rows in the dtype that training uses.

- packed = unpacked: documents in one batch, or each in its own;
- shared prefix = a prefix in each row: the tokens with which all documents begin computed once, or in each of them;
- accumulated = one batch: the same documents in several micro-batches;
- recomputed = kept: `recompute` none, mlp and block.

Compared is the whole adapter gradient without dropout, whose masks depend on the packing. In float64 the documents in
one batch, one by one, and behind a shared prefix give the same to about 1e-14. In the compute dtype each of two results
carries the rounding that `GradientProofs.training_step` has measured, so the two may lie twice that apart. (merged =
unmerged: see `merged_model`.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import pack
from backhand.data.shared_prefix import common_tokens
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder import Decoder
from backhand.verify.blockwise_step import BlockwiseStep
from backhand.verify.measure import relative_error
from backhand.verify.model_gradients import FLOAT64_BOUND, ModelProof

MICRO_BATCHES = 3


def prove_invariances(decoder: Decoder, examples: Sequence[Example], rounding_bound: float) -> Iterator[ModelProof]:
    """One proof a line.

    Args:
        decoder: with its adapter attached.
        examples: documents, each with a supervised token; a single one can be packed with nothing.
        rounding_bound: how far a gradient may be from float64's.
    """
    bound = 2 * rounding_bound
    whole = pack(examples, device=decoder.device)
    together = _gradient(decoder, [whole])
    if len(examples) > 1:
        exact = _exact_gradient(decoder, [whole])
        one_by_one = [pack([example], device=decoder.device) for example in examples]
        yield ModelProof(
            "packed = unpacked, gradient, float64",
            relative_error(_exact_gradient(decoder, one_by_one), exact),
            FLOAT64_BOUND,
            f"{len(examples)} documents in one batch, and one by one",
            "invariances",
        )
        alone = _gradient(decoder, one_by_one)
        yield ModelProof(
            "packed = unpacked, gradient",
            relative_error(alone, together),
            bound,
            kind="invariances",
        )
        shared = common_tokens(examples)
        if shared:
            once = pack(examples, shared=shared, device=decoder.device)
            statement = "shared prefix = a prefix in each row, gradient"
            yield ModelProof(
                f"{statement}, float64",
                relative_error(_exact_gradient(decoder, [once]), exact),
                FLOAT64_BOUND,
                f"the first {shared} tokens of each computed once",
                "invariances",
            )
            difference = relative_error(_gradient(decoder, [once]), together)
            yield ModelProof(statement, difference, bound, kind="invariances")
        parts = [list(examples[start::MICRO_BATCHES]) for start in range(min(MICRO_BATCHES, len(examples)))]
        accumulated = _gradient(decoder, [pack(part, device=decoder.device) for part in parts])
        yield ModelProof(
            "accumulated = one batch, gradient",
            relative_error(accumulated, together),
            bound,
            f"{len(parts)} micro-batches",
            "invariances",
        )
    yield from _recomputation(decoder, whole, bound)


def _exact_gradient(decoder: Decoder, batches: Sequence[PackedBatch]) -> Tensor:
    """The same in float64, where nothing hides behind rounding."""
    supervised = sum(batch.supervised_tokens for batch in batches)
    total = BlockwiseStep(decoder, batches[0], None, 1.0 / supervised).gradient()
    for batch in batches[1:]:
        total += BlockwiseStep(decoder, batch, None, 1.0 / supervised).gradient()
    return total


def _gradient(decoder: Decoder, batches: Sequence[PackedBatch]) -> Tensor:
    """The whole adapter gradient of one step over these micro-batches."""
    lora = decoder.lora
    assert lora is not None
    supervised = sum(batch.supervised_tokens for batch in batches)
    lora.gradients.zero_()
    for batch in batches:
        decoder.loss_and_gradients(batch, 1.0 / supervised)
    return lora.gradients.clone()


def _recomputation(decoder: Decoder, batch: PackedBatch, bound: float) -> Iterator[ModelProof]:
    before = decoder.recompute
    try:
        decoder.recompute = "none"
        kept = _gradient(decoder, [batch])
        for mode in ("mlp", "block"):
            decoder.recompute = mode
            measured = relative_error(_gradient(decoder, [batch]), kept)
            yield ModelProof(f"recomputed ({mode}) = kept, gradient", measured, bound, kind="invariances")
    finally:
        decoder.recompute = before

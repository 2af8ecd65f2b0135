"""What must not change the result, measured on a model and its rows in the dtype that training uses.

- packed = unpacked: documents in one batch, or each in its own;
- shared prefix = a prefix in each row: the tokens with which documents begin alike computed once, or in each of them;
- accumulated = one batch: the same documents in several micro-batches;
- recomputed = kept: `recompute` none, mlp and block.

Compared is the whole adapter gradient without dropout, whose masks depend on the packing. In float64 the documents in
one batch, one by one, and behind a shared prefix give the same to about 1e-14. In the compute dtype each of two results
carries the rounding that `GradientProofs.training_step` has measured, so the two may lie twice that apart. (merged =
unmerged: see below.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import pack
from backhand.errors import not_none
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.adapted_group import HEAD, block_adapter
from backhand.nn.decoder.block import block_forward
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import PER_LAYER_MODEL
from backhand.nn.decoder.merging import is_quantized, merge_into, merged_logits, merged_weight
from backhand.nn.decoder.ple_inputs import ple_inputs_forward
from backhand.nn.decoder.weights import linear_parts
from backhand.ops.rms_norm import rms_norm_forward
from backhand.ops.weight_tiles import frozen_dense
from backhand.verify.measure import norm, relative_error
from backhand.verify.model_gradients import FLOAT64_BOUND, BlockwiseStep, ModelProof
from backhand.verify.runner import UNITS_OF_ROUNDING

MICRO_BATCHES = 3


def prove_invariances(decoder: Decoder, examples: Sequence[Example], rounding_bound: float) -> Iterator[ModelProof]:
    """One proof a line.

    Args:
        examples: documents, each with a supervised token; a single one can be packed with nothing.
        rounding_bound: how far a gradient may be from float64's.
    """
    bound, device = 2 * rounding_bound, decoder.device
    whole = pack(examples, device=device)
    together = _gradient(decoder, [whole])
    if len(examples) > 1:
        exact = _exact_gradient(decoder, [whole])

        def same(statement: str, batches: list[PackedBatch], of_exact: str, detail: str = "") -> Iterator[ModelProof]:
            gradient = _exact_gradient(decoder, batches)
            yield _same(f"{statement}, gradient, float64", gradient, exact, FLOAT64_BOUND, of_exact)
            yield _same(f"{statement}, gradient", _gradient(decoder, batches), together, bound, detail)

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
        kept = _gradient(decoder, [whole])
        for mode in ("mlp", "block"):
            decoder.recompute = mode
            yield _same(f"recomputed ({mode}) = kept, gradient", _gradient(decoder, [whole]), kept, bound)
    finally:
        decoder.recompute = before


def _same(statement: str, measured: Tensor, expected: Tensor, bound: float, detail: str = "") -> ModelProof:
    return ModelProof(statement, relative_error(measured, expected), bound, detail, "invariances")


def _exact_gradient(decoder: Decoder, batches: Sequence[PackedBatch]) -> Tensor:
    """The same in float64, where nothing hides behind rounding."""
    scaling = 1.0 / sum(batch.supervised_tokens for batch in batches)
    return reduce(torch.add, (BlockwiseStep(decoder, batch, None, scaling).gradient() for batch in batches))


def _gradient(decoder: Decoder, batches: Sequence[PackedBatch]) -> Tensor:
    """The whole adapter gradient of one step over these micro-batches."""
    lora, scaling = not_none(decoder.lora), 1.0 / sum(batch.supervised_tokens for batch in batches)
    lora.gradients.zero_()
    for batch in batches:
        decoder.loss_and_gradients(batch, scaling)
    return lora.gradients.clone()


# ---------------------------------------------------------------------------------------------------------------------
# merged = unmerged: W + s B A in place of W and an adapter, on a model and its rows, without dropout.
#
# In float64 the two are the same function: given the same input, each block with its weights merged gives what it gives
# with its adapter beside them, and so does the head. That proves the merging, to about 1e-15, one block at a time.
#
# In the compute dtype merged weights are rounded once more. Their logits may be twice as far from float64's as the
# unmerged ones are, so the two may lie three times that apart. What an adapter changes by less than that cannot be told
# from rounding there; the detail says how much it changes, and how much of that merging loses.


MERGED_TIMES_UNMERGED = 3.0
# What float32 logits may differ by where float64 happens to be nearer than that.
SMALLEST_BOUND = 1e-5


@torch.no_grad()
def prove_merging(step: BlockwiseStep) -> Iterator[ModelProof]:
    """Two proofs; they leave the decoder merged, so that it is of no further use."""
    inputs = step.forward(None)
    unmerged = _exact_logits(step, inputs[-1], merged=False)
    errors = {f"layer {layer}": _block_error(step, layer, *inputs[layer : layer + 2]) for layer in step.layers}
    if HEAD in step.lora:
        errors["head"] = relative_error(_exact_logits(step, inputs[-1], merged=True), unmerged)
    if PER_LAYER_MODEL in step.lora:
        errors["inputs of layers"] = _inputs_error(step, inputs[0])
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    yield ModelProof(
        f"{len(errors)} × merged = unmerged, float64", errors[worst], FLOAT64_BOUND, f"worst: {worst}", "merge"
    )
    yield _merged_logits(step, unmerged)


def _block_error(step: BlockwiseStep, layer: int, x0: Tensor, x2: Tensor) -> float:
    """How far the merged block's output is from x2, which the block with its adapter gives."""
    weights = step.block_weights(layer)
    prefix = f"model.layers.{layer}."
    for part, weight in linear_parts(weights, step.decoder.config, layer).items():
        name = prefix + part
        if name in step.lora:
            frozen_dense(weight).copy_(merged_weight(frozen_dense(weight), step.lora, name))
    none = block_adapter(None, step.decoder.config, layer, None)
    merged, _ = block_forward(x0, weights, none, step.context(layer), "block")
    return relative_error(merged, x2)


def _inputs_error(step: BlockwiseStep, x: Tensor) -> float:
    """How far the layers' inputs are from the adapted ones where the adapter is in the weight that makes them."""
    own, config = step.decoder.weights.per_layer, step.decoder.config
    unmerged = step.cross_layer.ple
    assert own is not None and unmerged is not None
    merged = merged_weight(frozen_dense(own.projection).double(), step.lora, PER_LAYER_MODEL)
    weights = own._replace(projection=merged, norm=own.norm.double())
    return relative_error(ple_inputs_forward(x, step.batch.input_ids, weights, config, None)[0], unmerged)


def _exact_logits(step: BlockwiseStep, x: Tensor, *, merged: bool) -> Tensor:
    """The logits in float64, (tokens, vocabulary), of the last block's output."""
    config, weights, exact = step.decoder.config, step.decoder.weights, step.lora
    normed, _ = rms_norm_forward(x, weights.final_norm.double(), config.norm_eps, config.norm_offset)
    head = frozen_dense(weights.head).double()
    logits = normed @ (merged_weight(head, exact, HEAD) if merged else head).T
    if HEAD in exact and not merged:
        logits += exact.slots[HEAD].scaling * (normed @ exact.lora_A(HEAD).T) @ exact.lora_B(HEAD).T
    return logits


def _merged_logits(step: BlockwiseStep, exact: Tensor) -> ModelProof:
    """The decoder's logits in the compute dtype, before and after merging; of a quantized one by `merged_logits`."""
    decoder, batch, lora = step.decoder, step.batch, not_none(step.decoder.lora)

    def logits() -> Tensor:
        return decoder.logits(batch.input_ids, batch.lengths).double()

    adapted = logits()
    decoder.detach()
    base = logits()
    if is_quantized(decoder):
        merged = merged_logits(decoder, lora, batch).double()
    else:
        merge_into(decoder, lora)
        merged = logits()
    rounding, effect = relative_error(adapted, exact), relative_error(base, adapted)
    bound = max(UNITS_OF_ROUNDING * torch.finfo(decoder.dtype).eps, MERGED_TIMES_UNMERGED * rounding, SMALLEST_BOUND)
    if effect > bound:
        lost = norm(merged - adapted) / norm(base - adapted)
        detail = f"the adapter changes the logits by {effect:.1e} of their norm; {lost:.1e} of this change is lost"
    else:
        detail = f"the adapter itself changes only {effect:.1e}"
    return ModelProof("merged = unmerged, logits", relative_error(merged, adapted), bound, detail, "merge")

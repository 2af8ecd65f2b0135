"""merged = unmerged: W + s B A in place of W and an adapter, on a model and its rows, without dropout.

In float64 the two are the same function: given the same input, each block with its weights merged gives what it gives
with its adapter beside them, and so does the head. That proves the merging, to about 1e-15, one block at a time.

In the compute dtype merged weights are rounded once more. Their logits may be twice as far from float64's as the
unmerged ones are, so the two may lie three times that apart. What an adapter changes by less than that cannot be told
from rounding there; the detail says how much it changes, and how much of that merging loses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from backhand.nn.block import block_forward
from backhand.nn.block_adapter import block_adapter
from backhand.nn.decoder import HEAD
from backhand.nn.merging import merge_into, merged_weight
from backhand.ops.rms_norm import rms_norm_forward
from backhand.verify.blockwise_step import BlockwiseStep
from backhand.verify.measure import norm, relative_error
from backhand.verify.model_gradients import FLOAT64_BOUND, UNITS_OF_ROUNDING, ModelProof

MERGED_TIMES_UNMERGED = 3.0
# What float32 logits may differ by where float64 happens to be nearer than that.
SMALLEST_BOUND = 1e-5


@torch.no_grad()
def prove_merging(step: BlockwiseStep) -> Iterator[ModelProof]:
    """Two proofs; they leave the decoder merged, so that it is of no further use.

    Args:
        step: of the decoder with its adapter attached.
    """
    inputs = step.forward(None)
    unmerged = _exact_logits(step, inputs[-1], merged=False)
    errors = {f"layer {layer}": _block_error(step, layer, *inputs[layer : layer + 2]) for layer in step.layers}
    if HEAD in step.lora:
        errors["head"] = relative_error(_exact_logits(step, inputs[-1], merged=True), unmerged)
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    yield ModelProof(
        f"{len(errors)} × merged = unmerged, float64", errors[worst], FLOAT64_BOUND, f"worst: {worst}", "merge"
    )
    yield _merged_logits(step, unmerged)


def _block_error(step: BlockwiseStep, layer: int, x0: Tensor, x2: Tensor) -> float:
    """How far the merged block's output is from x2, which the block with its adapter gives."""
    weights = step.block_weights(layer)
    prefix = f"model.layers.{layer}."
    named = step.named_weights(layer, weights)
    for name in step.lora.slots:
        if name.startswith(prefix):
            weight = named[f"{name}.weight"]
            weight.copy_(merged_weight(weight, step.lora, name))
    merged, _ = block_forward(x0, weights, block_adapter(None, layer, None), step.context(layer), "block")
    return relative_error(merged, x2)


def _exact_logits(step: BlockwiseStep, x: Tensor, *, merged: bool) -> Tensor:
    """The logits in float64, (tokens, vocabulary), of the last block's output."""
    config, weights, exact = step.decoder.config, step.decoder.weights, step.lora
    normed, _ = rms_norm_forward(x, weights.final_norm.double(), config.norm_eps, config.norm_offset)
    head = weights.head.double()
    if HEAD not in exact:
        return normed @ head.T
    if merged:
        return normed @ merged_weight(head, exact, HEAD).T
    return (normed @ head.T).addmm_(
        normed @ exact.lora_A(HEAD).T, exact.lora_B(HEAD).T, alpha=exact.slots[HEAD].scaling
    )


def _merged_logits(step: BlockwiseStep, exact: Tensor) -> ModelProof:
    """The decoder's own logits in the compute dtype, before and after `merge_into`."""
    decoder, batch, lora = step.decoder, step.batch, step.decoder.lora
    assert lora is not None

    def logits() -> Tensor:
        return decoder.logits(batch.input_ids, batch.document_lengths).double()

    adapted = logits()
    decoder.detach()
    base = logits()
    merge_into(decoder, lora)
    merged = logits()
    rounding, effect = relative_error(adapted, exact), relative_error(base, adapted)
    bound = max(UNITS_OF_ROUNDING * torch.finfo(decoder.dtype).eps, MERGED_TIMES_UNMERGED * rounding, SMALLEST_BOUND)
    if effect > bound:
        detail = f"{norm(merged - adapted) / norm(base - adapted):.1e} of the adapter's {effect:.1e} is lost"
    else:
        detail = f"the adapter itself changes only {effect:.1e}"
    return ModelProof("merged = unmerged, logits", relative_error(merged, adapted), bound, detail, "merge")

"""Prove merged = unmerged on a model and its rows: W + s B A instead of W and an adapter, without dropout.

In float64 the two are the same function. Given the same input, each block with merged weights gives the output of the
block with its adapter, and so does the head. This proves merging to about 1e-15, one block at a time.

In the compute dtype merged weights are rounded once more. Their logits may differ from float64's by twice the error of
the unmerged ones, so merged and unmerged logits may differ by three times that error. A smaller change by the adapter
cannot be distinguished from rounding. The detail states the change by the adapter, and the share of it that merging
loses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import HEAD, block_adapter
from backhand.nn.decoder.block import block_forward
from backhand.nn.decoder.merging import is_quantized, merge_into, merged_logits, merged_output, merged_weight
from backhand.nn.decoder.ple_inputs import ple_inputs_forward
from backhand.nn.decoder.weights import linear_parts
from backhand.nn.families.family import PER_LAYER_MODEL
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.rms_norm import rms_norm_forward
from backhand.ops.weight_tiles import frozen_dense
from backhand.verify.blockwise_step import BlockwiseStep
from backhand.verify.measure import norm, relative_error
from backhand.verify.model_gradients import FLOAT64_BOUND
from backhand.verify.report import Result, statement
from backhand.verify.runner import UNITS_OF_ROUNDING

MERGED_TIMES_UNMERGED = 3.0
# The smallest bound, for float32 logits that happen to be closer to float64.
SMALLEST_BOUND = 1e-5


@torch.no_grad()
def prove_merging(step: BlockwiseStep) -> Iterator[Result]:
    """Prove merging in float64 and in the compute dtype. The decoder stays merged and should not be used afterwards."""
    inputs = step.forward(None)
    unmerged = step.final_norm(inputs[-1])[0] if step.head_loss else _exact_logits(step, inputs[-1], merged=False)
    errors = {f"layer {layer}": _block_error(step, layer, *inputs[layer : layer + 2]) for layer in step.layers}
    if HEAD in step.lora:
        errors["head"] = relative_error(_exact_logits(step, inputs[-1], merged=True), unmerged)
    if PER_LAYER_MODEL in step.lora:
        errors["inputs of layers"] = _inputs_error(step, inputs[0])
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    yield statement(
        f"{len(errors)} × merged = unmerged, float64", errors[worst], FLOAT64_BOUND, f"worst: {worst}", "merge"
    )
    yield _merged_outputs(step, unmerged)


def _block_error(step: BlockwiseStep, layer: int, x0: Tensor, x2: Tensor) -> float:
    """Return the relative error of the merged block's output against x2, the output with the adapter."""
    weights = step.block_weights(layer)
    prefix = f"{step.decoder.config.block_path(layer)}."
    for part, weight in linear_parts(weights, step.decoder.config, layer).items():
        name = prefix + part
        if name in step.lora:
            frozen_dense(weight).copy_(merged_weight(frozen_dense(weight), step.lora, name))
    none = block_adapter(None, step.decoder.config, layer, None)
    merged, _ = block_forward(x0, weights, none, step.context(layer), "block")
    return relative_error(merged, x2)


def _inputs_error(step: BlockwiseStep, x: Tensor) -> float:
    """Return the relative error of the per-layer inputs with the merged projection against the adapted ones."""
    per_layer, config = step.decoder.weights.per_layer, step.decoder.config
    unmerged = step.cross_layer.ple
    assert per_layer is not None and unmerged is not None
    merged = merged_weight(frozen_dense(per_layer.projection).double(), step.lora, PER_LAYER_MODEL)
    weights = per_layer._replace(projection=merged, norm=per_layer.norm.double())
    return relative_error(ple_inputs_forward(x, step.batch.input_ids, weights, config, None)[0], unmerged)


def _exact_logits(step: BlockwiseStep, x: Tensor, *, merged: bool) -> Tensor:
    """Return the float64 logits, (tokens, vocabulary), of the last block's output."""
    config, weights, exact = step.decoder.config, step.decoder.weights, step.lora
    normed, _ = rms_norm_forward(x, not_none(weights.final_norm).double(), config.norm_eps, config.norm_offset)
    head = frozen_dense(weights.head).double()
    logits = normed @ (merged_weight(head, exact, HEAD) if merged else head).T
    if HEAD in exact and not merged:
        logits += exact.slots[HEAD].scaling * (normed @ exact.lora_A(HEAD).T) @ exact.lora_B(HEAD).T
    return logits


def _merged_outputs(step: BlockwiseStep, exact: Tensor) -> Result:
    """Compare the logits in the compute dtype before and after merging, or the final states that a head reads.

    A quantized decoder uses `merged_logits`.
    """
    decoder, batch, lora = step.decoder, step.batch, not_none(step.decoder.lora)
    what = "logits" if step.head_loss is None else "final states"

    def outputs() -> Tensor:
        if step.head_loss is not None:
            return decoder.final_states(batch).double()
        return decoder.logits(batch.input_ids, batch.lengths).double()

    adapted = outputs()
    factors = _factors_of(lora)
    decoder.detach()
    base = outputs()
    if is_quantized(decoder) and step.head_loss is not None:
        merged = decoder.final_norm(merged_output(decoder, factors, batch)).double()
    elif is_quantized(decoder):
        merged = merged_logits(decoder, factors, batch).double()
    else:
        merge_into(decoder, factors)
        merged = outputs()
    rounding, effect = relative_error(adapted, exact), relative_error(base, adapted)
    bound = max(UNITS_OF_ROUNDING * torch.finfo(decoder.dtype).eps, MERGED_TIMES_UNMERGED * rounding, SMALLEST_BOUND)
    if effect > bound:
        lost = norm(merged - adapted) / norm(base - adapted)
        detail = f"the adapter changes the {what} by {effect:.1e} of their norm; {lost:.1e} of this change is lost"
    else:
        detail = f"the adapter itself changes only {effect:.1e}"
    return statement(f"merged = unmerged, {what}", relative_error(merged, adapted), bound, detail, "merge")


def _factors_of(lora: LoRAParameters) -> LoRAParameters:
    """Return the adapter without the parameters of a head, which merging does not change."""
    if not lora.full_tensors:
        return lora
    factors = LoRAParameters(lora.slots.values(), device=lora.values.device)
    for name, view in factors.named_tensors():
        view.copy_(lora.tensor(name))
    return factors

"""Gemma 4's per-layer embeddings (PLE) at the end of a block.

Layer l receives e_l of shape (P, p) in addition to the residual stream (`nn.decoder.ple_inputs`). P is defined in
`nn.decoder.block`. After its MLP:

    x₃ = s (x₂ + norm(p_l W_pᵀ)),   p_l = φ(x₂ W_gᵀ) ⊙ e_l

with W_g (p, hidden), W_p (hidden, p), and the layer scalar s. A layer without per-layer embeddings only multiplies by
s. W_g and W_p are linear modules and may have adapters. s stays frozen.

Backward, from G = ∂L/∂x₃. The sum receives s G, which reaches x₂ directly and through the norm, W_p, the gated unit
(`ops.glu` with e_l as `up`) and W_g:
    ∂L/∂p_l = (backward of the norm applied to s G) W_p                        (P, p)
    ∂L/∂e_l = φ(x₂ W_gᵀ) ⊙ ∂L/∂p_l                                             (P, p)
    ∂L/∂x₂ = s G + (φ'(x₂ W_gᵀ) ⊙ e_l ⊙ ∂L/∂p_l) W_g                           (P, hidden)

Saved: x₂, the gate, h of both adapters, and the input and inverse RMS of the norm.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter, Group
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.projections import (
    gather_rows,
    group_backward,
    group_forward,
    residual_backward,
    residual_forward,
)
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import PER_LAYER_NORM
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward
from backhand.ops.layer_norm import NormSaved


class PLESaved(NamedTuple):
    """Tensors saved by the end of a block. All are None in a layer that only multiplies by its scalar."""

    x2: Tensor | None  # (P, hidden)
    gate: Tensor | None  # (P, p)
    h_gate: Tensor | None  # (P, rank)
    h_projection: Tensor | None  # (P, rank)
    post_norm: NormSaved | None


def ple_forward(
    x2: Tensor, weights: BlockWeights, adapter: BlockAdapter, context: BlockContext
) -> tuple[Tensor, PLESaved]:
    """Map x₂ to x₃, both of shape (P, hidden), and return x₃ and the tensors saved for the backward."""
    config, scalar = context.config, not_none(weights.layer_scalar)
    if config.per_layer is None:
        return x2 * scalar, PLESaved(None, None, None, None, None)
    gate_adapter, projection_adapter = not_none(adapter.per_layer)
    assert weights.per_layer_gate is not None and weights.per_layer_projection is not None
    gate, h_gate = group_forward(x2, weights.per_layer_gate, None, gate_adapter)
    p, _ = glu_forward(gate, _layer_embeddings(context), config.activation)
    norm = weights.per_layer_norm, None
    x3, h_projection, post_norm = residual_forward(
        x2, p, weights.per_layer_projection, None, projection_adapter, norm, config
    )
    return x3.mul_(scalar), PLESaved(x2, gate, h_gate, h_projection, post_norm)


def ple_backward(
    d_x3: Tensor,
    saved: PLESaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    context: BlockContext,
    input_grad_groups: frozenset[Group],
) -> Tensor | None:
    """Return ∂L/∂x₂ (P, hidden), or None if the backward pass ends here. ∂L/∂e_l is written to `CrossLayer.d_ple`."""
    config = context.config
    d_x3 = d_x3 * not_none(weights.layer_scalar)
    if saved.x2 is None or saved.gate is None or saved.h_gate is None or saved.h_projection is None:
        return d_x3
    gate_adapter, projection_adapter = not_none(adapter.per_layer)
    assert weights.per_layer_gate is not None and weights.per_layer_projection is not None
    d_projected, _ = residual_backward(d_x3, saved.post_norm, adapter.d_norms.get(PER_LAYER_NORM), config)
    unit = GLUSaved(saved.gate, _layer_embeddings(context), config.activation)
    p, _ = glu_forward(unit.gate, unit.up, unit.activation)
    d_p = group_backward(
        d_projected,
        p,
        weights.per_layer_projection,
        projection_adapter,
        saved.h_projection,
        input_gradient=Group.PER_LAYER_PROJECTION in input_grad_groups,
    )
    if d_p is None:
        return None
    grads = glu_backward(d_p, unit)
    if (d_ple := not_none(context.cross_layer).d_ple) is not None:
        if context.loss_positions is None:
            d_ple[:, context.number] = grads.d_up
        else:
            d_ple[:, context.number].zero_().index_copy_(0, context.loss_positions, grads.d_up)
    d_x2 = group_backward(
        grads.d_gate.contiguous(),
        saved.x2,
        weights.per_layer_gate,
        gate_adapter,
        saved.h_gate,
        input_gradient=Group.PER_LAYER_GATE in input_grad_groups,
    )
    return None if d_x2 is None else d_x2.add_(d_x3)


def _layer_embeddings(context: BlockContext) -> Tensor:
    """Return a contiguous copy of e_l at the positions of x₂, (P, p)."""
    embeddings = not_none(not_none(context.cross_layer).ple)[:, context.number]
    return (
        embeddings.contiguous() if context.loss_positions is None else gather_rows(embeddings, context.loss_positions)
    )

"""The MLP sublayer of a layer with a mixture of experts, forward and backward by hand.

    n₂ = norm(x₁)                     s, chosen = router(n₂ W_rᵀ)            k experts for each token, s their shares
    x̂ = dispatch(n₂)                  [a u] = x̂ W_gu,eᵀ (+ LoRA of e)         each expert on its own rows
    p̂ = s ⊙ (φ(a) ⊙ u)                x₂ = x₁ + combine(p̂ W_d,eᵀ (+ LoRA of e))

A token becomes k rows, sorted by expert. Each chosen expert then computes a few large products, and the other experts
are neither read nor computed (`ops.expert_rows`, `ops.expert_linear`). The shares multiply the input of the down
projection rather than its output, so the output of the experts is neither saved nor recomputed.

gpt-oss differs in three points:
- The down projection has a bias. The biases of the chosen experts, weighted by the shares, are added to x₂ separately
  (`ops.expert_bias`), which gives the shares a second term of their gradient.
- The gated unit is `ops.clamped_glu`.
- An adapter file interleaves the outputs of gate and up, while here all of a comes before u. lora_B is reordered, and
  so is its gradient.

Granite 4 H adds the output of an MLP of n₂ to that of the experts. Its adapters are those of the MLP, and the experts
stay frozen.

Backward is the list in reverse order (`experts_backward`). d_n₂ has two terms: one through the experts, and one through
the router, because the shares depend on n₂. The weight of the router is frozen. The choice of experts is treated as
constant.

Saved for backward: the inverse RMS of the norm, shares and choices, a, u and every h. `recompute="mlp"` drops a, u and
their h. n₂, x̂, p and p̂ are recomputed. The matrices of all experts are stacked: gate_up is (experts · 2f, hidden) and
down (experts · hidden, f). Each expert's matrix is a slice of the stack, dense or quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, overload

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import ALL_GROUPS, BlockAdapter, Group, GroupAdapter, group_adapter
from backhand.nn.decoder.mixer import MLPSaved
from backhand.nn.decoder.projections import (
    gate_up_forward,
    group_forward,
    normalized,
    pre_norm_forward,
    residual_sum,
)
from backhand.nn.decoder.weights import BlockWeights, mlp_matrix
from backhand.nn.families.family import EXPERT_GROUPS, DecoderConfig, Mixture
from backhand.nn.lora_parameters import deinterleave_gate_up, expert_factors
from backhand.nn.scratch import Scratch
from backhand.ops.activation import Activated
from backhand.ops.clamped_glu import ClampedGLUSaved, clamped_glu_backward, clamped_glu_forward
from backhand.ops.expert_bias import ExpertBiasSaved, expert_bias_backward, expert_bias_forward
from backhand.ops.expert_linear import ExpertFactors, ExpertLinearSaved, expert_linear_backward, expert_linear_forward
from backhand.ops.expert_rows import (
    CombineSaved,
    DispatchSaved,
    Routing,
    combine_backward,
    combine_forward,
    dispatch_backward,
    dispatch_forward,
    route,
    weigh_backward,
    weigh_forward,
)
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward, glu_recompute
from backhand.ops.layer_norm import NormSaved
from backhand.ops.router import RouterSaved, router_backward, router_forward
from backhand.ops.weight_tiles import FrozenMatrix, frozen_part


class ExpertsSaved(NamedTuple):
    """Saved tensors of the sublayer for T tokens with k choices each. f is the width of one expert."""

    statistics: Tensor | None  # of the norm before the sublayer, as in `MLPSaved`
    routed: RouterSaved  # (T, k), or (T, experts) if a share is relative to all experts
    shares: Tensor  # (T, k)
    routing: Routing
    gate_up: Tensor | None  # (T · k, 2f), sorted by expert; None if recomputed
    h_gate_up: Tensor | None  # (T · k, rank); None if recomputed
    h_down: Tensor  # (T · k, rank)
    post_norm: NormSaved | None  # saved by the norm after the sublayer; None without that norm
    mlp: MLPSaved | None = None  # saved by the MLP next to the experts; None without one


class ExpertMatrices(Sequence[FrozenMatrix]):
    """Matrices of the experts in a stack. Each is sliced on access.

    Args:
        stack: (experts · out, in).
        experts: number of experts.
    """

    def __init__(self, stack: FrozenMatrix, experts: int) -> None:
        self._stack = stack
        self._experts = experts
        self._rows = stack.shape[0] // experts

    def __len__(self) -> int:
        return self._experts

    @overload
    def __getitem__(self, expert: int) -> FrozenMatrix: ...

    @overload
    def __getitem__(self, expert: slice) -> Sequence[FrozenMatrix]: ...

    def __getitem__(self, expert: int | slice) -> FrozenMatrix | Sequence[FrozenMatrix]:
        """Return the matrix of one expert, (out, in), or a list of matrices."""
        if isinstance(expert, slice):
            return [self[one] for one in range(*expert.indices(self._experts))]
        return frozen_part(self._stack, expert * self._rows, (expert + 1) * self._rows)


def experts_sublayer_forward(
    x1: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig, scratch: Scratch
) -> tuple[Tensor, ExpertsSaved]:
    """Map x₁ to x₂, both of shape (T, hidden), and return x₂ and the tensors saved for the backward."""
    mixture = not_none(config.mixture)
    stacks, factors = _of_experts(weights, adapter, mixture)
    n2, statistics = pre_norm_forward(x1, weights.mlp_norm, weights.mlp_norm_bias, config, scratch)
    logits = frozen_linear(n2, not_none(weights.router), weights.router_bias)
    shares, routed = router_forward(logits, mixture.chosen, of_all=mixture.of_all)
    routing = route(routed.chosen, mixture.experts)
    gate_up, h_gate_up = _gate_up(n2, routing, stacks, factors, mixture)
    product = scratch.take("product", (gate_up.shape[0], mixture.width), x1)
    gate, up = gate_up[:, : mixture.width], gate_up[:, mixture.width :]
    if mixture.clamp is not None:
        p, _ = clamped_glu_forward(gate, up, mixture.clamp, out=product)
    else:
        p, _ = glu_forward(gate, up, config.activation, out=product)
    weigh_forward(p, shares, routing, out=p)
    matrices = ExpertMatrices(mlp_matrix(stacks.down), mixture.experts)
    z, down = expert_linear_forward(p, matrices, routing.counts, _factors(factors.down, mixture))
    y, _ = combine_forward(z, routing)
    if stacks.down_bias is not None:
        y.add_(expert_bias_forward(shares, routed.chosen, _by_expert(stacks.down_bias, mixture))[0])
    mlp_saved = None
    if mixture.with_mlp:
        y_mlp, mlp_saved = _mlp_forward(n2, weights, adapter, config, scratch)
        y.add_(y_mlp)
    x2, post_norm = residual_sum(x1, y, (weights.after_mlp_norm, weights.after_mlp_norm_bias), config)
    return x2, ExpertsSaved(statistics, routed, shares, routing, gate_up, h_gate_up, down.h, post_norm, mlp_saved)


def _mlp_forward(
    n2: Tensor, weights: BlockWeights, adapter: BlockAdapter, config: DecoderConfig, scratch: Scratch
) -> tuple[Tensor, MLPSaved]:
    """Return the output of the MLP next to the experts, (T, hidden), and the tensors saved for its backward."""
    ffn = config.intermediate_size
    gate_up, h_gate_up = gate_up_forward(n2, weights, adapter, config)
    buffer = scratch.take("product", (n2.shape[0], ffn), n2)
    p, _ = glu_forward(gate_up[:, :ffn], gate_up[:, ffn:], config.activation, out=buffer)
    y, h_down = group_forward(p, mlp_matrix(weights.down), weights.down_bias, adapter.down)
    return y, MLPSaved(None, gate_up, h_gate_up, h_down, None)


_FROZEN = group_adapter(None, (), (), None)


def _of_experts(weights: BlockWeights, adapter: BlockAdapter, mixture: Mixture) -> tuple[BlockWeights, BlockAdapter]:
    """Return the block's weights and adapter with those of the experts as the MLP's."""
    if not mixture.with_mlp:
        return weights, adapter
    own = replace(weights, gate_up=weights.experts_gate_up, down=weights.experts_down)
    return own, adapter._replace(gate_up=_FROZEN, down=_FROZEN)


def experts_backward(
    d_y: Tensor,
    n2: Tensor | NormSaved,
    saved: ExpertsSaved,
    weights: BlockWeights,
    adapter: BlockAdapter,
    config: DecoderConfig,
    input_grad_groups: frozenset[Group],
) -> Tensor | None:
    """Map the gradient d_y of the experts' combined output to d_n₂, both of shape (T, hidden).

    Returns None if the backward pass ends here: at the first of the groups DOWN and GATE_UP not in `input_grad_groups`.
    With an MLP next to the experts, these groups are the MLP's, and the result is never None.
    """
    mixture, routing, x = not_none(config.mixture), saved.routing, normalized(n2)
    if mixture.with_mlp:
        (weights, adapter), input_grad_groups = _of_experts(weights, adapter, mixture), ALL_GROUPS
    gate_up, h_gate_up = saved.gate_up, saved.h_gate_up
    if gate_up is None or h_gate_up is None:
        gate_up, h_gate_up = _gate_up(x, routing, weights, adapter, mixture)

    # Recompute p for the gradient of the shares, and p̂ for that of the down projection's lora_A.
    gate, up = gate_up[:, : mixture.width], gate_up[:, mixture.width :]
    activated: Activated | None = None
    if mixture.clamp is not None:
        p, _ = clamped_glu_forward(gate, up, mixture.clamp)
    else:
        p, activated = glu_recompute(GLUSaved(gate, up, config.activation))
    weighed, weighing = weigh_forward(p, saved.shares, routing)
    d_z = combine_backward(d_y, CombineSaved(routing)).d_z
    matrices, factors = ExpertMatrices(mlp_matrix(weights.down), mixture.experts), _factors(adapter.down, mixture)
    down = ExpertLinearSaved(weighed, matrices, routing.counts, factors, saved.h_down, None)
    d_weighed = _projection_backward(d_z, down, adapter.down, mixture, Group.DOWN in input_grad_groups)
    del d_z, weighed, down
    if d_weighed is None:
        return None
    d_p, d_shares = weigh_backward(d_weighed, weighing)
    if weights.down_bias is not None:
        biases = ExpertBiasSaved(_by_expert(weights.down_bias, mixture), saved.routed.chosen)
        d_shares += expert_bias_backward(d_y, biases).d_weights
    del d_weighed, weighing, p
    d_gate_up = torch.empty_like(gate_up)
    if mixture.clamp is not None:
        clamped_glu_backward(d_p, ClampedGLUSaved(gate, up, mixture.clamp), out=d_gate_up)
    else:
        glu_backward(d_p, GLUSaved(gate, up, config.activation), ready=activated, out=d_gate_up)
    del d_p, activated

    rows, _ = dispatch_forward(x, routing)
    matrices, factors = ExpertMatrices(mlp_matrix(weights.gate_up), mixture.experts), _factors(adapter.gate_up, mixture)
    first = ExpertLinearSaved(rows, matrices, routing.counts, factors, h_gate_up, None)
    d_rows = _projection_backward(d_gate_up, first, adapter.gate_up, mixture, Group.GATE_UP in input_grad_groups)
    del rows, d_gate_up, first
    if d_rows is None:
        return None
    d_n2 = dispatch_backward(d_rows, DispatchSaved(routing)).d_x
    d_router = frozen_input_gradient(router_backward(d_shares, saved.routed).d_logits, not_none(weights.router))
    return d_n2.add_(d_router)


def _gate_up(
    n2: Tensor, routing: Routing, weights: BlockWeights, adapter: BlockAdapter, mixture: Mixture
) -> tuple[Tensor, Tensor]:
    """Return [a | u] of shape (T · k, 2f) and h of all rows."""
    rows, _ = dispatch_forward(n2, routing)
    matrices = ExpertMatrices(mlp_matrix(weights.gate_up), mixture.experts)
    factors, bias = _factors(adapter.gate_up, mixture), weights.gate_up_bias
    biases = None if bias is None else _by_expert(bias, mixture)
    gate_up, saved = expert_linear_forward(rows, matrices, routing.counts, factors, biases)
    return gate_up, saved.h


def _by_expert(bias: Tensor, mixture: Mixture) -> Tensor:
    """Return the concatenated biases as (experts, out)."""
    return bias.view(mixture.experts, -1)


def _projection_backward(
    d_y: Tensor, saved: ExpertLinearSaved, adapter: GroupAdapter, mixture: Mixture, input_gradient: bool
) -> Tensor | None:
    """Return ∂L/∂x of one projection, or None without `input_gradient`, and add the gradients of its factors."""
    into, d_lora_B = None, None
    if saved.factors is not None:
        (lora,) = adapter.lora.factors
        d_lora_A, d_lora_B = expert_factors(lora.d_lora_A, lora.d_lora_B, mixture.experts)
        # Kernels accumulate into contiguous rows, and in the flat buffer the columns of the experts are interleaved.
        into = d_lora_A, torch.zeros_like(saved.factors.lora_B, dtype=d_lora_B.dtype)
    d_x = expert_linear_backward(d_y, saved, input_gradient=input_gradient, accumulate_into=into).d_x
    if d_lora_B is not None and into is not None:
        d_lora_B = deinterleave_gate_up(d_lora_B) if _is_interleaved(adapter, mixture) else d_lora_B
        d_lora_B += into[1].view_as(d_lora_B)
    return d_x


def _factors(adapter: GroupAdapter, mixture: Mixture) -> ExpertFactors | None:
    """Return the factors of the experts, contiguous for each expert, or None without an adapter."""
    if not adapter.lora.factors:
        return None
    (lora,) = adapter.lora.factors
    lora_A, lora_B = expert_factors(lora.lora_A, lora.lora_B, mixture.experts)
    if _is_interleaved(adapter, mixture):
        lora_B = deinterleave_gate_up(lora_B).flatten(1, 2)
    return ExpertFactors(lora_A, lora_B.contiguous(), lora.scaling)


def _is_interleaved(adapter: GroupAdapter, mixture: Mixture) -> bool:
    """Return True if the rows of lora_B interleave gate and up."""
    return mixture.interleaved and adapter.names[0].endswith(EXPERT_GROUPS[0])

"""An MLP without a gate as the mixer of its block: p = φ(n₁ W_upᵀ), followed by p W_downᵀ (Nemotron-H).

The block has no other sublayer. The up projection is the mixer's input projection, the down projection its output
projection, and the mixer between them is the activation φ. It treats each position separately and has no state.

Backward: ∂L/∂a = ∂L/∂p ⊙ φ'(a). a is saved, and p is recomputed for the gradient of the down projection's lora_A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved, Rows
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import DecoderConfig
from backhand.ops.activation import activate, activation_gradient


def mlp_mixer_forward(a: Tensor, _weights: BlockWeights, context: BlockContext) -> tuple[Tensor, None]:
    """Return p = φ(a), (T, f)."""
    return activate(a, context.config.activation, None), None


def mlp_mixer_backward(
    d_p: Tensor,
    saved: MixerSaved,
    _weights: BlockWeights,
    context: BlockContext,
    _adapter: BlockAdapter,
    p: Tensor | None,
) -> Tensor:
    """Return ∂L/∂a for ∂L/∂p, (T, f), in the memory of ∂L/∂p. Fills the buffer p, if there is one."""
    activation = context.config.activation
    if p is not None:
        activate(saved.projected, activation, p)
    return activation_gradient(d_p, saved.projected, activation, d_p)


def _no_states(
    _config: DecoderConfig, _rows: int, _dtype: torch.dtype, _device: torch.device | str
) -> tuple[Tensor, ...]:
    return ()


def _extend(
    a: Tensor, _weights: BlockWeights, _states: tuple[Tensor, ...], _rows: Sequence[Rows], config: DecoderConfig
) -> Tensor:
    return activate(a, config.activation, None)


def _output(saved: MixerSaved, _weights: BlockWeights, context: BlockContext) -> Tensor:
    return activate(saved.projected, context.config.activation, None)


MLP_MIXER = Mixer(
    mlp_mixer_forward,
    mlp_mixer_backward,
    _no_states,
    _extend,
    recomputes_output=lambda _output, _context: True,
    output=_output,
)

"""Mamba-2's mixer: the state-space scan with its convolution, time step, gate and norm, and its state in generation.

    [z | x b c | a] = in_proj(n₁),   [x b c] ← SiLU(conv([x b c])),   Δ = time_step(a)
    s = scan(x, Δ, b, c),   v = s ⊙ SiLU(z),   y = norm(v)

The norm is computed over the features of each group of heads, and its weight covers all of them. In Falcon-H1 it may be
before the gate, y = norm(s) ⊙ SiLU(z), or absent. There z, x, b, c and a have a multiplier each, which is applied to
the output of in_proj in place.

Backward takes the lines in reverse order and applies the backward of each op. The mixer saves s and the inverse RMS of
the norm in addition to its input and output. The backward recomputes v, x, b, c and Δ from the input and s, at the cost
of a gated unit and a convolution.

The output of a token depends on [x b c] before the convolution of the J-1 tokens before it, and on the state of the
scan. These are the two states of a row, zero before its first token. Their size does not grow with the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.decoder.adapted_group import BlockAdapter
from backhand.nn.decoder.mixer import BlockContext, Mixer, MixerSaved, Rows
from backhand.nn.decoder.projections import norm_backward
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.families.family import DecoderConfig, SSMSizes
from backhand.ops.causal_conv import Taps, causal_conv_backward, causal_conv_continued, causal_conv_forward
from backhand.ops.document_groups import SegmentRun
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward, glu_recompute
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, rms_norm_forward
from backhand.ops.ssd import SSDSaved, ssd_backward, ssd_forward
from backhand.ops.time_step import TimeStepSaved, time_step_backward, time_step_forward


class SSMSaved(NamedTuple):
    """s (T, heads · head width) and the inverse RMS of the norm, (groups, T, 1); None without a norm."""

    scanned: Tensor
    inverse_rms: Tensor | None


class _ScanInputs(NamedTuple):
    """x, Δ, b and c, and the tensors saved for the backward of Δ."""

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    time_step: TimeStepSaved


def ssm_forward(projected: Tensor, weights: BlockWeights, context: BlockContext) -> tuple[Tensor, SSMSaved]:
    """Return y of shape (T, heads · head width) for [z | x b c | a], within each document."""
    sizes = not_none(context.config.ssm)
    _multiply(projected, context.config)
    z, xbc, a = projected.split(sizes.inputs, dim=1)
    convolved, _ = causal_conv_forward(xbc, _taps(weights), context.segment_runs, silu=True)
    scan = _scan_inputs(convolved, a, weights, sizes)
    scanned, _ = ssd_forward(*scan[:4], *_by_head(weights), context.segment_runs)
    return _gated(scanned.flatten(1), z, weights, context.config)


def ssm_backward(
    d_y: Tensor,
    saved: MixerSaved,
    weights: BlockWeights,
    context: BlockContext,
    adapter: BlockAdapter,
    _output: Tensor | None,
) -> Tensor:
    """Return ∂L/∂[z | x b c | a] for ∂L/∂y (T, heads · head width). Adds the gradient of a trained norm."""
    sizes, inner = not_none(context.config.ssm), saved.inner
    z, xbc, a = saved.projected.split(sizes.inputs, dim=1)
    d_input = torch.empty_like(saved.projected)
    d_z, d_xbc, d_a = d_input.split(sizes.inputs, dim=1)

    d_weight = adapter.d_norms.get(f"{context.config.ssm_path}.norm")
    d_gate, d_scanned = _gated_backward(d_y, z, inner, weights, sizes, d_weight)
    d_z.copy_(d_gate)
    del d_gate

    convolved, conv = causal_conv_forward(xbc, _taps(weights), context.segment_runs, silu=True)
    scan = _scan_inputs(convolved, a, weights, sizes)
    ssd = SSDSaved(*scan[:4], *_by_head(weights), context.segment_runs)
    d_x, d_dt, d_b, d_c = ssd_backward(d_scanned.unflatten(1, (sizes.heads, -1)), ssd)
    del ssd, d_scanned
    d_a.copy_(time_step_backward(d_dt, scan.time_step).d_a)
    d_convolved = torch.cat([part.flatten(1) for part in (d_x, d_b, d_c)], dim=1)
    del scan, convolved, d_x, d_b, d_c
    causal_conv_backward(d_convolved, conv, out=d_xbc)
    _multiply(d_input, context.config)
    return d_input


def ssm_states(
    config: DecoderConfig, rows: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return zero states: [x b c] of each row's last J-1 tokens, and the state of the scan.

    The shapes are (rows, J-1, channels) and (rows, groups, state width, heads of a group · head width). The second is
    float32 or wider.
    """
    sizes = not_none(config.ssm)
    seen = torch.zeros(rows, sizes.taps - 1, sizes.channels, dtype=dtype, device=device)
    shape = (rows, sizes.groups, sizes.state_width, sizes.width // sizes.groups)
    return seen, torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)


def ssm_extend(
    projected: Tensor, weights: BlockWeights, states: tuple[Tensor, ...], rows: Sequence[Rows], config: DecoderConfig
) -> Tensor:
    """Return y of new tokens, (tokens, heads · head width), which continue their rows, and update the states.

    Args:
        projected: [z | x b c | a] of the new tokens.
        states: from `ssm_states`.
        rows: the rows that the tokens belong to.
    """
    sizes, (seen, state) = not_none(config.ssm), states
    _multiply(projected, config)
    z, xbc, a = projected.split(sizes.inputs, dim=1)
    scanned = projected.new_empty(projected.shape[0], sizes.heads, sizes.head_width)
    for first, count, start, new in rows:
        tokens, row_range = slice(start, start + count * new), slice(first, first + count)
        by_row = xbc[tokens].unflatten(0, (count, new))
        convolved = causal_conv_continued(by_row, _taps(weights), seen[row_range], silu=True).flatten(0, 1)
        scan = _scan_inputs(convolved, a[tokens], weights, sizes)
        runs = (SegmentRun(0, count, new),)
        scanned[tokens] = ssd_forward(*scan[:4], *_by_head(weights), runs, states=state[row_range])[0]
    return _gated(scanned.flatten(1), z, weights, config)[0]


def _scan_inputs(convolved: Tensor, a: Tensor, weights: BlockWeights, sizes: SSMSizes) -> _ScanInputs:
    """Return the inputs of the scan.

    Args:
        convolved: [x b c] after the convolution, (tokens, channels).
        a: (tokens, heads).
    """
    shared = sizes.groups * sizes.state_width
    x, b, c = convolved.split([sizes.width, shared, shared], dim=1)
    dt, time_step = time_step_forward(a, not_none(weights.rate_bias), sizes.time_steps)
    b, c = (part.unflatten(1, (sizes.groups, sizes.state_width)) for part in (b, c))
    return _ScanInputs(x.unflatten(1, (sizes.heads, sizes.head_width)), dt, b, c, time_step)


def _multiply(projected: Tensor, config: DecoderConfig) -> None:
    """Multiply z, x, b, c and a, or their gradients, in place by their multipliers."""
    if config.multipliers.ssm:
        parts = projected.split(not_none(config.ssm).parts, dim=1)
        for part, multiplier in zip(parts, config.multipliers.ssm, strict=True):
            part.mul_(multiplier)


def _by_head(weights: BlockWeights) -> tuple[Tensor, Tensor]:
    """Return A and D of the scan, (heads,) each."""
    return not_none(weights.log_rate), not_none(weights.skip)


def _gated(s: Tensor, z: Tensor, weights: BlockWeights, config: DecoderConfig) -> tuple[Tensor, SSMSaved]:
    """Return y of shape (T, heads · head width), s gated and normalized, and the tensors saved for backward."""
    sizes, inverse_rms, v = not_none(config.ssm), None, s
    if sizes.norm == "before_gate":
        v, inverse_rms = _normed(s, weights, config)
    v, _ = glu_forward(z, v, "silu")
    if sizes.norm == "after_gate":
        v, inverse_rms = _normed(v, weights, config)
    return v, SSMSaved(s, inverse_rms)


def _normed(v: Tensor, weights: BlockWeights, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Return norm(v) of shape (T, heads · head width) and the inverse RMS of each group, (groups, T, 1)."""
    groups = not_none(config.ssm).groups
    parts = zip(v.chunk(groups, dim=1), not_none(weights.gated_norm).chunk(groups), strict=True)
    normed, saved = zip(*(rms_norm_forward(part, weight, config.norm_eps) for part, weight in parts), strict=True)
    inverse_rms = torch.stack([one.inverse_rms for one in saved])
    return normed[0] if groups == 1 else torch.cat(normed, dim=1), inverse_rms


def _gated_backward(
    d_y: Tensor, z: Tensor, saved: SSMSaved, weights: BlockWeights, sizes: SSMSizes, d_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ∂L/∂z and ∂L/∂s of shape (T, heads · head width), and add the gradient of a trained norm to d_weight."""
    if saved.inverse_rms is None:
        return glu_backward(d_y, GLUSaved(z, saved.scanned, "silu"))
    if sizes.norm == "before_gate":
        pieces = [rms_norm_apply(*one[:3]) for one in _group_norms(saved.scanned, saved.inverse_rms, weights)]
        d_gate, d_normed = glu_backward(d_y, GLUSaved(z, torch.cat(pieces, dim=1), "silu"))
        return d_gate, _normed_backward(d_normed, saved.scanned, saved.inverse_rms, weights, d_weight)
    unit = GLUSaved(z, saved.scanned, "silu")
    v, activated = glu_recompute(unit)
    return glu_backward(_normed_backward(d_y, v, saved.inverse_rms, weights, d_weight), unit, ready=activated)


def _normed_backward(
    d_y: Tensor, v: Tensor, inverse_rms: Tensor, weights: BlockWeights, d_weight: Tensor | None
) -> Tensor:
    """Return ∂L/∂v of the norm of v, (T, heads · head width), and add the gradient of a trained norm to d_weight."""
    groups, d_v = len(inverse_rms), torch.empty_like(d_y)
    d_weights = [None] * groups if d_weight is None else d_weight.chunk(groups)
    norms = _group_norms(v, inverse_rms, weights)
    for d_part, part, norm, own in zip(d_v.chunk(groups, 1), d_y.chunk(groups, 1), norms, d_weights, strict=True):
        d_part.copy_(norm_backward(part, norm, own))
    return d_v


def _group_norms(v: Tensor, inverse_rms: Tensor, weights: BlockWeights) -> list[RMSNormSaved]:
    """Return the saved tensors of the norm of each group of v, (T, heads · head width)."""
    groups = len(inverse_rms)
    parts = zip(v.chunk(groups, dim=1), not_none(weights.gated_norm).chunk(groups), inverse_rms, strict=True)
    return [RMSNormSaved(part, weight, one, 0.0) for part, weight, one in parts]


def _taps(weights: BlockWeights) -> Taps:
    """Return the convolution in the shape that the op expects. Files have one more axis."""
    return Taps(not_none(weights.conv).squeeze(1), weights.conv_bias)


STATE_SPACE = Mixer(ssm_forward, ssm_backward, ssm_states, ssm_extend)

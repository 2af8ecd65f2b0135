"""The fused head of distillation: how far a student's next-token distribution is from a teacher's, without full logits.

    q = softmax(Z(x)),  p = softmax(Z(y))       x student's hidden states, y teacher's, (rows, hidden); one frozen head

    forward          ℓ = KL(p ‖ q) = Σ p log(p / q)
    reverse          ℓ = KL(q ‖ p) = Σ q log(q / p)
    jensen-shannon   ℓ = β KL(p ‖ m) + (1 - β) KL(q ‖ m),   m = β p + (1 - β) q      [arXiv:2306.13649, eq. 4]

Z is the frozen head of `linear_cross_entropy` with the family's rule. A temperature τ divides both logits; `softened`
expresses it by the rule.

Backward. p is constant. Write g = ∂ℓ/∂q (a constant added to g has no effect):
    forward: g = -p / q      reverse: g = log(q / p)      jensen-shannon: g = (1 - β) log(q / m)
The last holds because ∂m/∂q = 1 - β, and the terms p / m and q / m of both logarithms' derivatives add up to the
constant Σ m / m. Through the softmax, dq = q ⊙ (dZ - ⟨q, dZ⟩), so
    ∂ℓ/∂Z = q ⊙ (g - ⟨q, g⟩)
For the three forms this is q - p, q ⊙ (log(q / p) - ℓ) and (1 - β) q ⊙ (log(q / m) - KL(q ‖ m)). The gradient of x
follows as in `linear_cross_entropy`, with D = w γ ∂ℓ/∂Z: its chunks of rows, buffers and products are used.

The temperature is not compensated by τ²: the loss is the divergence of the softened distributions itself, as in TRL.

Memory: two chunks of logits, (chunk, vocab), the student's and the teacher's. The kernel
(native/softmax_losses.cpp) takes one row at a time.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from backhand.kernels import softmax_losses as kernels
from backhand.kernels.pieces import piece_size
from backhand.ops.cross_entropy import SOFTMAX_ELEMENTS, softmax_and_log_sum
from backhand.ops.linear_cross_entropy import ChunkLoss, chunk_logits, chunk_shape, head_backward, head_forward
from backhand.ops.logits_rule import PLAIN, LogitsRule, capped, ruled_reference
from backhand.ops.weight_tiles import FrozenMatrix

DivergenceKind = Literal["forward", "reverse", "jensen-shannon"]
DIVERGENCES: tuple[DivergenceKind, ...] = ("forward", "reverse", "jensen-shannon")


class Divergence(NamedTuple):
    """The form of the loss; `beta` β is the teacher's share in the mixture of jensen-shannon, in (0, 1)."""

    kind: DivergenceKind = "forward"
    beta: float = 0.5


class LinearDivergenceGrads(NamedTuple):
    """The gradient of the student's hidden states."""

    d_x: Tensor  # (rows, hidden)


def softened(rule: LogitsRule, temperature: float) -> LogitsRule:
    """Return the rule of logits divided by τ: Z' / τ = (κ / τ) tanh((γ / τ) Z / (κ / τ))."""
    cap = None if rule.cap is None else rule.cap / temperature
    return LogitsRule(rule.scaling / temperature, cap)


def _ratio_to_mixture(delta: Tensor, beta: float) -> Tensor:
    """Return log(q / m) from δ = log(q / p), without overflow and without cancellation near δ = 0."""
    share = torch.where(delta < 0, delta.new_tensor(1 - beta), delta.new_tensor(beta))
    return delta.clamp(max=0) - torch.log1p(torch.expm1(-delta.abs()) * share)


def _divergence_rows(
    student: Tensor, teacher: Tensor, losses: Tensor, divergence: Divergence, cap: float | None, gradient: bool
) -> None:
    """Write ℓ of a few rows, (rows,), to `losses`; with `gradient`, replace the student's logits by ∂ℓ/∂Z."""
    seen, tanh = (student, None) if cap is None else capped(student, cap)
    of_teacher = teacher if cap is None else capped(teacher, cap)[0]
    q, p = (torch.empty(student.shape, dtype=losses.dtype, device=student.device) for _ in range(2))
    shift = softmax_and_log_sum(of_teacher, p) - softmax_and_log_sum(seen, q)
    wide, beta = shift.dtype, divergence.beta
    delta = (seen.to(wide) - of_teacher.to(wide)).add_(shift).to(losses.dtype)
    if divergence.kind == "forward":
        losses.copy_(-(p * delta).sum(-1, dtype=wide))
        d_seen = q.sub_(p)
    elif divergence.kind == "reverse":
        losses.copy_((q * delta).sum(-1, dtype=wide))
        d_seen = q.mul_(delta.sub_(losses[:, None]))
    else:
        ratio = _ratio_to_mixture(delta, beta)
        kl_student = (q * ratio).sum(-1, dtype=wide)
        kl_teacher = (p * (ratio - delta)).sum(-1, dtype=wide)
        losses.copy_(beta * kl_teacher + (1 - beta) * kl_student)
        d_seen = q.mul_(ratio.sub_(kl_student[:, None].to(losses.dtype))).mul_(1 - beta)
    if gradient:
        student.copy_(d_seen if tanh is None else torch.ops.aten.tanh_backward(d_seen, tanh))


def divergences_in_place(
    student: Tensor,
    teacher: Tensor,
    losses: Tensor,
    divergence: Divergence = Divergence(),  # noqa: B008 - a named tuple is immutable
    cap: float | None = None,
    *,
    gradient: bool,
) -> None:
    """Write ℓ of a chunk of rows to `losses`; with `gradient`, replace the student's logits by ∂ℓ/∂Z.

    Args:
        student: logits of the student, (rows, vocab), scaled by γ.
        teacher: logits of the teacher, (rows, vocab), scaled by γ.
        losses: (rows,), float32 or wider.
        divergence: the form of the loss.
        cap: κ, the cap of the logits (`logits_rule`), or None.
        gradient: replace the student's logits.
    """
    kind = DIVERGENCES.index(divergence.kind)
    if cap is None and kernels.divergences(student, teacher, losses, kind, divergence.beta, gradient=gradient):
        return
    rows, vocab = student.shape
    step = max(1, piece_size(SOFTMAX_ELEMENTS) // vocab) if student.device.type == "cpu" else max(1, rows)
    for parts in zip(student.split(step), teacher.split(step), losses.split(step), strict=True):
        _divergence_rows(*parts, divergence, cap, gradient)


def _chunk_loss(
    teacher: Tensor, weight: FrozenMatrix, divergence: Divergence, rule: LogitsRule, *, gradient: bool
) -> ChunkLoss:
    """Return the loss of a chunk of the student's logits. The teacher's logits of a chunk have one buffer."""
    shape = chunk_shape(len(teacher), weight, teacher.dtype)
    buffer = torch.empty(shape, dtype=teacher.dtype, device=teacher.device)

    def loss(chunk: Tensor, part: slice, losses: Tensor) -> None:
        of_teacher = chunk_logits(teacher[part], weight, rule, buffer[: part.stop - part.start])
        divergences_in_place(chunk, of_teacher, losses, divergence, rule.cap, gradient=gradient)

    return loss


def linear_divergence_forward(
    x: Tensor,
    weight: FrozenMatrix,
    teacher: Tensor,
    divergence: Divergence = Divergence(),  # noqa: B008 - a named tuple is immutable
    rule: LogitsRule = PLAIN,
) -> Tensor:
    """Compute ℓ of every row, without gradients.

    Args:
        x: (rows, hidden), the student's hidden states after the final norm.
        weight: (vocab, hidden).
        teacher: (rows, hidden), the teacher's hidden states of the same rows after the final norm.
        divergence: the form of the loss.
        rule: the logits' multiplier and cap; `softened` by the temperature.

    Returns:
        (rows,) losses in nats, float32 or wider.
    """
    loss = _chunk_loss(teacher, weight, divergence, rule, gradient=False)
    return head_forward(x, weight, loss, None, rule, logits=None)


def linear_divergence_backward(
    x: Tensor,
    weight: FrozenMatrix,
    teacher: Tensor,
    multiplier: float | Tensor = 1.0,
    divergence: Divergence = Divergence(),  # noqa: B008 - a named tuple is immutable
    rule: LogitsRule = PLAIN,
    *,
    out: Tensor | None = None,
    logits: Tensor | None = None,
) -> tuple[Tensor, LinearDivergenceGrads]:
    """Compute ℓ of every row and the gradient of Σ w ℓ, forward and backward in one pass over the chunks.

    Args and returns are those of `linear_cross_entropy_backward`, with `teacher` and `divergence` instead of targets,
    and without factors of the head.
    """
    loss = _chunk_loss(teacher, weight, divergence, rule, gradient=True)
    losses, grads = head_backward(x, weight, loss, None, multiplier, rule, out=out, logits=logits)
    return losses, LinearDivergenceGrads(grads.d_x)


def linear_divergence_reference(
    x: Tensor,
    weight: Tensor,
    teacher: Tensor,
    divergence: Divergence = Divergence(),  # noqa: B008 - a named tuple is immutable
    rule: LogitsRule = PLAIN,
) -> Tensor:
    """Compute ℓ of every row with full logits and torch's `kl_div`."""

    def log_probabilities(x: Tensor) -> Tensor:
        return torch.log_softmax(ruled_reference(x @ weight.T, rule), dim=-1)

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(other, one, reduction="none", log_target=True).sum(-1)

    u, v = log_probabilities(x), log_probabilities(teacher)
    if divergence.kind == "forward":
        return kl(v, u)
    if divergence.kind == "reverse":
        return kl(u, v)
    beta = divergence.beta
    log_m = (beta * v.exp() + (1 - beta) * u.exp()).log()
    return beta * kl(v, log_m) + (1 - beta) * kl(u, log_m)

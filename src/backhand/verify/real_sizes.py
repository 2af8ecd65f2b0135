"""Sums at real size, whose error may not grow with their length: vocabularies, keys, wide layers, long documents.

The cases of `cases/` prove formulas, on sizes at which a sum in any order is as good as any other. Here each op runs at
the size of a real model, in every form that this processor has, in float32 and bfloat16, and is measured against
float64 on the same rounded inputs. It may err at most twice as much as torch's own form of the same, or by half a unit
of rounding of what it gives. Once a case, a sum from the left, one number behind the other, takes the place of the
right one: it must be rejected, or the case would not see the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backhand.kernels.library import load, usable, using
from backhand.ops.adapted_glu import adapted_glu_backward, adapted_glu_forward
from backhand.ops.attention import attention_backward, attention_forward
from backhand.ops.attention_blocks import attention_blocks_backward, attention_blocks_forward
from backhand.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from backhand.ops.document_groups import Run
from backhand.ops.embedding import embedding_backward, embedding_forward
from backhand.ops.frozen_matrix import frozen_linear
from backhand.ops.gated_delta_rule import gated_delta_rule_backward, gated_delta_rule_forward
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward
from backhand.ops.lora_bias import lora_bias_backward, lora_bias_forward
from backhand.ops.lora_embedding import lora_embedding_backward, lora_embedding_forward
from backhand.ops.lora_group import LoRAGroup, lora_group_backward, lora_group_forward
from backhand.ops.low_rank import Member
from backhand.ops.rms_norm import rms_norm_backward, rms_norm_forward
from backhand.verify.case import ByHand, Draw, Tensors
from backhand.verify.differentiate import autograd_gradients
from backhand.verify.measure import relative_error
from backhand.verify.runner import AUTOGRAD, LOW_PRECISIONS, TIMES_AUTOGRAD, TORCH, Rejection, Row, dtype_name

KEYS, HIDDEN, POSITIONS, RANK = 8_192, 8_192, 32_768, 256
VOCABULARIES = (151_936, 262_144)
WATCHED = 64
"""Of attention: the last queries, which see all keys, and the first keys, which all queries see."""

LAST, FIRST = slice(-WATCHED, None), slice(WATCHED)


@dataclass(frozen=True)
class RealSize:
    """One op at one real size.

    Attributes:
        op: its name.
        name: what is large, and how its numbers lie.
        tensors: inputs by name, float64, `d_y` among them.
        by_hand: y and gradients of the op on such tensors in any dtype.
        usual: y as torch computes it; in float64, and differentiated, the truth.
        naive: a tensor by name, and its value by sums from the left, in float32; None where the op is itself a
            recurrence, which has no other order.
        picked: the rows of a tensor that are measured, by its name; all of the others.
        loops: whether the op has compiled kernels, whose builds are then measured too.
        dtypes: in which it is measured.
        exact: the bound of y is half a unit of rounding, whatever torch errs.
    """

    op: str
    name: str
    tensors: Tensors
    by_hand: Callable[[Tensors], ByHand]
    usual: Callable[[Tensors], Tensor]
    naive: tuple[str, Callable[[Tensors], Tensor]] | None
    picked: Mapping[str, slice] = field(default_factory=dict)
    loops: bool = True
    dtypes: tuple[torch.dtype, ...] = LOW_PRECISIONS
    exact: bool = False


def builds() -> tuple[str, ...]:
    """The forms that this processor has: torch's, and each build of the kernels."""
    return (TORCH, *usable())


def _in_build(name: str) -> AbstractContextManager[None]:
    return using(None if name == TORCH else load(name))


def prove_real_size(case: RealSize) -> Iterator[Row | Rejection]:
    """Each tensor of a case in each form and dtype, and whether its naive sum is rejected."""
    for dtype in case.dtypes:
        yield from rows_in(case, dtype)


def rows_in(case: RealSize, dtype: torch.dtype) -> Iterator[Row | Rejection]:
    """Those of one dtype."""
    rounded = {name: tensor.to(dtype) for name, tensor in case.tensors.items()}
    widened = {name: tensor.double() for name, tensor in rounded.items()}
    found = {}
    with torch.no_grad():
        for build in builds() if case.loops else (TORCH,):
            with _in_build(build):
                y, gradients = case.by_hand(rounded)
                found[build] = {"y": y, **gradients}
    names = [name for name in found[TORCH] if name != "y"]
    truth, usual = (_by_autograd(case.usual, tensors, names) for tensors in (widened, rounded))

    def error(name: str, measured: Tensor) -> float:
        part = case.picked.get(name, slice(None))
        return relative_error(measured[part], truth[name][part])

    def bound(name: str) -> float:
        half = torch.finfo(usual[name].dtype).eps / 2
        return half if case.exact and name == "y" else max(half, TIMES_AUTOGRAD * error(name, usual[name]))

    for build, tensors in found.items():
        for name, measured in tensors.items():
            label = name if name == "y" else f"d_{name}"
            row = partial(Row, case.op, case.name, dtype_name(dtype), AUTOGRAD, label)
            yield row(error(name, measured), bound(name), form=build)
    if dtype == torch.float32 and case.naive is not None:
        name, naive = case.naive
        spoiled = found[TORCH][name].clone()
        part = case.picked.get(name, slice(None))
        spoiled[part] = naive(rounded).to(spoiled.dtype)
        yield Rejection(case.op, "naive sum", name, error(name, spoiled), case.name, bound(name), TORCH)


def _by_autograd(forward: Callable[[Tensors], Tensor], tensors: Tensors, names: list[str]) -> Tensors:
    y, gradients = autograd_gradients(forward, tensors, names)
    return {"y": y, **gradients}


def from_the_left(terms: Tensor) -> Tensor:
    """Σ over the first axis in float32, one number behind the other."""
    return torch.from_numpy(np.add.accumulate(terms.float().numpy(), axis=0)[-1].copy())


def _naive_product(left: Tensor, right: Tensor) -> Tensor:
    """left (n, k) transposed times right (n, m), row by row."""
    return torch.stack([from_the_left(column[:, None] * right) for column in left.T])


# ---------------------------------------------------------------------------------------------------------------------
# The cases, one at a time, since they are large.


def real_sizes() -> Iterator[RealSize]:
    """Every case."""
    for vocab in VOCABULARIES:
        for peaked in (False, True):
            yield _cross_entropy(vocab, peaked)
            yield _linear_cross_entropy(vocab, peaked)
    yield _attention(0.3)
    yield _attention_blocks(0.3)
    # In bfloat16 the blocks' scores are rounded before their softmax, and larger ones by more, however many there are.
    yield replace(_attention_blocks(2.0), dtypes=(torch.float32,))
    yield _rms_norm("wide", WATCHED, HIDDEN)
    yield _rms_norm("many positions", POSITIONS, 24)
    yield _few_rows()
    yield _lora_group("wide", 16, HIDDEN, 40)
    yield _lora_group("many positions", POSITIONS, 24, 40)
    yield _adapted_glu()
    yield _gated_delta_rule()
    yield _embedding()
    yield _lora_embedding()
    yield _lora_bias()


def _by_input(gradients: Any) -> Tensors:
    """The gradients that are there, by the names of the inputs."""
    return {name.removeprefix("d_"): value for name, value in gradients._asdict().items() if value is not None}


def _logits(draw: Draw, vocab: int, peaked: bool) -> tuple[Tensor, Tensor]:
    """(8, vocab) and targets: flat about 0, or with a peak, which half of the targets are."""
    logits, targets = draw.normal(8, vocab, size=1.5), draw.integers(vocab, 8)
    peaks = torch.where(torch.arange(8) < 4, targets, (targets + 1) % vocab)
    return (logits.scatter_add(1, peaks[:, None], torch.full((8, 1), 17.0).double()) if peaked else logits), targets


def _naive_losses(logits: Tensor, targets: Tensor) -> Tensor:
    z = logits.float()
    most = z.amax(1)
    return from_the_left((z - most[:, None]).exp().T).log() + most - z.gather(1, targets[:, None])[:, 0]


def _usual_losses(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, targets, reduction="none")


def _cross_entropy(vocab: int, peaked: bool) -> RealSize:
    name = f"{vocab:,} words, {'peaked' if peaked else 'flat'}"
    draw = Draw(f"cross_entropy: {name}")
    logits, targets = _logits(draw, vocab, peaked)

    def by_hand(t: Tensors) -> ByHand:
        y, saved = cross_entropy_forward(t["logits"], targets)
        return ByHand(y, {"logits": cross_entropy_backward(t["d_y"], saved).d_logits})

    return RealSize(
        *("cross_entropy", name, {"logits": logits, "d_y": draw.normal(8)}, by_hand),
        lambda t: _usual_losses(t["logits"], targets),
        ("y", lambda t: _naive_losses(t["logits"], targets)),
        loops=False,
        exact=True,
    )


def _linear_cross_entropy(vocab: int, peaked: bool) -> RealSize:
    """Rows of x are those of the identity, so that the logits are the weight's numbers, and alike for everyone."""
    name = f"{vocab:,} words, {'peaked' if peaked else 'flat'}"
    logits, targets = _logits(Draw(f"linear_cross_entropy: {name}"), vocab, peaked)
    tensors = {"x": torch.eye(8).double(), "weight": logits.T.contiguous(), "d_y": torch.ones(8).double()}

    def by_hand(t: Tensors) -> ByHand:
        losses, grads = linear_cross_entropy_backward(t["x"], t["weight"], targets)
        return ByHand(losses, {"x": grads.d_x})

    return RealSize(
        *("linear_cross_entropy", name, tensors, by_hand),
        lambda t: _usual_losses(t["x"] @ t["weight"].T, targets),
        ("y", lambda t: _naive_losses(t["weight"].T, targets)),
        exact=True,
    )


def _naive_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Of the last queries, (queries, heads, head_dim), of one head."""
    queries, keys, values = q[LAST, 0].float(), k[:, 0].float(), v[:, 0].float()
    scores = scaling * queries @ keys.T
    scores.masked_fill_(torch.ones_like(scores).triu_(len(keys) - WATCHED + 1).bool(), float("-inf"))
    powers = (scores - scores.amax(1, keepdim=True)).exp()
    return (_naive_product(powers.T, values) / from_the_left(powers.T)[:, None])[:, None]


def _attention(size: float) -> RealSize:
    name, scaling = f"{KEYS:,} keys, scores of {size}", 32**-0.5
    draw = Draw(f"attention: {name}")
    tensors = {name: draw.normal(KEYS, 1, 32, size=size if name in "qk" else 1.0) for name in ("q", "k", "v", "d_y")}

    def by_hand(t: Tensors) -> ByHand:
        y, saved = attention_forward(t["q"], t["k"], t["v"], (Run(0, 1, KEYS),), scaling)
        return ByHand(y, _by_input(attention_backward(t["d_y"], saved)))

    def usual(t: Tensors) -> Tensor:
        q, k, v = (t[name].transpose(0, 1)[None] for name in "qkv")
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)[0].transpose(0, 1)

    naive = ("y", lambda t: _naive_attention(t["q"], t["k"], t["v"], scaling))
    return RealSize("attention", name, tensors, by_hand, usual, naive, {"y": LAST, "q": LAST, "k": FIRST, "v": FIRST})


def _attention_blocks(size: float) -> RealSize:
    name, scaling = f"{KEYS:,} keys, scores of {size}", 32**-0.5
    draw = Draw(f"attention_blocks: {name}")
    tensors = {name: draw.normal(KEYS, 1, 32, size=size if name == "k" else 1.0) for name in ("k", "v")}
    tensors |= {"q": draw.normal(WATCHED, 1, 32, size=size), "d_y": draw.normal(WATCHED, 1, 32)}

    def by_hand(t: Tensors) -> ByHand:
        y, saved = attention_blocks_forward(t["q"][None], t["k"][None], t["v"][None], scaling)
        grads = _by_input(attention_blocks_backward(t["d_y"][None], saved))
        return ByHand(y[0], {name: gradient[0] for name, gradient in grads.items()})

    def usual(t: Tensors) -> Tensor:
        q, k, v = (t[name].transpose(0, 1)[None] for name in "qkv")
        hidden = torch.ones(WATCHED, KEYS).triu_(KEYS - WATCHED + 1).bool()
        mask = torch.zeros(WATCHED, KEYS, dtype=t["q"].dtype).masked_fill_(hidden, float("-inf"))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)[0].transpose(0, 1)

    naive = ("y", lambda t: _naive_attention(t["q"], t["k"], t["v"], scaling))
    return RealSize("attention_blocks", name, tensors, by_hand, usual, naive, loops=False)


def _rms_norm(name: str, rows: int, columns: int) -> RealSize:
    draw = Draw(f"rms_norm: {name}")
    tensors = {"x": draw.normal(rows, columns), "weight": draw.normal(columns), "d_y": draw.normal(rows, columns)}
    eps = 1e-6

    def by_hand(t: Tensors) -> ByHand:
        y, saved = rms_norm_forward(t["x"], t["weight"], eps)
        return ByHand(y, _by_input(rms_norm_backward(t["d_y"], saved, weight_gradient=True)))

    def usual(t: Tensors) -> Tensor:
        wide = t["x"].to(torch.promote_types(t["x"].dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (t["weight"].to(wide.dtype) * normed).to(t["x"].dtype)

    def x_hat(t: Tensors) -> Tensor:
        return t["x"] * torch.rsqrt(from_the_left(t["x"].square().T) / columns + eps)[:, None]

    def naive_y(t: Tensors) -> Tensor:
        return t["weight"] * x_hat(t)

    def naive_weight(t: Tensors) -> Tensor:
        return from_the_left(t["d_y"] * x_hat(t))

    naive = ("y", naive_y) if columns > rows else ("weight", naive_weight)
    return RealSize("rms_norm", f"{name}: {rows:,} of {columns:,}", tensors, by_hand, usual, naive)


def _few_rows() -> RealSize:
    draw = Draw("frozen_linear: one row")
    tensors = {"x": draw.normal(1, HIDDEN), "weight": draw.normal(WATCHED, HIDDEN), "d_y": draw.normal(1, WATCHED)}
    return RealSize(
        *("frozen_linear", f"one row of {HIDDEN:,}", tensors),
        lambda t: ByHand(frozen_linear(t["x"], t["weight"]), {}),
        lambda t: t["x"] @ t["weight"].T,
        ("y", lambda t: _naive_product(t["x"].T, t["weight"].T)),
    )


def _member(column: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Member:
    return Member(column, lora_A, lora_B, scaling, torch.zeros_like(lora_A), torch.zeros_like(lora_B))


def _lora_group(name: str, rows: int, columns: int, outputs: int) -> RealSize:
    draw = Draw(f"lora_group: {name}")
    tensors = {
        "x": draw.normal(rows, columns),
        "weight": draw.normal(outputs, columns, size=columns**-0.5),
        "lora_A": draw.normal(RANK, columns, size=columns**-0.5),
        "lora_B": draw.normal(outputs, RANK, size=0.1),
        "d_y": draw.normal(rows, outputs),
    }
    scaling = 0.7

    def by_hand(t: Tensors) -> ByHand:
        own = LoRAGroup((_member(0, t["lora_A"], t["lora_B"], scaling),))
        y, saved = lora_group_forward(t["x"], t["weight"], None, own)
        grads = lora_group_backward(t["d_y"], saved)
        assert grads.d_x is not None
        return ByHand(y, {"x": grads.d_x, "lora_A": grads.d_lora_A[0], "lora_B": grads.d_lora_B[0]})

    def usual(t: Tensors) -> Tensor:
        return t["x"] @ t["weight"].T + scaling * (t["x"] @ t["lora_A"].T) @ t["lora_B"].T

    def naive_y(t: Tensors) -> Tensor:
        h = _naive_product(t["x"].T, t["lora_A"].T)
        return _naive_product(t["x"].T, t["weight"].T) + scaling * h @ t["lora_B"].T

    def naive_lora_B(t: Tensors) -> Tensor:
        return scaling * _naive_product(t["d_y"], t["x"] @ t["lora_A"].T)

    naive = ("y", naive_y) if columns > rows else ("lora_B", naive_lora_B)
    return RealSize("lora_group", f"{name}: {rows:,} of {columns:,}, rank {RANK}", tensors, by_hand, usual, naive)


def _adapted_glu() -> RealSize:
    draw, n, rank = Draw("adapted_glu: many positions"), 24, 8
    tensors = {"gate_up": draw.normal(POSITIONS, 2 * n), "h": draw.normal(POSITIONS, 2 * rank, size=0.3)}
    tensors |= {name: draw.normal(n, rank, size=0.3) for name in ("gate_B", "up_B")}
    tensors["d_y"] = draw.normal(POSITIONS, n)

    def by_hand(t: Tensors) -> ByHand:
        outside = t["h"].new_zeros(rank, 1)  # A of what is in front: h is given
        front = LoRAGroup((_member(0, outside, t["gate_B"], 0.7), _member(n, outside, t["up_B"], 1.3)))
        (y, _), saved = adapted_glu_forward(t["gate_up"], "silu", front, t["h"])
        grads = adapted_glu_backward(t["d_y"].clone(), saved)
        gate_B, up_B = grads.d_lora_B
        return ByHand(y, {"gate_up": grads.d_gate_up, "h": grads.d_h, "gate_B": gate_B, "up_B": up_B})

    def halves(t: Tensors) -> tuple[Tensor, Tensor]:
        (gate, up), (h_gate, h_up) = t["gate_up"].chunk(2, 1), t["h"].chunk(2, 1)
        return gate + 0.7 * h_gate @ t["gate_B"].T, up + 1.3 * h_up @ t["up_B"].T

    def usual(t: Tensors) -> Tensor:
        gate, up = halves(t)
        return functional.silu(gate) * up

    def naive(t: Tensors) -> Tensor:
        return 1.3 * _naive_product(t["d_y"] * functional.silu(halves(t)[0]), t["h"].chunk(2, 1)[1])

    return RealSize("adapted_glu", f"{POSITIONS:,} positions", tensors, by_hand, usual, ("up_B", naive))


def _gated_delta_rule() -> RealSize:
    """Hardly anything is forgotten, so that the state adds up all tokens."""
    draw, tokens, width = Draw("gated_delta_rule: a long document"), 4_096, 32
    tensors = {
        "q": draw.normal(tokens, 1, width, size=0.7),
        "k": draw.normal(tokens, 1, width, size=width**-0.5),
        "v": draw.normal(tokens, 1, width),
        "decay": -1e-4 * draw.normal(tokens, 1).abs(),
        "beta": torch.sigmoid(draw.normal(tokens, 1)),
        "d_y": draw.normal(tokens, 1, width),
    }
    inputs, runs = ("q", "k", "v", "decay", "beta"), (Run(0, 1, tokens),)

    def by_hand(t: Tensors) -> ByHand:
        q, k, v, decay, beta = (t[name] for name in inputs)
        y, saved = gated_delta_rule_forward(q, k, v, decay, beta, runs)
        return ByHand(y, dict(zip(inputs, gated_delta_rule_backward(t["d_y"], saved), strict=True)))

    def usual(t: Tensors) -> Tensor:
        """As the reference, of one head, in time that grows with the tokens, not with their square."""
        wide = torch.promote_types(t["v"].dtype, torch.float32)
        state, outputs = torch.zeros(width, width, dtype=wide), []
        for q, k, v, decay, beta in zip(*(t[name][:, 0].to(wide).unbind() for name in inputs), strict=True):
            state = state * decay.exp()
            state = state + torch.outer(k, beta * (v - k @ state))
            outputs.append(q @ state)
        return torch.stack(outputs)[:, None].to(t["v"].dtype)

    return RealSize("gated_delta_rule", f"{tokens:,} tokens of one document", tensors, by_hand, usual, None)


def _tokens(draw: Draw, hidden: int) -> tuple[Tensor, Tensor]:
    """Positions that hold few different tokens, and a gradient of each."""
    return draw.integers(5, POSITIONS), draw.normal(POSITIONS, hidden) + 1


def _embedding() -> RealSize:
    draw = Draw("embedding: many positions")
    ids, d_y = _tokens(draw, 16)

    def by_hand(t: Tensors) -> ByHand:
        y, saved = embedding_forward(ids, t["weight"])
        return ByHand(y, {"weight": embedding_backward(t["d_y"], saved).d_weight})

    def naive(t: Tensors) -> Tensor:
        return torch.stack([from_the_left(t["d_y"][ids == token]) for token in range(5)])

    tensors = {"weight": draw.normal(5, 16), "d_y": d_y}
    usual = partial(_looked_up, ids)
    return RealSize("embedding", f"{POSITIONS:,} positions", tensors, by_hand, usual, ("weight", naive), loops=False)


def _looked_up(ids: Tensor, t: Tensors) -> Tensor:
    """By a product with one-hot rows, whose gradient torch does not add up one position behind the other."""
    return functional.one_hot(ids).to(t["weight"].dtype) @ t["weight"]


def _lora_embedding() -> RealSize:
    draw = Draw("lora_embedding: many positions")
    ids, d_y = _tokens(draw, 16)
    tensors = {"lora_A": draw.normal(8, 5), "lora_B": draw.normal(16, 8), "d_y": d_y}
    weight = torch.zeros(5, 16)

    def by_hand(t: Tensors) -> ByHand:
        y, saved = lora_embedding_forward(ids, weight.to(t["d_y"].dtype), t["lora_A"], t["lora_B"], 0.7)
        return ByHand(y, _by_input(lora_embedding_backward(t["d_y"], saved)))

    def usual(t: Tensors) -> Tensor:
        return 0.7 * (_looked_up(ids, {"weight": t["lora_A"].T}) @ t["lora_B"].T)

    def naive(t: Tensors) -> Tensor:
        d_h = 0.7 * t["d_y"] @ t["lora_B"]
        return torch.stack([from_the_left(d_h[ids == token]) for token in range(5)]).T

    return RealSize(
        "lora_embedding", f"{POSITIONS:,} positions", tensors, by_hand, usual, ("lora_A", naive), loops=False
    )


def _lora_bias() -> RealSize:
    draw = Draw("lora_bias: many positions")
    tensors = {"z": draw.normal(POSITIONS, 24), "bias": draw.normal(24), "d_y": draw.normal(POSITIONS, 24) + 1}

    def by_hand(t: Tensors) -> ByHand:
        y, saved = lora_bias_forward(t["z"], t["bias"], 0.7)
        return ByHand(y, {"bias": lora_bias_backward(t["d_y"], saved).d_lora_bias})

    def usual(t: Tensors) -> Tensor:
        return t["z"] + 0.7 * t["bias"]

    naive = ("bias", lambda t: 0.7 * from_the_left(t["d_y"]))
    return RealSize("lora_bias", f"{POSITIONS:,} positions", tensors, by_hand, usual, naive, loops=False)

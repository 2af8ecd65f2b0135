"""The cases of `real_sizes.py`: each op whose sums grow with a model or its rows, at the size of a real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.delta_steps import CHUNK_TOKENS
from backhand.ops.dora import dora_norm
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward
from backhand.verify.case import Backward, ByHand, Case, Draw, Tensors
from backhand.verify.cases import (
    adapted_glu,
    attention,
    attention_blocks,
    cross_entropy,
    dora,
    embedding,
    expert_linear,
    frozen_matrix,
    gated_delta_rule,
    linear_cross_entropy,
    lora_bias,
    lora_embedding,
    lora_group,
    rms_norm,
)
from backhand.verify.real_sizes import RealSize, from_the_left, naive_product
from backhand.verify.scaffold import SCALING

KEYS, HIDDEN, POSITIONS, RANK = 8_192, 8_192, 32_768, 256
VOCABULARIES = (151_936, 262_144)
SCORES_SCALING = 32**-0.5
WATCHED = 64
"""Of attention: the last queries, which see all keys, and the first keys, which all queries see."""

LAST, FIRST = slice(-WATCHED, None), slice(WATCHED)


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
    yield _expert_linear()
    yield _dora()
    yield _dora_norm()
    # Hardly anything is forgotten, so that the state adds up all tokens.
    rule, name = gated_delta_rule.OP, "4,096 tokens of one document"
    yield RealSize(rule, rule.case(name, (4_096,), 1, 1, 32, 32, forgetting=1e-4, chunk=CHUNK_TOKENS), None)
    yield _embedding()
    yield _lora_embedding()
    yield _lora_bias()


def _scaled(case: Case, **by: float) -> Case:
    """The case with some inputs made smaller, by the first part of their names."""
    sized = {name: tensor * by.get(name.partition(" ")[0], 1.0) for name, tensor in case.tensors.items()}
    return replace(case, tensors=sized)


def _pushed(case: Case) -> Case:
    """The case with a gradient that has a mean."""
    return replace(case, tensors=case.tensors | {"d_y": case.tensors["d_y"] + 1})


def _logits(draw: Draw, vocab: int, peaked: bool) -> tuple[Tensor, Tensor]:
    """(8, vocab) and targets: flat about 0, or with a peak, which half of the targets are."""
    logits, targets = draw.normal(8, vocab, size=1.5), draw.integers(vocab, 8)
    peaks = torch.where(torch.arange(8) < 4, targets, (targets + 1) % vocab)
    return (logits.scatter_add(1, peaks[:, None], torch.full((8, 1), 17.0).double()) if peaked else logits), targets


def _naive_losses(logits: Tensor, targets: Tensor) -> Tensor:
    z = logits.float()
    most = z.amax(1)
    return from_the_left((z - most[:, None]).exp().T).log() + most - z.gather(1, targets[:, None])[:, 0]


def _cross_entropy(vocab: int, peaked: bool) -> RealSize:
    op, name = cross_entropy.OP, f"{vocab:,} words, {'peaked' if peaked else 'flat'}"
    case = op.case(name, 8, vocab)
    logits, targets = _logits(Draw(f"cross_entropy: {name}"), vocab, peaked)
    case = replace(case, tensors=case.tensors | {"logits": logits, "targets": targets})
    naive = ("y", lambda t: _naive_losses(t["logits"], t["targets"]))
    return RealSize(op, case, naive, loops=False, exact=True)


def _linear_cross_entropy(vocab: int, peaked: bool) -> RealSize:
    """Rows of x are those of the identity, so that the logits are the weight's numbers, and alike for everyone."""
    op, name = linear_cross_entropy.OP, f"{vocab:,} words, {'peaked' if peaked else 'flat'}"
    logits, targets = _logits(Draw(f"linear_cross_entropy: {name}"), vocab, peaked)
    tensors = {"x": torch.eye(8).double(), "weight": logits.T.contiguous(), "labels": targets}

    def by_hand(t: Tensors, _backward: Backward) -> ByHand:
        losses, grads = linear_cross_entropy_backward(t["x"], t["weight"], t["labels"])
        return ByHand(losses, {"x": grads.d_x})

    case = replace(op.case(name, 8, 8, 1, multiplier=1.0), by_hand=by_hand)
    case = replace(case, tensors=case.tensors | tensors)
    return RealSize(op, case, ("y", lambda t: _naive_losses(t["weight"].T, t["labels"])), exact=True)


def _naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of the last queries, (queries, heads, head_dim), of one head."""
    queries, keys, values = q[LAST, 0].float(), k[:, 0].float(), v[:, 0].float()
    scores = SCORES_SCALING * queries @ keys.T
    scores.masked_fill_(torch.ones_like(scores).triu_(len(keys) - WATCHED + 1).bool(), float("-inf"))
    powers = (scores - scores.amax(1, keepdim=True)).exp()
    return (naive_product(powers.T, values) / from_the_left(powers.T)[:, None])[:, None]


def _attention(size: float) -> RealSize:
    op = attention.OP
    case = op.case(
        f"{KEYS:,} keys, scores of {size}", (KEYS,), heads=1, kv_heads=1, head_dim=32, size=size, scaling=SCORES_SCALING
    )
    assert case.usual is not None
    case = replace(case, reference=case.usual)  # the reference's whole matrices of scores would be gigabytes
    naive = ("y", lambda t: _naive_attention(t["q"], t["k"], t["v"]))
    return RealSize(op, case, naive, {"y": LAST, "q": LAST, "k": FIRST, "v": FIRST})


def _attention_blocks(size: float) -> RealSize:
    op = attention_blocks.OP
    case = op.case(f"{KEYS:,} keys, scores of {size}", 1, KEYS, 1, 1, 32, WATCHED, size=size, scaling=SCORES_SCALING)
    naive = ("y", lambda t: _naive_attention(t["q"][0], t["k"][0], t["v"][0])[None])
    return RealSize(op, case, naive, loops=False)


def _rms_norm(name: str, rows: int, columns: int) -> RealSize:
    op, eps = rms_norm.OP, 1e-6

    def x_hat(t: Tensors) -> Tensor:
        return t["x"] * torch.rsqrt(from_the_left(t["x"].square().T) / columns + eps)[:, None]

    def naive_y(t: Tensors) -> Tensor:
        return t["weight"] * x_hat(t)

    def naive_weight(t: Tensors) -> Tensor:
        return from_the_left(t["d_y"] * x_hat(t))

    naive = ("y", naive_y) if columns > rows else ("weight", naive_weight)
    return RealSize(op, op.case(f"{name}: {rows:,} of {columns:,}", (rows,), columns, eps), naive)


def _few_rows() -> RealSize:
    op = frozen_matrix.OP
    case = op.case(f"one row of {HIDDEN:,}", (1,), HIDDEN, [("dense", WATCHED)], tile_bytes=None)
    return RealSize(op, case, ("y", lambda t: naive_product(t["x"].T, t["dense"].T)))


def _lora_group(name: str, rows: int, columns: int, outputs: int) -> RealSize:
    op, scaling = lora_group.OP, lora_group.SCALINGS[0]
    case = op.case(f"{name}: {rows:,} of {columns:,}, rank {RANK}", (rows,), (outputs,), (RANK,), columns)
    case = _scaled(case, weight=columns**-0.5, lora_A=columns**-0.5, lora_B=0.1)

    def naive_y(t: Tensors) -> Tensor:
        h = naive_product(t["x"].T, t["lora_A 0"].T)
        return naive_product(t["x"].T, t["weight"].T) + scaling * h @ t["lora_B 0"].T

    def naive_lora_B(t: Tensors) -> Tensor:
        return scaling * naive_product(t["d_y"], t["x"] @ t["lora_A 0"].T)

    return RealSize(op, case, ("y", naive_y) if columns > rows else ("lora_B 0", naive_lora_B))


def _adapted_glu() -> RealSize:
    op, n, rank = adapted_glu.OP, 24, 8
    case = _scaled(op.case(f"{POSITIONS:,} positions", "silu", (POSITIONS,), n, (rank, rank, 0)), h=0.3)
    (gate, *_), (up, *_) = adapted_glu.sides(n, (rank, rank, 0), 0)

    def naive(t: Tensors) -> Tensor:
        h_gate, h_up = t["h"].chunk(2, 1)
        a = t["gate_up"][:, :n] + gate * h_gate @ t["lora_B 0"].T
        return up * naive_product(t["d_y"] * functional.silu(a), h_up)

    return RealSize(op, case, ("lora_B 1", naive))


def _expert_linear() -> RealSize:
    """One expert has a single position, the other all the rest."""
    op, columns, counts = expert_linear.OP, 24, (1, POSITIONS - 1)
    case = op.case(f"{POSITIONS:,} positions", counts, columns, 16, 8)
    case = _scaled(case, weights=columns**-0.5, lora_A=columns**-0.5, lora_B=0.3)

    def naive(t: Tensors) -> Tensor:
        h = [x @ lora_A.T for x, lora_A in zip(t["x"].split(counts), t["lora_A"], strict=True)]
        return torch.stack([SCALING * naive_product(g, own) for g, own in zip(t["d_y"].split(counts), h, strict=True)])

    return RealSize(op, case, ("lora_B", naive))


def _dora() -> RealSize:
    case = dora.OP.case(f"{POSITIONS:,} positions", (POSITIONS, 24))
    naive = ("magnitude", lambda t: from_the_left(t["d_y"] * t["z"]) / t["norm"].float())
    return RealSize(dora.OP, case, naive, loops=False)


def _dora_norm() -> RealSize:
    """The lengths of long rows, from their squares and the factors' small products."""
    draw = Draw("dora: wide rows")
    tensors = {"weight": draw.normal(WATCHED, HIDDEN), "lora_A": draw.normal(8, HIDDEN, size=HIDDEN**-0.5)}
    tensors |= {"lora_B": draw.normal(WATCHED, 8), "d_y": draw.normal(WATCHED)}

    def by_hand(t: Tensors, _backward: Backward) -> ByHand:
        return ByHand(dora_norm(t["weight"], t["lora_A"], t["lora_B"], SCALING), {})

    def usual(t: Tensors) -> Tensor:
        wide = torch.promote_types(t["weight"].dtype, torch.float32)
        return (t["weight"].to(wide) + SCALING * t["lora_B"].to(wide) @ t["lora_A"].to(wide)).square().sum(1).sqrt()

    def naive(t: Tensors) -> Tensor:
        return from_the_left((t["weight"] + SCALING * t["lora_B"] @ t["lora_A"]).T.square()).sqrt()

    return RealSize(dora.OP, Case(f"rows of {HIDDEN:,}", tensors, by_hand, usual), ("y", naive), loops=False)


def _embedding() -> RealSize:
    """The yardstick is the reference: embedding's own gradient in torch adds up one position behind the other."""
    op = embedding.OP
    case = replace(_pushed(op.case(f"{POSITIONS:,} positions", (POSITIONS,), 5, 16)), usual=None)

    def naive(t: Tensors) -> Tensor:
        return torch.stack([from_the_left(t["d_y"][t["ids"] == token]) for token in range(5)])

    return RealSize(op, case, ("weight", naive), loops=False)


def _lora_embedding() -> RealSize:
    op = lora_embedding.OP
    case = replace(_pushed(op.case(f"{POSITIONS:,} positions", (POSITIONS,), 5, 16, 8)), usual=None)

    def naive(t: Tensors) -> Tensor:
        d_h = SCALING * t["d_y"] @ t["lora_B"]
        return torch.stack([from_the_left(d_h[t["ids"] == token]) for token in range(5)]).T

    return RealSize(op, case, ("lora_A", naive), loops=False)


def _lora_bias() -> RealSize:
    op = lora_bias.OP
    case = _pushed(op.case(f"{POSITIONS:,} positions", (POSITIONS, 24)))
    return RealSize(op, case, ("lora_bias", lambda t: SCALING * from_the_left(t["d_y"])), loops=False)

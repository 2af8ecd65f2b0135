"""Prove that rounding errors of long sums do not grow with their length: vocabularies, keys, wide layers, documents.

The cases of `cases/` prove formulas at sizes where the order of a sum does not matter. Here the same ops run at the
sizes of real models, in every form that this processor supports, in float32 and bfloat16. Results are compared with
float64 on the same rounded inputs. The error may be at most twice that of torch's usual form, or half a unit of
rounding of the result's dtype. In each case one sequential sum replaces the right one. It must be rejected, since
otherwise the case could not detect such a sum.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backhand.errors import not_none
from backhand.kernels.builds import load, usable, using
from backhand.ops.chunk_steps import CHUNK_TOKENS
from backhand.ops.dora import dora_norm
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward
from backhand.ops.linear_divergence import (
    DIVERGENCES,
    Divergence,
    DivergenceKind,
    linear_divergence_backward,
)
from backhand.verify.cases.adapted_glu import sides
from backhand.verify.cases.lora_group import SCALINGS
from backhand.verify.measure import relative_error
from backhand.verify.mutants import Backward
from backhand.verify.report import TORCH, Result
from backhand.verify.runner import TIMES_AUTOGRAD, Trial, cast, dtype_name
from backhand.verify.scaffold import SCALING, Case, Draw, Manual, Op, Tensors

KEYS, HIDDEN, POSITIONS, RANK = 8_192, 8_192, 32_768, 256
VOCABULARIES = (151_936, 262_144)
SCORES_SCALING = 32**-0.5
WATCHED = 64
"""Rows that attention's cases compare: the last queries see all keys, and the first keys are seen by all queries."""

LAST, FIRST = slice(-WATCHED, None), slice(WATCHED)
Naive = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class RealSize:
    """One op at one real size."""

    op: Op
    # Inputs and functions. The reference in float64 is the truth, and the baseline in the same dtype the yardstick.
    case: Case
    # Name of y or a gradient, and its value by sequential sums in float32. None for a recurrence, which has only one
    # order, and where torch's form errs by as much.
    naive: tuple[str, Naive] | None
    # Name of y or a gradient → the rows to compare. All rows of other tensors are compared.
    picked: Mapping[str, slice] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    exact: bool = False  # the bound of y is half a unit of rounding, whatever torch's error is


def _in_build(name: str) -> AbstractContextManager[None]:
    return using(None if name == TORCH else load(name))


def prove_real_size(size: RealSize) -> Iterator[Result]:
    """Prove each tensor of a case in each form and dtype, and that the sequential sum is rejected."""
    for dtype in size.dtypes:
        yield from rows_in(size, dtype)


def rows_in(size: RealSize, dtype: torch.dtype) -> Iterator[Result]:
    """Prove a case in one dtype, in torch's form and in each build of the kernels that this processor supports."""
    op, case, rounded = size.op, size.case, cast(size.case.tensors, dtype)
    trial, results = Trial(op.proof((case,), ()), case, rounded), {}
    for build in (TORCH, *usable()) if op.compiled else (TORCH,):
        with _in_build(build):
            results[build] = trial.manual_results(rounded)
    truth = trial.autograd_results(case.reference, cast(rounded, torch.float64), results[TORCH], "truth")
    baseline = trial.autograd_results(case.baseline or case.reference, rounded, results[TORCH], "baseline")

    def error(name: str, measured: Tensor) -> float:
        part = size.picked.get(name, slice(None))
        return relative_error(measured[part], truth[name][part])

    def bound(name: str) -> float:
        half = torch.finfo(baseline[name].dtype).eps / 2
        return half if size.exact and name == "y" else max(half, TIMES_AUTOGRAD * error(name, baseline[name]))

    row = partial(Result, op.name, case.name, dtype=dtype_name(dtype))
    for build, tensors in results.items():
        yield from (row(name, error(name, measured), bound(name), form=build) for name, measured in tensors.items())
    if dtype == torch.float32 and size.naive is not None:
        name, naive = size.naive
        spoiled = results[TORCH][name].clone()
        spoiled[size.picked.get(name, slice(None))] = naive(rounded).to(spoiled.dtype)
        yield row(name, error(name, spoiled), bound(name), mutant="naive sum")


def from_the_left(terms: Tensor) -> Tensor:
    """Sum over the first axis in float32, one number after the other."""
    return torch.from_numpy(np.add.accumulate(terms.float().numpy(), axis=0)[-1].copy())


def _naive_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply left (n, k) transposed by right (n, m) with sequential sums."""
    return torch.stack([from_the_left(column[:, None] * right) for column in left.T])


# ---------------------------------------------------------------------------------------------------------------------
# The cases, one at a time, since they are large.


def real_sizes() -> Iterator[RealSize]:
    """Iterate over the cases, one at a time, since they are large."""
    for vocab in VOCABULARIES:
        for peaked in (False, True):
            yield from _losses(vocab, f"{vocab:,} words, {'peaked' if peaked else 'flat'}", peaked)
        for kind in DIVERGENCES:
            yield _divergence(vocab, kind)
    yield _attention(0.3)
    yield _attention_blocks(0.3)
    # In bfloat16 the scores are rounded before the softmax, larger scores by more, whatever the number of keys.
    yield replace(_attention_blocks(2.0), dtypes=(torch.float32,))
    yield _rms_norm("wide", WATCHED, HIDDEN)
    yield _rms_norm("many positions", POSITIONS, 24)
    yield _few_rows()
    yield _lora_group("wide", 16, HIDDEN, 40)
    yield _lora_group("many positions", POSITIONS, 24, 40)
    yield _adapted_glu()
    yield _expert_linear()
    many, op = f"{POSITIONS:,} positions", _op("dora")
    case = op.case(many, (POSITIONS, 24))
    yield RealSize(op, case, ("d_magnitude", lambda t: from_the_left(t["d_y"] * t["z"]) / t["norm"]))
    yield _dora_norm()
    # Little is forgotten, so that the state is a sum over all tokens.
    name, op = "4,096 tokens of one document", _op("gated_delta_rule")
    yield RealSize(op, op.case(name, (4_096,), 1, 1, 32, 32, forgetting=1e-4, chunk=CHUNK_TOKENS), None)
    op = _op("ssd")
    yield RealSize(op, op.case(name, (4_096,), 1, 2, 32, 32, step=1e-4, chunk=CHUNK_TOKENS), None)
    yield from _embeddings(many)
    op = _op("lora_bias")
    case = _pushed(op.case(many, (POSITIONS, 24)))
    yield RealSize(op, case, ("d_lora_bias", lambda t: SCALING * from_the_left(t["d_y"])))


def _op(file: str) -> Op:
    """Return the op that a file of cases declares."""
    op: Op = importlib.import_module(f"backhand.verify.cases.{file}").OP
    return op


def _with(case: Case, **tensors: Tensor) -> Case:
    """Return the case with other inputs."""
    return replace(case, tensors=case.tensors | tensors)


def _scaled(case: Case, **by: float) -> Case:
    """Return the case with some inputs scaled, chosen by the first part of their names."""
    return _with(case, **{name: tensor * by.get(name.partition(" ")[0], 1.0) for name, tensor in case.tensors.items()})


def _pushed(case: Case) -> Case:
    """Return the case with an upstream gradient whose mean is not zero."""
    return _with(case, d_y=case.tensors["d_y"] + 1)


def _losses(vocab: int, name: str, peaked: bool) -> Iterator[RealSize]:
    """Iterate over both ops of cross-entropy. For the fused op x is the identity, so that the logits are the weight."""

    def logits(op: Op) -> tuple[Tensor, Tensor]:
        """Return logits (8, vocab) and targets. They are flat, or have a peak at the target in half of the rows."""
        draw = Draw(f"{op.name}: {name}")
        logits, targets = draw.normal(8, vocab, size=1.5), draw.integers(vocab, 8)
        peaks = torch.where(torch.arange(8) < 4, targets, (targets + 1) % vocab)
        return logits.scatter_add(1, peaks[:, None], torch.full((8, 1), 17.0 * peaked).double()), targets

    def naive(logits: Tensor, targets: Tensor) -> Tensor:
        z = logits.float()
        most = z.amax(1)
        return from_the_left((z - most[:, None]).exp().T).log() + most - z.gather(1, targets[:, None])[:, 0]

    op = _op("cross_entropy")
    z, targets = logits(op)
    case = _with(op.case(name, 8, vocab), logits=z, targets=targets)
    yield RealSize(op, case, ("y", lambda t: naive(t["logits"], t["targets"])), exact=True)

    def run_manual(t: Tensors, _backward: Backward) -> Manual:
        losses, grads = linear_cross_entropy_backward(t["x"], t["weight"], t["labels"])
        return Manual(losses, {"x": grads.d_x})

    op = _op("linear_cross_entropy")
    z, targets = logits(op)
    case = replace(op.case(name, 8, 8, 1, multiplier=1.0), run_manual=run_manual)
    case = _with(case, x=torch.eye(8).double(), weight=z.T.contiguous(), labels=targets)
    yield RealSize(op, case, ("y", lambda t: naive(t["weight"].T, t["labels"])), exact=True)


def _divergence(vocab: int, kind: DivergenceKind) -> RealSize:
    """Return the case of distillation: half of the rows have a peak, and the teacher is near. x is the identity."""
    op, rows = _op("linear_divergence"), 8
    name, form = f"{vocab:,} words, {kind}", Divergence(kind, 0.3)
    draw = Draw(f"{op.name}: {name}")
    peak = draw.integers(vocab, rows)
    z = draw.normal(rows, vocab, size=1.5).scatter_add(
        1, peak[:, None], 17.0 * (torch.arange(rows) % 2)[:, None].double()
    )
    teacher = z + draw.normal(rows, vocab, size=0.5)

    def run_manual(t: Tensors, _backward: Backward) -> Manual:
        losses, grads = linear_divergence_backward(t["x"], t["weight"], t["teacher"], divergence=form)
        return Manual(losses, {"x": grads.d_x})

    # The first rows of the weight are the student's logits, the others the teacher's.
    eye = torch.eye(2 * rows).double()
    case = replace(op.case(name, rows, 2 * rows, 1, multiplier=1.0, divergence=form), run_manual=run_manual)
    case = _with(case, x=eye[:rows], teacher=eye[rows:], weight=torch.cat((z, teacher)).T.contiguous())
    return RealSize(op, case, None)


def _naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention's output for the last queries of one head, (queries, heads, head_dim)."""
    queries, keys, values = q[LAST, 0].float(), k[:, 0].float(), v[:, 0].float()
    scores = SCORES_SCALING * queries @ keys.T
    scores.masked_fill_(torch.ones_like(scores).triu_(len(keys) - WATCHED + 1).bool(), float("-inf"))
    powers = (scores - scores.amax(1, keepdim=True)).exp()
    return (_naive_product(powers.T, values) / from_the_left(powers.T)[:, None])[:, None]


def _attention(size: float) -> RealSize:
    op, name = _op("attention"), f"{KEYS:,} keys, scores of {size}"
    case = op.case(name, (KEYS,), heads=1, kv_heads=1, head_dim=32, size=size, scaling=SCORES_SCALING)
    case = replace(
        case, reference=not_none(case.baseline)
    )  # the reference's whole matrices of scores would be gigabytes
    naive = ("y", lambda t: _naive_attention(t["q"], t["k"], t["v"]))
    return RealSize(op, case, naive, {"y": LAST, "d_q": LAST, "d_k": FIRST, "d_v": FIRST})


def _attention_blocks(size: float) -> RealSize:
    op, name = _op("attention_blocks"), f"{KEYS:,} keys, scores of {size}"
    case = op.case(name, 1, KEYS, 1, 1, 32, WATCHED, size=size, scaling=SCORES_SCALING)
    return RealSize(op, case, ("y", lambda t: _naive_attention(t["q"][0], t["k"][0], t["v"][0])[None]))


def _rms_norm(name: str, rows: int, columns: int) -> RealSize:
    op, eps = _op("rms_norm"), 1e-6

    def x_hat(t: Tensors) -> Tensor:
        return t["x"] * torch.rsqrt(from_the_left(t["x"].square().T) / columns + eps)[:, None]

    naive: tuple[str, Naive] = ("d_weight", lambda t: from_the_left(t["d_y"] * x_hat(t)))
    if columns > rows:
        naive = ("y", lambda t: t["weight"] * x_hat(t))
    return RealSize(op, op.case(f"{name}: {rows:,} of {columns:,}", (rows,), columns, eps), naive)


def _few_rows() -> RealSize:
    op = _op("frozen_matrix")
    case = op.case(f"one row of {HIDDEN:,}", (1,), HIDDEN, [("dense", WATCHED)], tile_bytes=None)
    # With terms of one sign the rounding error grows with a sequential sum.
    case = replace(case, tensors={name: tensor.abs() for name, tensor in case.tensors.items()})
    return RealSize(op, case, ("y", lambda t: _naive_product(t["x"].T, t["dense"].T)))


def _lora_group(name: str, rows: int, columns: int, outputs: int) -> RealSize:
    op, scaling = _op("lora_group"), SCALINGS[0]
    case = op.case(f"{name}: {rows:,} of {columns:,}, rank {RANK}", (rows,), (outputs,), (RANK,), columns)
    case = _scaled(case, weight=columns**-0.5, lora_A=columns**-0.5, lora_B=0.1)

    def naive_y(t: Tensors) -> Tensor:
        h = _naive_product(t["x"].T, t["lora_A 0"].T)
        return _naive_product(t["x"].T, t["weight"].T) + scaling * h @ t["lora_B 0"].T

    def naive_lora_B(t: Tensors) -> Tensor:
        return scaling * _naive_product(t["d_y"], t["x"] @ t["lora_A 0"].T)

    return RealSize(op, case, ("y", naive_y) if columns > rows else ("d_lora_B 0", naive_lora_B))


def _adapted_glu() -> RealSize:
    op, n, ranks = _op("adapted_glu"), 24, (8, 8, 0)
    case = _scaled(op.case(f"{POSITIONS:,} positions", "silu", (POSITIONS,), n, ranks), h=0.3)
    (gate, *_), (up, *_) = sides(n, ranks, 0)

    def naive(t: Tensors) -> Tensor:
        h_gate, h_up = t["h"].chunk(2, 1)
        a = t["gate_up"][:, :n] + gate * h_gate @ t["lora_B 0"].T
        return up * _naive_product(t["d_y"] * functional.silu(a), h_up)

    return RealSize(op, case, ("d_lora_B 1", naive))


def _expert_linear() -> RealSize:
    """Return the case in which one expert has a single position, and the other has all others."""
    op, counts = _op("expert_linear"), (1, POSITIONS - 1)
    case = op.case(f"{POSITIONS:,} positions", counts, 24, 16, 8)

    def naive(t: Tensors) -> Tensor:
        parts = zip(t["x"].split(counts), t["d_y"].split(counts), t["lora_A"], strict=True)
        return torch.stack([SCALING * _naive_product(g, x @ lora_A.T) for x, g, lora_A in parts])

    return RealSize(op, _scaled(case, weights=24**-0.5, lora_A=24**-0.5, lora_B=0.3), ("d_lora_B", naive))


def _dora_norm() -> RealSize:
    """Return the case for norms of long rows, computed from squares and the factors' small products."""
    op, draw, name = _op("dora"), Draw("dora: wide rows"), f"lengths of rows of {HIDDEN:,}"
    tensors = {"weight": draw.normal(WATCHED, HIDDEN), "lora_A": draw.normal(8, HIDDEN, size=HIDDEN**-0.5)}
    tensors |= {"lora_B": draw.normal(WATCHED, 8), "d_y": draw.normal(WATCHED)}

    def run_manual(t: Tensors, _backward: Backward) -> Manual:
        return Manual(dora_norm(t["weight"], t["lora_A"], t["lora_B"], SCALING), {})

    def squares(t: Tensors) -> Tensor:
        wide = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in t.items()}
        return (wide["weight"] + SCALING * wide["lora_B"] @ wide["lora_A"]).square()

    case = Case(name, tensors, run_manual, lambda t: squares(t).sum(1).sqrt())
    return RealSize(op, case, ("y", lambda t: from_the_left(squares(t).T).sqrt()))


def _embeddings(name: str) -> Iterator[RealSize]:
    """Iterate over embeddings. The reference is the yardstick, since torch's embedding gradient is a sequential sum."""

    def naive(d_rows: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([from_the_left(d_rows[ids == token]) for token in range(5)])

    op = _op("embedding")
    case = replace(_pushed(op.case(name, (POSITIONS,), 5, 16)), baseline=None)
    yield RealSize(op, case, ("d_weight", lambda t: naive(t["d_y"], t["ids"])))
    op = _op("lora_embedding")
    case = replace(_pushed(op.case(name, (POSITIONS,), 5, 16, 8)), baseline=None)
    yield RealSize(op, case, ("d_lora_A", lambda t: naive(SCALING * t["d_y"] @ t["lora_B"], t["ids"]).T))

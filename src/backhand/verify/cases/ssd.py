"""The state-space scan: cases, and mutants by autograd of a recurrence with a detached part."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.chunk_steps import CHUNK_TOKENS
from backhand.ops.document_groups import segments
from backhand.ops.ssd import SSDSaved
from backhand.verify.measure import autograd_gradients
from backhand.verify.mutants import Mutant, wrong
from backhand.verify.scaffold import PACKED, Axis, Op

INPUTS = ("x", "dt", "b", "c")
STATE_MISTAKES = (
    "state cut between chunks",
    "state held constant",
    "prefix's share missing",
    "share of one taken for that of all",
)
OP = Op(
    "ssd",
    dict(x="tokens heads width")
    | dict(dt=lambda draw, tokens, heads, step: step * draw.normal(tokens, heads).abs())
    | dict(b="0.7: tokens groups state_width", c="0.7: tokens groups state_width")
    | dict(log_rate="heads", skip="heads", d_y="tokens heads width"),
    dict(documents=Axis((4, 4, 9, 1, 2), None, (1,), ()), groups=2, group=3, state_width=5, width=7, parents=())
    | dict(step=0.4, chunk=3),
    derived={**PACKED, "heads": lambda groups, group: groups * group},
)

CASES = (
    *OP.standard_cases(),
    OP.case("one head per group", (6, 3), group=1),
    OP.case("one group", (6, 3), groups=1, group=4),
    OP.case("documents of one length", (8, 8, 8)),
    OP.case("longest document last", (2, 5, 11)),
    OP.case("one chunk", (9,), chunk=9),
    OP.case("chunks of one token", (5, 3), chunk=1),
    OP.case("the usual chunks", (2 * CHUNK_TOKENS + 3, 4), 1, 2, 3, 4, chunk=CHUNK_TOKENS),
    OP.case("shared prefix", (4, 5, 5, 1, 2), parents=(-1, 0, 0, 0, 0)),
    OP.case("shared prefix of several chunks", (7, 4, 7, 4), 1, 2, parents=(-1, 0, 0, 0)),
    OP.case("trees of several levels", (3, 4, 2, 5, 5, 1, 2, 6, 3), parents=(-1, -1, 1, 2, 2, 1, -1, 6, 6)),
    OP.case("chain of segments", (7, 4, 1, 5, 2), 1, 2, parents=(-1, 0, 1, 2, 0)),
    OP.case("several workers", (23, 11, 9, 18, 13), 3, 2, parents=(-1, 0, 0, -1, 3), chunk=8, threads=3),
    OP.case("long steps", (9, 4), step=6.0),
    OP.case("no steps", (9, 4), step=0.0),
    OP.case("empty documents between", (3, 0, 2)),
    OP.case("one-token documents", (1, 1, 1)),
)


def _recurrence(s: SSDSaved, inputs: dict[str, Tensor], mistake: str) -> Tensor:
    """Compute the scan token by token, with one dependence detached that a backward pass could forget."""
    group = s.x.shape[1] // s.b.shape[1]
    b, c = (inputs[name].repeat_interleave(group, dim=1) for name in ("b", "c"))
    x, dt = inputs["x"], inputs["dt"]
    documents = segments(s.runs)
    if mistake == "documents see each other":
        documents = [((0, x.shape[0]), [])]
    rate = torch.exp(s.log_rate)
    states = {-1: x.new_zeros(*b.shape[1:], x.shape[2])}  # last token of a segment → state after it
    continued: set[int] = set()
    outputs = [x[:0]]
    for (start, stop), before in documents:
        last = before[-1] if before else -1
        state = states[last]
        if mistake == "prefix's share missing" or (mistake.startswith("share of one") and last in continued):
            state = state.detach()
        continued.add(last)
        for t in range(start, stop):
            if mistake == "state held constant" or (
                mistake == "state cut between chunks" and (t - start) % s.chunk == 0
            ):
                state = state.detach()
            decayed = dt[t].detach() if mistake == "step of the decay held constant" else dt[t]
            added = dt[t].detach() if mistake == "step of the input held constant" else dt[t]
            passed = x[t].detach() if mistake == "skip held constant" else x[t]
            state = state * torch.exp(-rate * decayed)[:, None, None]
            state = state + torch.einsum("hn,hp->hnp", b[t], added[:, None] * x[t])
            outputs.append((torch.einsum("hnp,hn->hp", state, c[t]) + s.skip[:, None] * passed)[None])
        states[stop - 1] = state
    return torch.cat(outputs)


def _cut(mistake: str, *names: str) -> tuple[Mutant, ...]:
    """Return mutants with the gradients of the recurrence with a detached part, at the right values."""

    def value(g: Tensor, s: SSDSaved, gradient: str) -> Tensor:
        tensors = {"d_y": g, **{name: getattr(s, name) for name in INPUTS}}
        name = gradient.removeprefix("d_")
        return autograd_gradients(lambda t: _recurrence(s, t, mistake), tensors, (name,))[1][name]

    return wrong(mistake, " ".join(f"d_{name}" for name in names), value)


MUTANTS = (
    _cut("documents see each other", *INPUTS),
    *(_cut(mistake, *INPUTS[:3]) for mistake in STATE_MISTAKES),
    _cut("step of the decay held constant", "dt"),
    _cut("step of the input held constant", "dt"),
    _cut("skip held constant", "x"),
    wrong("mean over the heads of a group", "d_b d_c", lambda d, s: d * (s.b.shape[1] / s.x.shape[1])),
    wrong("of the next token", "d_dt d_c", lambda d: d.roll(1, 0)),
    OP.perturb("rate for its logarithm", "d_dt d_b", log_rate=lambda s: s.log_rate.exp()),
)

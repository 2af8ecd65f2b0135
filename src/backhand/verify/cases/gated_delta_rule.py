"""The gated delta rule: cases, and mutants by autograd of a recurrence with a detached part."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.chunk_steps import CHUNK_TOKENS
from backhand.ops.delta_chunks import GatedDeltaRuleSaved
from backhand.ops.document_groups import segments
from backhand.verify.measure import autograd_gradients
from backhand.verify.mutants import Mutant, wrong
from backhand.verify.scaffold import PACKED, Axis, Op

INPUTS = ("q", "k", "v", "decay", "beta")
STATE_MISTAKES = (
    "state cut between chunks",
    "state held constant",
    "correction held constant",
    "prefix's share missing",
    "share of one taken for that of all",
)
# Keys have a norm of about 1 and rates are in (0, 1), as in the models, so that the state stays bounded.
OP = Op(
    "gated_delta_rule",
    dict(q="0.7: tokens key_heads key_width")
    | dict(k=lambda draw, tokens, key_heads, key_width: draw.normal(tokens, key_heads, key_width, size=key_width**-0.5))
    | dict(v="tokens heads width")
    | dict(decay=lambda draw, tokens, heads, forgetting: -forgetting * draw.normal(tokens, heads).abs())
    | dict(beta=lambda draw, tokens, heads: torch.sigmoid(draw.normal(tokens, heads)))
    | dict(d_y="tokens heads width"),
    dict(documents=Axis((4, 4, 9, 1, 2), None, (1,), ()), key_heads=2, group=3, key_width=5, width=7, parents=())
    | dict(forgetting=0.3, chunk=3),
    derived={**PACKED, "heads": lambda key_heads, group: key_heads * group},
    compiled=True,
)

CASES = (
    *OP.standard_cases(),
    OP.case("one value head for each key head", (6, 3), group=1),
    OP.case("one key head", (6, 3), key_heads=1, group=2),
    OP.case("documents of one length", (8, 8, 8)),
    OP.case("longest document last", (2, 5, 11)),
    OP.case("one chunk", (9,), chunk=9),
    OP.case("chunks of one token", (5, 3), chunk=1),
    OP.case("the usual chunks", (CHUNK_TOKENS + 3, 4), key_heads=1, group=2, key_width=3, width=4, chunk=CHUNK_TOKENS),
    OP.case("shared prefix", (4, 5, 5, 1, 2), parents=(-1, 0, 0, 0, 0)),
    OP.case("shared prefix of several chunks", (7, 4, 7, 4), key_heads=1, group=2, parents=(-1, 0, 0, 0)),
    OP.case("trees of several levels", (3, 4, 2, 5, 5, 1, 2, 6, 3), parents=(-1, -1, 1, 2, 2, 1, -1, 6, 6)),
    OP.case("chain of segments", (7, 4, 1, 5, 2), key_heads=1, group=2, parents=(-1, 0, 1, 2, 0)),
    OP.case("some of the heads at a time", (7, 4, 7, 4), key_heads=5, group=2, parents=(-1, 0, 0, 0), pieces=260),
    OP.case(
        "several workers", (23, 11, 9, 18, 13), key_heads=3, group=2, parents=(-1, 0, 0, -1, 3), chunk=8, threads=3
    ),
    OP.case("strong forgetting", (9, 4), forgetting=8.0),
    OP.case("no forgetting", (9, 4), forgetting=0.0),
    OP.case("empty documents between", (3, 0, 2)),
    OP.case("one-token documents", (1, 1, 1)),
)


def _recurrence(s: GatedDeltaRuleSaved, inputs: dict[str, Tensor], mistake: str) -> Tensor:
    """Compute the rule token by token, with one dependence detached that a backward pass could forget."""
    group = s.v.shape[1] // s.k.shape[1]
    q, k = (inputs[name].repeat_interleave(group, dim=1) for name in ("q", "k"))
    v, decay, beta = (inputs[name] for name in ("v", "decay", "beta"))
    documents = segments(s.runs)
    if mistake == "documents see each other":
        documents = [((0, v.shape[0]), [])]
    states = {-1: v.new_zeros(*k.shape[1:], v.shape[2])}  # last token of a segment → state after it
    continued: set[int] = set()
    outputs = [v[:0]]
    for (start, stop), before in documents:
        last = before[-1] if before else -1
        state = states[last]
        if mistake == "prefix's share missing" or (mistake.startswith("share of one") and last in continued):
            state = state.detach()
        continued.add(last)
        for t in range(start, stop):
            if mistake == "state cut between chunks" and (t - start) % s.chunk == 0:
                state = state.detach()
            if mistake == "state held constant":
                state = state.detach()
            state = state * decay[t].exp()[:, None, None]
            seen = state.detach() if mistake == "correction held constant" else state
            asked = k[t].detach() if mistake == "key of the correction held constant" else k[t]
            written = k[t].detach() if mistake == "key of the update held constant" else k[t]
            update = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", seen, asked))
            state = state + torch.einsum("hk,hv->hkv", written, update)
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t])[None])
        states[stop - 1] = state
    return torch.cat(outputs)


def _cut(mistake: str, *names: str) -> tuple[Mutant, ...]:
    """Return mutants with the gradients of the recurrence with a detached part, at the right values."""

    def value(g: Tensor, s: GatedDeltaRuleSaved, gradient: str) -> Tensor:
        tensors = {"d_y": g, **{name: getattr(s, name) for name in INPUTS}}
        name = gradient.removeprefix("d_")
        return autograd_gradients(lambda t: _recurrence(s, t, mistake), tensors, (name,))[1][name]

    return wrong(mistake, " ".join(f"d_{name}" for name in names), value)


MUTANTS = (
    _cut("documents see each other", *INPUTS),
    *(_cut(mistake, *INPUTS[1:]) for mistake in STATE_MISTAKES),
    _cut("key of the correction held constant", "k"),
    _cut("key of the update held constant", "k"),
    wrong("mean over the group", "d_q d_k", lambda d, s: d * (s.k.shape[1] / s.v.shape[1])),
    wrong("not summed over later tokens", "d_decay", lambda d: d - torch.cat([d[1:], torch.zeros_like(d[:1])])),
    wrong("of the factor, not its logarithm", "d_decay", lambda d, s: d / s.decay.exp()),
    wrong("of the logit, not the rate", "d_beta", lambda d, s: d * s.beta * (1 - s.beta)),
)

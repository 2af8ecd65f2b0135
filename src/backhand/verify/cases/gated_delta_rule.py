"""The gated delta rule: cases, and mutants by autograd of recurrences in which something is held constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backhand.nn.batch import document_runs
from backhand.ops.delta_steps import CHUNK_TOKENS
from backhand.ops.document_groups import spans
from backhand.ops.gated_delta_rule import (
    GatedDeltaRuleSaved,
    gated_delta_rule_backward,
    gated_delta_rule_forward,
    gated_delta_rule_reference,
)
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants

INPUTS = ("q", "k", "v", "decay", "beta")


def _case(
    name: str,
    documents: tuple[int, ...],
    key_heads: int = 2,
    group: int = 3,
    widths: tuple[int, int] = (5, 7),
    *,
    shared: int = 0,
    forgetting: float = 0.3,
    chunk: int = 3,
) -> Case:
    draw = Draw(f"gated_delta_rule: {name}")
    tokens, runs = shared + sum(documents), document_runs(documents, shared)
    heads = key_heads * group
    # Keys of norm about 1 and rates in (0, 1), as the rule has them: the state then stays bounded.
    tensors = {
        "q": draw.normal(tokens, key_heads, widths[0], size=0.7),
        "k": draw.normal(tokens, key_heads, widths[0], size=widths[0] ** -0.5),
        "v": draw.normal(tokens, heads, widths[1]),
        "decay": -forgetting * draw.normal(tokens, heads).abs(),
        "beta": torch.sigmoid(draw.normal(tokens, heads)),
        "d_y": draw.normal(tokens, heads, widths[1]),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        q, k, v, decay, beta = (t[name] for name in INPUTS)
        y, saved = gated_delta_rule_forward(q, k, v, decay, beta, runs, shared, chunk=chunk)
        return ByHand(y, dict(zip(INPUTS, backward(t["d_y"], saved), strict=True)))

    def reference(t: Tensors) -> Tensor:
        q, k, v, decay, beta = (t[name] for name in INPUTS)
        return gated_delta_rule_reference(q, k, v, decay, beta, runs, shared)

    return Case(name, tensors, by_hand, reference)


CASES = (
    _case("packed documents", (4, 4, 9, 1, 2)),
    _case("one value head for each key head", (6, 3), group=1),
    _case("one key head", (6, 3), key_heads=1, group=2),
    _case("documents of one length", (8, 8, 8)),
    _case("longest document last", (2, 5, 11)),
    _case("one chunk", (9,), chunk=9),
    _case("chunks of one token", (5, 3), chunk=1),
    _case("the usual chunks", (CHUNK_TOKENS + 3, 4), key_heads=1, group=2, widths=(3, 4), chunk=CHUNK_TOKENS),
    _case("shared prefix", (5, 5, 1, 2), shared=4),
    _case("shared prefix of several chunks", (4, 7, 4), key_heads=1, group=2, shared=7),
    _case("nothing but a prefix", (), shared=5),
    _case("a prefix before empty documents", (0, 0), shared=5),
    _case("strong forgetting", (9, 4), forgetting=8.0),
    _case("no forgetting", (9, 4), forgetting=0.0),
    _case("empty documents between", (3, 0, 2)),
    _case("one token", (1,)),
    _case("one-token documents", (1, 1, 1)),
    _case("no tokens", ()),
)


def _recurrence(s: GatedDeltaRuleSaved, inputs: dict[str, Tensor], mistake: str) -> Tensor:
    """The rule token by token, with one dependence cut that a backward pass could forget."""
    group = s.v.shape[1] // s.k.shape[1]
    q, k = (inputs[name].repeat_interleave(group, dim=1) for name in ("q", "k"))
    v, decay, beta = (inputs[name] for name in ("v", "decay", "beta"))
    begin = v.new_zeros(*k.shape[1:], v.shape[2])
    documents = spans(s.runs, s.shared)
    if mistake == "documents see each other":
        documents = [(0, 0), (0, v.shape[0])]
    outputs = [v[:0]]
    for start, stop in documents:
        state = begin.detach() if mistake == "prefix's share missing" else begin
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
        if start == 0 and stop == s.shared:
            begin = state
    return torch.cat(outputs)


def _cut(mistake: str, name: str) -> Mutant:
    """The gradient by the cut recurrence, with the values of the right one."""

    def value(d_y: Tensor, s: GatedDeltaRuleSaved, _right: Any) -> Tensor:
        leaves = {part: getattr(s, part).detach().clone().requires_grad_() for part in INPUTS}
        with torch.enable_grad():
            y = _recurrence(s, leaves, mistake)
        if not y.requires_grad:
            return torch.zeros_like(leaves[name])
        (found,) = torch.autograd.grad(y, leaves[name], d_y, allow_unused=True)
        return torch.zeros_like(leaves[name]) if found is None else found

    return Mutant(mistake, f"d_{name}", value)


def _changed(mistake: str, name: str, change: Callable[[Tensor, GatedDeltaRuleSaved], Tensor]) -> Mutant:
    return Mutant(mistake, f"d_{name}", lambda _g, s, right: change(getattr(right, f"d_{name}"), s))


def _of_one_head(d_k: Tensor, s: GatedDeltaRuleSaved) -> Tensor:
    return d_k * (s.k.shape[1] / s.v.shape[1])


MUTANTS = (
    *standard_mutants(*(f"d_{name}" for name in INPUTS)),
    *(_cut("documents see each other", name) for name in INPUTS),
    *(_cut("state cut between chunks", name) for name in ("k", "v", "decay", "beta")),
    *(_cut("state held constant", name) for name in ("k", "v", "decay", "beta")),
    *(_cut("correction held constant", name) for name in ("k", "v", "decay", "beta")),
    *(_cut("prefix's share missing", name) for name in ("k", "v", "decay", "beta")),
    _cut("key of the correction held constant", "k"),
    _cut("key of the update held constant", "k"),
    _changed("mean over the group", "q", _of_one_head),
    _changed("mean over the group", "k", _of_one_head),
    _changed("not summed from behind", "decay", lambda d, _s: d - torch.cat([d[1:], torch.zeros_like(d[:1])])),
    _changed("of the factor, not its logarithm", "decay", lambda d, s: d / s.decay.exp()),
    _changed("of the logit, not the rate", "beta", lambda d, s: d * s.beta * (1 - s.beta)),
)

PROOFS = (OpProof("gated_delta_rule", gated_delta_rule_backward, CASES, MUTANTS, loops=True),)

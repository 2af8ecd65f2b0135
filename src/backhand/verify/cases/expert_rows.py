"""Tokens to experts and back: cases and mutants of both ways and of the weights between."""

from __future__ import annotations

from backhand.ops.expert_rows import route
from backhand.verify.mutants import scatter_overwrite, wrong
from backhand.verify.scaffold import Axis, Op

HIDDEN = 5


def _op(name: str, inputs: dict[str, str]) -> Op:
    return Op(
        name,
        {"chosen": lambda draw, tokens, experts, k: draw.normal(tokens, experts).argsort(dim=-1)[:, :k], **inputs},
        {"tokens": Axis(7, 67, 1, 0), "experts": Axis(4, 8), "k": Axis(3, 2), "hidden": HIDDEN},
        derived={"routing": route, "rows": lambda tokens, k: tokens * k},
    )


DISPATCH = _op("dispatch", {"x": "tokens hidden", "d_y": "rows hidden"})
WEIGH = _op("weigh", {"p": "rows hidden", "weights": "tokens k", "d_y": "rows hidden"})
COMBINE = _op("combine", {"z": "rows hidden", "d_y": "tokens hidden"})
SIZES = (("one choice", 7, 4, 1), ("every expert", 6, 3, 3), ("more experts than rows", 2, 9, 2))

DISPATCH_MUTANTS = (
    wrong("first choice alone", "d_x", lambda g, s: g[s.routing.places[:, 0]]),
    wrong("mean over the choices", "d_x", lambda s, d: d / s.routing.places.shape[1]),
    wrong("rows not put back in order", "d_x", lambda g, s: g.view(*s.routing.places.shape, HIDDEN).sum(1)),
    wrong(
        "overwritten instead of added",
        "d_x",
        lambda g, s: scatter_overwrite(len(s.routing.places), s.routing.tokens, g),
    ),
)
WEIGH_MUTANTS = (
    wrong("weights forgotten", "d_p", lambda g: g),
    wrong("weights of other rows", "d_p", lambda g, s: g * s.weights.reshape(-1, 1)),
    wrong("rows reversed", "d_p", lambda d: d.flip(0)),
    wrong("rows of other experts", "d_weights", lambda g, s: (s.p * g).sum(-1).view(s.weights.shape)),
    wrong("choices reversed", "d_weights", lambda d: d.flip(1)),
    wrong("of the weighted rows", "d_weights", lambda s, d: d * s.weights),
)
COMBINE_MUTANTS = (
    wrong("mean over the choices", "d_z", lambda s, d: d / s.routing.places.shape[1]),
    wrong("rows in the order of the tokens", "d_z", lambda g, s: g.repeat_interleave(s.routing.places.shape[1], dim=0)),
    wrong("tokens reversed", "d_z", lambda g, s: g.flip(0)[s.routing.tokens]),
)
PROOFS = tuple(
    op.proof([*op.standard_cases(), *(op.case(*size) for size in SIZES)], mutants)
    for op, mutants in ((DISPATCH, DISPATCH_MUTANTS), (WEIGH, WEIGH_MUTANTS), (COMBINE, COMBINE_MUTANTS))
)

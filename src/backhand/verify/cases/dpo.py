"""Direct preference optimisation: cases of every form, and mutants."""

from __future__ import annotations

from typing import Any

from torch import Tensor, sigmoid

from backhand.ops.dpo import DPOGrads, DPORule, DPOSaved, dpo_backward
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Op

OP = Op(
    "dpo", {"chosen": "size: pairs", "rejected": "size: pairs", "d_y": "pairs"}, {"rule": ..., "pairs": 6, "size": 3.0}
)

FORMS = (
    DPORule("sigmoid", 0.7),
    DPORule("sigmoid_norm", 1.9),
    DPORule("hinge", 0.3),
    DPORule("ipo", 0.23),
    DPORule("exo_pair", 0.7, 0.12),
    DPORule("robust", 0.7, 0.17),
    DPORule("discopop", 0.3, discopop_tau=0.4),
    DPORule("nca_pair", 0.7),
    DPORule("bco_pair", 0.7),
    DPORule("sppo_hard", 0.23),
    DPORule("apo_zero", 0.7),
    DPORule("apo_down", 0.7),
)

CASES = (
    *(OP.case(rule.loss_type, rule) for rule in FORMS),
    OP.case("one row", FORMS[0], 1),
    OP.case("no pairs", FORMS[0], 0),
    OP.case("far apart", FORMS[0], 6, 20.0),
    OP.case("nearly equal", FORMS[0], 6, 1e-3),
    OP.case("training size", FORMS[0], 97),
)


def _under(g: Tensor, s: DPOSaved, **changes: Any) -> DPOGrads:
    """Return the right gradients under a changed rule, or the unchanged ones if the form has no such field."""
    smoothed = "label_smoothing" not in changes or s.rule.loss_type == "robust"
    return dpo_backward(g, s._replace(rule=s.rule._replace(**changes)) if smoothed else s)


MUTANTS = (
    wrong("chosen for rejected", "d_chosen", lambda right: right.d_rejected),
    wrong("rejected for chosen", "d_rejected", lambda right: right.d_chosen),
    wrong("beta forgotten", "d_chosen d_rejected", lambda s, d: d / s.rule.beta),
    wrong("upstream gradient ignored", "d_chosen d_rejected", lambda g, d: d / g),
    wrong("sure where unsure", "d_chosen", lambda g, s: -s.rule.beta * g * sigmoid(s.u - s.v)),
    wrong("every form as sigmoid", "d_rejected", lambda g, s: _under(g, s, loss_type="sigmoid").d_rejected),
    wrong("label smoothing forgotten", "d_chosen", lambda g, s: _under(g, s, label_smoothing=0.0).d_chosen),
    wrong("pairs reversed", "d_rejected", lambda d: d.flip(0)),
)

"""Cross-entropy from logits: cases and mutants."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from backhand.ops.cross_entropy import CrossEntropySaved
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import Axis, Op

OP = Op(
    "cross_entropy",
    dict(logits=lambda draw, rows, vocab, size, shift: draw.normal(rows, vocab, size=size) + shift)
    | dict(targets=lambda draw, rows, vocab: draw.integers(vocab, rows), d_y="rows"),
    {"rows": Axis(5, 67, 1, 0), "vocab": Axis(7, 353), "size": 1.5, "shift": 0.0},
    baseline=lambda logits, targets: functional.cross_entropy(logits.float(), targets, reduction="none"),
)

CASES = (
    *OP.standard_cases(),
    OP.case("as many rows as words", 6, 6),
    OP.case("sure of itself", 5, 7, size=12.0),
    OP.case("far from zero", 5, 7, shift=-40.0),
    OP.case("two words", 5, 2),
)


def _one_hot(saved: CrossEntropySaved) -> Tensor:
    return functional.one_hot(saved.targets, saved.probabilities.shape[1]).to(saved.probabilities.dtype)


MUTANTS = (
    wrong("target not subtracted", "d_logits", lambda g, s: g[:, None] * s.probabilities),
    wrong("softmax left out", "d_logits", lambda g, s: -g[:, None] * _one_hot(s)),
    wrong("target subtracted twice", "d_logits", lambda g, s, d: d - g[:, None] * _one_hot(s)),
    wrong("mean for sum", "d_logits", lambda g, d: d / max(len(g), 1)),
    wrong("upstream gradient of one", "d_logits", lambda s: s.probabilities - _one_hot(s)),
    wrong(
        "upstream gradient of another row",
        "d_logits",
        lambda g, s: g.flip(0)[:, None] * (s.probabilities - _one_hot(s)),
    ),
    wrong("target of another row", "d_logits", lambda g, s: g[:, None] * (s.probabilities - _one_hot(s).flip(0))),
)

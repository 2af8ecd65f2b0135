"""The demo's sentence about its proofs. tests/docs/test_examples.py runs the whole demo."""

from __future__ import annotations

import re
from pathlib import Path

from backhand.lab.demo import _proved
from tests.support.finished_runs import finished, finished_once, tiny

__all__ = ["finished", "finished_once", "tiny"]


def test_the_error_it_names_is_one_in_float64(finished: Path) -> None:
    """The proof of the training dtype's own gradient names float64 as well, and is a million times larger."""
    said = re.search(r"in float64 \(largest relative error (\S+)\); merged .* differ by (\S+) of", _proved(finished))
    assert said is not None
    gradient, merged = map(float, said.groups())
    assert 0 < gradient <= 1e-9
    assert 0 <= merged <= 1e-9

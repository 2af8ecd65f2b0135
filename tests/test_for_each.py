"""Many cases in one test: each is tried, and the one that fails is named."""

from __future__ import annotations

import pytest
import torch

from support.for_each import for_each

TRIED: list[tuple[int, str, float]] = []


@pytest.fixture
def three() -> int:
    return 3


@for_each("word", ["a", "b"])
@for_each("n, size", [(1, 0.5), (2, 1.5)])
def test_each_case_is_tried_beside_fixtures(three: int, n: int, size: float, word: str) -> None:
    assert three == 3
    TRIED.append((n, word, float(torch.randn(())) + size))
    if len(TRIED) == 4:
        assert [(n, word) for n, word, _ in TRIED] == [(1, "a"), (2, "a"), (1, "b"), (2, "b")]
        assert len({drawn - 0.5 * (n == 1) - 1.5 * (n == 2) for n, _, drawn in TRIED}) == 1, "the same numbers for each"


def test_the_case_that_fails_is_named() -> None:
    tried = []

    @for_each("n, word", [(1, "a"), (2, "b"), (3, "c")])
    def fails(n: int, word: str) -> None:
        tried.append(word)
        assert n < 2

    with pytest.raises(AssertionError) as found:
        fails()
    assert tried == ["a", "b"] and found.value.__notes__ == ["n=2, word='b'"]


def test_no_cases_are_an_error() -> None:
    with pytest.raises(AssertionError, match="could not fail"):
        for_each("n", [])

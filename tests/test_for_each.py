"""Many cases in one test: each is tried, and the one that fails is named."""

from __future__ import annotations

import inspect

import pytest
import torch

from tests.support.for_each import for_each


def test_each_case_is_tried_with_the_same_random_numbers() -> None:
    tried: list[tuple[str, int, float]] = []
    drawn: list[float] = []

    @for_each("word", ["a", "b"])
    @for_each("n, size", [(1, 0.5), (2, 1.5)])
    def test(fixture: int, n: int, size: float, word: str) -> None:
        assert fixture == 3
        tried.append((word, n, size))
        drawn.append(float(torch.randn(())))

    assert [*inspect.signature(test).parameters] == ["fixture"], "what pytest is asked for"
    test(fixture=3)
    assert tried == [("a", 1, 0.5), ("a", 2, 1.5), ("b", 1, 0.5), ("b", 2, 1.5)]
    assert len(set(drawn)) == 1


def test_the_case_that_fails_is_named() -> None:
    tried = []

    @for_each("n, word", [(1, "a"), (2, "b"), (3, "c")])
    def fails(n: int, word: str) -> None:
        tried.append(word)
        assert n < 2

    with pytest.raises(AssertionError) as found:
        fails()
    assert tried == ["a", "b"] and found.value.__notes__ == ["n=2, word='b'"]


def test_no_cases_and_one_that_is_skipped_are_errors() -> None:
    with pytest.raises(AssertionError, match="could not fail"):
        for_each("n", [])

    @for_each("n", [1, 2])
    def skips(n: int) -> None:
        pytest.skip("not here")

    with pytest.raises(AssertionError, match="would be skipped"):
        skips()

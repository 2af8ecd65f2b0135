"""Word-by-word differences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhand.report.page import differences


@given(st.text(), st.text())
def test_the_segments_are_the_answers(one: str, other: str) -> None:
    left, right = differences(one, other)
    assert "".join(text for _, text in left) == one and "".join(text for _, text in right) == other
    same = [text for differs, text in left if not differs]
    assert "".join(same) == "".join(text for differs, text in right if not differs)


@pytest.mark.parametrize(
    ("one", "other", "left", "right"),
    [
        ("a b c", "a x c", [(False, "a "), (True, "b"), (False, " c")], [(False, "a "), (True, "x"), (False, " c")]),
        ("same", "same", [(False, "same")], [(False, "same")]),
        ("", "new", [], [(True, "new")]),
        # Signs alone, between two differences, are marked with them; at an end they are not.
        ('"a", b.', '{"x": "y", b.', [(True, '"a'), (False, '", b.')], [(True, '{"x": "y'), (False, '", b.')]),
        ("one, two", "three, four", [(True, "one, two")], [(True, "three, four")]),
    ],
)
def test_words_that_differ(one: str, other: str, left: list[object], right: list[object]) -> None:
    assert differences(one, other) == (left, right)

"""Shapes of JSON files: what has one is converted, what has another is named, and parts that fit are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from backhand.json_shape import Rule, ShapeError, convert, fitting, load


class Point(TypedDict):
    x: int
    y: float | None
    unit: NotRequired[str]


@dataclass(frozen=True)
class Drawing:
    name: str
    kind: Literal["line", "dot"]
    points: list[Point]
    sizes: tuple[int, str] = (1, "pt")
    notes: dict[str, str | None] = field(default_factory=dict)


GOOD: dict[str, Any] = {"name": "a", "kind": "dot", "points": [{"x": 1, "y": 2, "z": 0}], "sizes": [3, "px"]}


def test_a_value_of_the_shape_is_converted() -> None:
    drawing = convert({**GOOD, "unknown": 1}, Drawing)
    assert drawing == Drawing("a", "dot", [{"x": 1, "y": 2.0, "z": 0}], (3, "px"))  # type: ignore[typeddict-unknown-key]
    assert isinstance(drawing.points[0]["y"], float)
    assert convert([[1, "a"], [2, "b"]], list[tuple[int, str]]) == [(1, "a"), (2, "b")]
    assert convert([1, 2, 3], tuple[int, ...]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": None}, "name is null, not a string"),
        ({"kind": "curve"}, "kind is a string, not 'line' or 'dot'"),
        ({"points": {}}, "points is an object, not a list"),
        ({"points": [{"x": True, "y": 0}]}, r"points\[0\].x is true or false, not an integer"),
        ({"points": [{"x": 2**63, "y": 0}]}, r"points\[0\].x is an integer of more than 64 bits, not an integer"),
        ({"points": [{"x": 1, "y": "2"}]}, r"points\[0\].y is a string, not a number or null"),
        ({"points": [{"x": 1}]}, r"points\[0\].y is missing"),
        ({"points": [{"x": 1, "y": 2, "unit": 1}]}, r"points\[0\].unit is an integer, not a string"),
        ({"sizes": [1]}, "sizes has 1 elements, not 2"),
        ({"notes": {"a": 1}}, "notes.a is an integer, not a string or null"),
    ],
)
def test_a_value_of_another_shape_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=f"^{message}$"):
        convert(GOOD | changed, Drawing)


SIZES = dict[Literal["choice", "score"], Annotated[float, Rule(lambda size: size > 0, "a number above 0")] | None]


def test_rules_and_keys_are_checked() -> None:
    assert convert({"choice": 1, "score": None}, SIZES) == {"choice": 1.0, "score": None}
    with pytest.raises(ShapeError, match=r"^sizes.choice is -1, not a number above 0$"):
        convert({"choice": -1}, SIZES, "sizes")
    with pytest.raises(ShapeError, match=r'^the key "other" of sizes is a string, not \'choice\' or \'score\'$'):
        convert({"other": 1}, SIZES, "sizes")
    with pytest.raises(ShapeError, match=r"^choice is a string, not a number or null$"):
        convert({"choice": "1"}, SIZES)


def test_a_missing_field_and_another_kind_of_value_are_named() -> None:
    with pytest.raises(ShapeError, match=r"^name is missing$"):
        convert({}, Drawing)
    with pytest.raises(ShapeError, match=r"^it is a list, not an object$"):
        convert([], Drawing)


def test_parts_that_fit_are_kept_as_they_are() -> None:
    wrong = {
        "name": 1,
        "kind": "dot",
        "points": [{"x": 1}, {"x": 1, "y": 2}, None],
        "sizes": 3,
        "notes": {"a": 1, "b": None},
    }
    assert fitting(wrong, Drawing) == {"kind": "dot", "points": [{"x": 1, "y": 2}], "notes": {"b": None}}
    assert fitting(GOOD | {"unknown": [1]}, Drawing) == GOOD | {"unknown": [1]}
    assert (fitting(None, Drawing), fitting([], Point), fitting(3, list[int])) == ({}, {}, [])
    with pytest.raises(ShapeError):
        fitting("x", int)


@pytest.mark.parametrize("data", [b"{", b"\xff\xff", b"[" * 100_000, b"", b"9" * 5000])
def test_bytes_that_are_no_json_are_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        load(data, dict[str, Any])

"""The range declared next to a field is checked, and named in the error and in the help."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from backhand.bounds import (
    BaseModel,
    Bound,
    Check,
    Count,
    CountFromZero,
    NotNegative,
    Options,
    Positive,
    Seed,
    Share,
    Text,
    check_fields,
    check_value,
    sentence_of,
    several,
)
from backhand.errors import UsageError
from backhand.options.objectives import ObjectiveOptions

Port = Annotated[int, Bound(at_least=0, at_most=65535, why="ports end there", next_step="take a lower one")]


@pytest.mark.parametrize(
    ("hint", "allowed", "refused", "error", "sentence"),
    [
        (Count, (1, 2**70), (0, -1, 1.0, True, None), "is not an integer of at least 1", "At least 1."),
        (CountFromZero, (0,), (-1, 0.0), "is not an integer of at least 0", "At least 0."),
        (Seed, (0, 2**63 - 1), (2**63,), "is not below 2**63", "At least 0."),
        (Port, (0, 65535), (65536,), "is above 65535", "0 to 65535."),
        (Share, (0, 0.0, 0.999), (1, 1.0, -1e-9, math.nan, False), "is not a number in [0, 1)", "In [0, 1)."),
        (Positive, (1, 1e-300), (0, 0.0, math.inf, math.nan), "is not a finite number above 0", "Above 0."),
        (NotNegative, (0.0, 10**400), (-1, math.inf), "is not a finite number of at least 0", "At least 0."),
        (Annotated[float, Bound(above=0, at_most=1)], (1, 0.5), (0, 1.01), "is not a number in (0, 1]", "In (0, 1]."),
        (Annotated[float, Bound(above=0, at_most=7)], (7,), (7.1,), "is above 7", "Above 0, at most 7."),
        (Annotated[float, Bound(above=0, below=1e30)], (1e29,), (1e30,), "is not below 1e+30", "Above 0."),
        (int, (-5,), (1.5, True), "is not an integer", ""),
        (float, (-5, 1.5), (math.inf, None), "is not a finite number", ""),
        (bool, (True, False), (1, None, "yes"), "is neither true nor false", ""),
        (Literal["a", "b"], ("a",), ("c", None, ["a"]), "is not one of a, b", ""),
        (Count | None, (None, 1), (0,), "is not an integer of at least 1", "At least 1."),
        (
            tuple[Count, ...],
            ((), (1, 2), [3]),
            ((1, 0), (None,)),
            "is not an integer of at least 1",
            "Each at least 1.",
        ),
        (tuple[Count, ...], (), (5, "12"), "is not a list", "Each at least 1."),
        (tuple[Literal["a"], ...], (("a",),), (("a", "b"),), "is not one of a", ""),
        (Annotated[tuple[int, ...], several()], ((1,),), ((), []), "is empty", ""),
        (Annotated[tuple[int, ...], several(2)], ((1, 2),), ((1,), 5), "is not a list of 2 or more", "2 or more."),
        (Text, ("",), (5, "\ud800"), "", ""),
        (BaseModel, ("m",), ("",), "no base model is given", ""),
        (Mapping[str, Any], ({"a": object()},), ({1: 2}, [], None), "is not a table of names and values", ""),
        (str | tuple[str, ...], ("a", ("b",), 5), (), "", ""),
    ],
)
def test_a_value_is_held_against_its_annotation(
    hint: Any, allowed: tuple[Any, ...], refused: tuple[Any, ...], error: str, sentence: str
) -> None:
    for value in allowed:
        check_value("name", value, hint)
    for value in refused:
        with pytest.raises(UsageError) as caught:
            check_value("name", value, hint)
        assert caught.value.where == "name"
        assert error in caught.value.what
        assert "name" in caught.value.what or repr(value) in caught.value.what or value == ""
    assert sentence_of(hint) == sentence


def test_a_value_too_large_says_why_and_what_to_do() -> None:
    with pytest.raises(UsageError) as caught:
        check_value("port", 70000, Port)
    assert (caught.value.why, caught.value.next_step) == ("ports end there", "take a lower one")


def test_a_long_value_is_shortened() -> None:
    style = "Write like a lighthouse keeper. " * 20
    with pytest.raises(UsageError, match="bake") as caught:
        ObjectiveOptions(context=style).validate()
    assert caught.value.what.startswith("context 'Write like a lighthouse") and len(caught.value.what) < 130
    with pytest.raises(UsageError, match="is not one of a") as caught:
        check_value("name", style, Literal["a"])
    assert len(caught.value.what) < 100


def test_a_value_of_a_mapping_is_named_with_its_key() -> None:
    with pytest.raises(UsageError, match="rank 0 is not an integer of at least 1") as caught:
        check_value("pattern", {"q": 8, "v": 0}, Mapping[str, Annotated[int, Bound(at_least=1, noun="rank")]])
    assert caught.value.where == "pattern['v']"


def _no_dots(where: str, value: str) -> None:
    if "." in value:
        raise UsageError("has a dot", where=where)


@dataclass(frozen=True)
class Inner(Options):
    """A section that checks itself."""

    size: Count = 3
    other: int = 0

    def _check_together(self) -> None:
        if self.other > self.size:
            raise UsageError("other is larger than size", where="other")


@dataclass(frozen=True)
class Plain:
    """A section without a check of its own."""

    share: Share = 0.0


@dataclass(frozen=True)
class Outer:
    """Options."""

    name: Annotated[str, Check(_no_dots)] = "n"
    inner: Inner = field(default_factory=Inner)
    plain: Plain = field(default_factory=Plain)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (Outer(name="a.b"), "name"),
        (Outer(inner=Inner(size=0)), "size"),
        (Outer(inner=Inner(other=4)), "other"),
        (Outer(plain=Plain(1.0)), "share"),
        (Outer(inner=Plain()), "inner"),  # type: ignore[arg-type]
        (Outer(name=".", plain=Plain(1.0)), "name"),
    ],
)
def test_the_walker_finds_the_first_wrong_field_in_every_section(options: Outer, where: str) -> None:
    check_fields(Outer())
    with pytest.raises(UsageError) as caught:
        check_fields(options)
    assert caught.value.where == where

"""Many small cases in one test: of itself a test takes a few milliseconds, which is more than most of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch


def seed() -> None:
    """What the global generator draws next is the same for every test, and for every case."""
    torch.default_generator.manual_seed(20210617)  # of the one device; to seed all of them formats the stack each time


def for_each(names: str, cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test with each of the cases, in one test; a failure says which one it was, and none may be skipped.

    Not for what a fixture reads, a build or a dtype for one.

    Args:
        names: of its arguments, as in `pytest.mark.parametrize`.
        cases: a value each, or as many as there are names.
    """
    expected, known = [name.strip() for name in names.split(",")], list(cases)
    assert known, "a test of no cases could not fail"

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(*args: Any, **kwargs: Any) -> None:
            for case in known:
                given = dict(zip(expected, case if len(expected) > 1 else [case], strict=True))
                seed()
                try:
                    function(*args, **kwargs, **given)
                except pytest.skip.Exception as skipped:
                    raise AssertionError(f"the cases after {given} would be skipped as well") from skipped
                except BaseException as error:
                    error.add_note(", ".join(f"{name}={value!r}" for name, value in given.items()))
                    raise

        signature = inspect.signature(function)  # which pytest takes fixtures and parameters from
        left = [parameter for name, parameter in signature.parameters.items() if name not in expected]
        test.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return test

    return decorate

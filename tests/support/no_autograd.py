"""A context in which autograd's backward raises: what passes inside is written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("autograd's backward was called")


@contextmanager
def autograd_raises() -> Iterator[None]:
    """Every entrance to autograd's backward raises AssertionError."""
    with (
        patch("torch.Tensor.backward", _refuse),
        patch("torch.autograd.backward", _refuse),
        patch("torch.autograd.grad", _refuse),
        patch("torch.autograd.graph._engine_run_backward", _refuse),
        torch.no_grad(),
    ):
        yield

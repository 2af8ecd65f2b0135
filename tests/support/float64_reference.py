"""Let transformers compute in float64 throughout: its modelling files cast norms, softmax and angles to float32.

Within `without_float32_casts(model)` the modelling module of `model` sees a `torch` whose float32 is float64, and
`Tensor.float` is `Tensor.double`. Inverse frequencies stay the float32 values they were made with, as our own are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Float64Torch:
    """The torch module, with float32 spelled float64."""

    float32 = torch.float64
    float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def without_float32_casts(model: torch.nn.Module) -> Iterator[None]:
    """Lift the casts to float32 inside the modelling module of a float64 transformers (or PEFT-wrapped) model.

    Autograd's backward may run outside: the graph has float64 nodes only.
    """
    modules = {
        module
        for part in model.modules()
        if (module := sys.modules[type(part).__module__]).__name__.startswith("transformers.models.")
    }
    if not modules:
        raise ValueError(f"{type(model).__name__} holds no transformers model")
    original_float = torch.Tensor.float
    proxy = _Float64Torch()
    for module in modules:
        module.torch = proxy  # type: ignore[attr-defined]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.float = original_float  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch  # type: ignore[attr-defined]

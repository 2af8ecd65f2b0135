"""A device that is none: tensors that say they are on it lie in memory, and every op looks where its inputs are.

What a card forbids is forbidden: tensors of both devices in one op, but for copies, indices and single numbers. Values
and shapes are real, so that a whole run can be made on it, and only what is on no processor (kernels, streams, memory
of its own, dtypes that a card lacks) is not seen. Made of torch's Python form of a further backend, which a process can
set up once: see `tests/test_devices.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CARD = "pretend"
ACROSS = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_"}
"""What takes tensors of both devices on a card, too."""


class Held(Tensor):
    """On the card."""

    raw: Tensor
    """Where it is."""

    @staticmethod
    def __new__(cls, raw: Tensor) -> Held:
        """A tensor of the same length, width and strides as the one that it replaces."""
        held: Held = Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(CARD, 0),
        )
        held.raw = raw
        return held

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of every op with one of these."""
        return computed(op, args, kwargs or {})

    def tolist(self) -> Any:
        """Torch forbids it to classes such as this one, and not to a card."""
        return self.raw.tolist()


class Everywhere(TorchDispatchMode):
    """Ops without a tensor as well: those that make one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled."""
        return False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of every op."""
        return computed(op, args, kwargs or {})


def raw_of(value: Any) -> Any:
    """The host memory of a tensor on the card; anything else unchanged."""
    return value.raw if isinstance(value, Held) else value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """With every value in tuples and lists replaced; torch's own way to do it takes longer than most ops."""
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(function, one) for one in value])
    return function(value)


def computed(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An op's result, on the device where its inputs are, or on the device that was asked for."""
    given: list[Tensor] = []
    mapped(lambda one: given.append(one) if isinstance(one, Tensor) else None, [*args, *kwargs.values()])
    held = [one for one in given if isinstance(one, Held)]
    elsewhere = [one for one in given if not isinstance(one, Held) and one.dim()]
    if held and elsewhere and op._schema.name.removeprefix("aten::") not in ACROSS:
        raise RuntimeError(f"{op}: tensors of two devices, {[tuple(one.shape) for one in given]}")
    on_card = bool(held)
    if (device := kwargs.get("device")) is not None:
        on_card, kwargs = torch.device(device).type == CARD, {**kwargs, "device": torch.device("cpu")}
    same = {id(one.raw): one for one in held}

    def out(value: Any) -> Any:
        if not (on_card and isinstance(value, Tensor)):
            return value
        return same[id(value)] if id(value) in same else Held(value)

    raw = {name: mapped(raw_of, value) for name, value in kwargs.items()}
    return mapped(out, op(*mapped(raw_of, args), **raw))


class Generator(torch.Generator):
    """On any device: a processor's."""

    def __new__(cls, device: object = "cpu") -> Generator:
        """Without the device."""
        return super().__new__(cls)


@contextmanager
def card() -> Iterator[torch.device]:
    """The device, while ops know it."""
    with Everywhere(), patch("torch.Generator", Generator):
        yield torch.device(CARD, 0)


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Held(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Held(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    raw_of(target).copy_(raw_of(source))
    return target


_setup_privateuseone_for_python_backend(CARD)
# FrozenLayers every mode: `torch.tensor(numbers, device=…)` comes by here.
_LIBRARY = torch.library.Library("aten", "IMPL")
for _name, _function in (
    ("empty.memory_format", _empty),
    ("empty_strided", _empty_strided),
    ("_copy_from", _copy_from),
):
    _LIBRARY.impl(_name, _function, "PrivateUse1")

"""Whole base weights that PEFT stores beside the factors of embeddings and output heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from backhand.adapters.adapter_directory import UnusableAdapterError
from backhand.adapters.loaded_adapter import LoadedAdapter


def check_base_copies(loaded: LoadedAdapter, base_weight: Callable[[str], Tensor]) -> None:
    """Refuse an adapter whose own copies of base weights are not the model's: it belongs to another or a resized base.

    Args:
        loaded: the adapter.
        base_weight: the model's weight of a module, by dotted path.

    Raises:
        UnusableAdapterError: names every module whose weight differs.
    """
    if problems := copy_differences(loaded.base_copies, base_weight):
        raise UnusableAdapterError(loaded.directory, problems)


def copy_differences(base_copies: Mapping[str, Tensor], base_weight: Callable[[str], Tensor]) -> list[str]:
    """A sentence for each module whose stored weight is not the model's.

    They are compared in the narrower of the two dtypes, since base and file may have been cast.
    """
    problems = []
    for name, stored in base_copies.items():
        weight = base_weight(name).detach().cpu()
        dtype = min(stored.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(stored.to(dtype), weight.to(dtype)):
            problems.append(
                f"{name}: the file holds a base weight of its own, and it is not the model's; the adapter was trained "
                "on another base, or with resized embeddings"
            )
    return problems

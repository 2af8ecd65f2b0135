"""The smallest rank of every module that keeps to a given error, and the adapter at those ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.adapter_factors import AdapterFactors
from backhand.arithmetic.computed_adapter import ComputedAdapter, ComputedModule, rounded_factors
from backhand.arithmetic.linear_combination import measured
from backhand.arithmetic.low_rank import UpdateDirections, update_directions, writable_factors


def compressed(adapter: AdapterFactors, error: float) -> ComputedAdapter:
    """Every module at the smallest rank whose ΔW is off by at most `error` of its norm.

    Factors are written in the dtype they came in if the error then still holds, else in float32.
    """
    directions = {name: update_directions(module) for name, module in adapter.modules.items()}
    result = _at(adapter, directions, error, adapter.dtype)
    if adapter.dtype != torch.float32 and any(module.error > error for module in result.modules.values()):
        result = _at(adapter, directions, error, torch.float32)
    return result


def _at(
    adapter: AdapterFactors, directions: Mapping[str, UpdateDirections], error: float, dtype: torch.dtype
) -> ComputedAdapter:
    modules = {}
    for name, module in adapter.modules.items():
        modules[name] = _compressed_module(module, directions[name], error, dtype)
    return ComputedAdapter(modules)


def _compressed_module(
    module: ModuleFactors, directions: UpdateDirections, error: float, dtype: torch.dtype
) -> ComputedModule:
    lora_A, lora_B = writable_factors(directions, directions.needed_rank(error))
    return measured([(1.0, module)], rounded_factors(lora_A, lora_B, module, dtype))


def elements_at(adapter: AdapterFactors, errors: Sequence[float]) -> list[int]:
    """How many numbers the adapter takes at each error."""
    directions = {name: update_directions(module) for name, module in adapter.modules.items()}
    return [
        sum(max(1, directions[name].needed_rank(error)) * sum(module.shape) for name, module in adapter.modules.items())
        for error in errors
    ]

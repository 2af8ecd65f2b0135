"""How far an adapter has moved each module, from its factors alone: ΔW = scaling · lora_B lora_A is never formed.

With lora_B = Q_B R_B and lora_Aᵀ = Q_A R_A, the singular values of ΔW are those of scaling · R_B R_Aᵀ, (rank, rank).
    ‖ΔW‖ = √Σ σ²
    effective rank = exp(-Σ p log p), p = σ / Σ σ      [Roy and Vetterli 2007, The effective rank]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from backhand.adapters.adapter_directory import TENSOR_FILE
from backhand.adapters.peft_loading import load_adapter
from backhand.errors import BackhandError
from backhand.report.run_record import RunRecord, is_number
from backhand.train.run_directory import CHECKPOINTS

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class ModuleChange:
    """One adapted module.

    Attributes:
        name: dotted path.
        layer: number in the path, None where there is none.
        kind: last part of the path.
        rank: of the factors.
        update_norm: ‖ΔW‖.
        relative: ‖ΔW‖ / ‖W‖; None where the base norm was not recorded.
        singular_values: of ΔW, largest first, `rank` of them or fewer.
        effective_rank: 0 where ΔW is 0.
    """

    name: str
    layer: int | None
    kind: str
    rank: int
    update_norm: float
    relative: float | None
    singular_values: tuple[float, ...]
    effective_rank: float


def changes_of(run: RunRecord) -> tuple[list[ModuleChange], str]:
    """The changes of a run's adapter, and of which one: `adapter/`, or the newest checkpoint's until that is there.

    Where nothing can be read the list is empty, and the text says why.
    """
    modules = run.facts.get("modules") or []
    shapes = {module["name"]: (module["out_features"], module["in_features"]) for module in modules}
    if not shapes:
        return [], "the run has not recorded what it adapts"
    for directory in (run.adapter, _newest_checkpoint(run.path)):
        if directory is None or not directory.is_dir():
            continue
        norms = {module["name"]: module.get("weight_norm") for module in modules}
        try:
            written_ns = (directory / TENSOR_FILE).stat().st_mtime_ns
            changes = _read(directory, written_ns, tuple(shapes.items()), tuple(norms.items()))
        except (BackhandError, OSError) as error:
            return [], f"the adapter cannot be read: {error}"
        return list(changes), str(directory.relative_to(run.path))
    return [], "there is no adapter yet"


@lru_cache(maxsize=4)
def _read(
    directory: Path,
    _written_ns: int,
    shapes: tuple[tuple[str, tuple[int, int]], ...],
    norms: tuple[tuple[str, float | None], ...],
) -> tuple[ModuleChange, ...]:
    """The changes of the adapter in a directory; a page that is watched asks every few seconds for the same files."""
    adapter = load_adapter(directory, dict(shapes))
    scalings = {slot.name: slot.scaling for slot in adapter.slots}
    return tuple(module_changes(adapter.factors, scalings, dict(norms)))


def module_changes(
    factors: Mapping[str, Tensor], scalings: Mapping[str, float], weight_norms: Mapping[str, float | None]
) -> Iterable[ModuleChange]:
    """The change of each module in the order of `scalings`.

    Args:
        factors: `<module>.lora_A` (rank, in) and `<module>.lora_B` (out, rank).
        scalings: by module.
        weight_norms: ‖W‖ by module, None where it is not known.
    """
    for name, scaling in scalings.items():
        lora_A, lora_B = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
        values = singular_values(lora_A, lora_B, scaling)
        norm = math.sqrt(sum(value * value for value in values))
        weight_norm = weight_norms.get(name)
        numbers = _LAYER.findall(name)
        yield ModuleChange(
            name,
            int(numbers[-1]) if numbers else None,
            name.rpartition(".")[2],
            lora_A.shape[0],
            norm,
            norm / weight_norm if is_number(weight_norm) and weight_norm else None,
            tuple(values),
            effective_rank(values),
        )


def singular_values(lora_A: Tensor, lora_B: Tensor, scaling: float) -> list[float]:
    """Of scaling · lora_B lora_A, largest first, in float64."""
    r_B = torch.linalg.qr(lora_B.double(), mode="r").R
    r_A = torch.linalg.qr(lora_A.double().T, mode="r").R
    values: list[float] = torch.linalg.svdvals(scaling * (r_B @ r_A.T)).tolist()
    return values


def effective_rank(values: Iterable[float]) -> float:
    """exp of the entropy of the values' shares; 0 if all are 0."""
    values = list(values)
    total = sum(values)
    if not total:
        return 0.0
    shares = [value / total for value in values if value > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


def _newest_checkpoint(run: Path) -> Path | None:
    try:
        name = (run / CHECKPOINTS / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return run / CHECKPOINTS / name if re.fullmatch(r"step-\d{1,18}", name) else None

"""The factors of an adapter from PEFT's files, module by module; no model is needed to read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from backhand.adapters.checked_base import base_weight_name, read_adapter
from backhand.adapters.contents import PICKLE_FILE, TENSOR_FILE, AdapterContents, UnusableAdapterError
from backhand.adapters.module_factors import ModuleFactors
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import PREFIX
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import Target, module_values, resolve_targets
from backhand.errors import ArtifactError, UsageError
from backhand.nn.loading.source import ModelSource

_SUFFIXES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
}


@dataclass(frozen=True)
class AdapterFactors:
    """An adapter."""

    # for titles and tables: the rank, after the directory's name or, where that is `adapter`, the run's; the name alone
    # where it says the rank
    label: str
    directory: Path  # where its files lie; a GGUF file itself
    described: PEFTConfig
    modules: Mapping[str, ModuleFactors]  # by dotted path, in the order of the file
    targets: Sequence[Target]  # rank, alpha and scaling of the same modules, as the configuration gives them
    stored_bytes: int  # size of the file of factors
    # what the file holds besides factors, by its name there: base weights, magnitudes, whole modules
    others: Mapping[str, Tensor] = field(default_factory=dict)
    part_bytes: Mapping[str, int] = field(default_factory=dict)  # size of each tensor in the file, by its name there
    record: AdapterRecord | None = None
    dtype: torch.dtype = torch.float32  # that all factors have in the file; float32 where they differ

    @property
    def element_count(self) -> int:
        """Trained numbers."""
        return sum(module.lora_A.numel() + module.lora_B.numel() for module in self.modules.values())


def read_factors(path: Path, source: ModelSource | None = None, *, allow_pickle: bool = False) -> AdapterFactors:
    """Read an adapter, and check it as completely as that goes without its model.

    Raises:
        UsageError: a GGUF file without the model.
        ArtifactError: there is none, or it cannot be used; lists what is wrong.
    """
    contents = read_adapter(path, source, allow_pickle=allow_pickle)
    if contents.problems:
        raise UnusableAdapterError(contents.directory, contents.problems)
    if contents.described.config.target_parameters:
        raise ArtifactError(
            "adapts parameters that hold the matrices of several experts",
            where=str(contents.directory),
            why="what is computed here from the factors of an adapter is computed module by module",
            next_step="merge it into its base; adapters of modules can be combined, compared and compressed",
        )
    found, embeddings, others = _sorted_out(contents.tensors)
    if not found:
        raise ArtifactError("holds no factors", where=str(contents.directory))
    targets, problems = _adapted(contents, list(found))
    modules = {}
    for target in targets:
        lora_A, lora_B = found[target.name]["lora_A"], found[target.name]["lora_B"]
        if problem := _factor_problem(lora_A, lora_B, target.rank):
            problems.append(f"{target.name}: {problem}")
            continue
        modules[target.name] = ModuleFactors.from_file(
            lora_A.float(), lora_B.float(), target.scaling, embedding=target.name in embeddings
        )
    if problems:
        raise UnusableAdapterError(contents.directory, problems)
    ranks = sorted({module.rank for module in modules.values()})
    return AdapterFactors(
        _label(_name(contents.directory), "/".join(map(str, ranks))),
        contents.directory,
        contents.described,
        modules,
        targets,
        _stored_bytes(contents.directory),
        others,
        {key: tensor.nbytes for key, tensor in contents.tensors.items()} | dict(contents.stored_bytes),
        contents.record,
        _common_dtype(tensor for factors in found.values() for tensor in factors.values()),
    )


def _label(name: str, rank: str) -> str:
    """`runs/mine, rank 8`, but not `rank8, rank 8`."""
    return name if re.search(rf"rank[-_]?{re.escape(rank)}$", name) else f"{name}, rank {rank}"


def _factor_problem(lora_A: Tensor, lora_B: Tensor, rank: int) -> str | None:
    """What is wrong with the shapes of a module's factors, if anything is."""
    kernel = lora_B.shape[2:]
    if lora_A.dim() < 2 or lora_B.dim() < 2 or prod(kernel) != 1 or lora_A.shape[0] != lora_B.shape[1]:
        return f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not belong together"
    if lora_A.shape[0] != rank:
        return f"rank {lora_A.shape[0]} in the file, {rank} by the configuration"
    return None


def _sorted_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], set[str], dict[str, Tensor]]:
    """Factors by module, which modules are embeddings, and everything else."""
    found: dict[str, dict[str, Tensor]] = {}
    embeddings, others = set(), {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), "")
        name = key.removesuffix(suffix).removeprefix(PREFIX)
        factors = found.get(name, {})
        if not suffix or not key.startswith(PREFIX) or _SUFFIXES[suffix] in factors:
            others[key] = tensor
            continue
        if "embedding" in suffix:
            embeddings.add(name)
        found[name] = factors | {_SUFFIXES[suffix]: tensor}
    return found, embeddings, others


def _adapted(contents: AdapterContents, names: list[str]) -> tuple[list[Target], list[str]]:
    """The modules of the file as the configuration has them, and a sentence for each that it does not adapt."""
    config = contents.described.config
    try:
        chosen = {target.name for target in resolve_targets(config, names, heads=(), strict=False)}
    except UsageError as error:
        return [], [error.one_line]
    problems = [f"{name}: the configuration does not adapt this module" for name in names if name not in chosen]
    return module_values(config, [name for name in names if name in chosen], strict=False), problems


def _common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _stored_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    file = path / TENSOR_FILE
    return (file if file.exists() else path / PICKLE_FILE).stat().st_size


def base_weight(source: ModelSource, module: str, factors: ModuleFactors) -> Tensor:
    """The frozen weight of a module as (out, in), in the shape of its update.

    Raises:
        ArtifactError: the base model has no such weight, or one of another shape.
    """
    name = base_weight_name(source, module)
    weight = source.load(name)
    weight = weight.T if factors.embedding else weight.flatten(1)
    if tuple(weight.shape) != factors.shape:
        raise ArtifactError(
            f"the adapter is for a weight of {factors.shape}, the base model has {tuple(weight.shape)}",
            where=name,
            next_step="give the base that the adapter was trained on as --model",
        )
    return weight


def _name(path: Path) -> str:
    """`adapter` is what every run calls it: the run's name says more."""
    path = path.resolve()
    name = path.stem if path.is_file() else path.name
    return (path.parent.name or name) if name == "adapter" else name

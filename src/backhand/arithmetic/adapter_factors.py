"""The factors of an adapter from PEFT's files, module by module; no model is needed to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from backhand.adapters.adapter_directory import TENSOR_FILE, UnusableAdapterError, read_adapter_directory
from backhand.adapters.adapter_record import AdapterRecord
from backhand.adapters.checked_base import base_weight_name
from backhand.adapters.peft_keys import PREFIX
from backhand.adapters.targets import module_values
from backhand.errors import ArtifactError
from backhand.nn.loading.source import ModelSource

_SUFFIXES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
}


@dataclass(frozen=True)
class ModuleFactors:
    """One adapted module: delta_weight = scaling · lora_B @ lora_A.

    Attributes:
        lora_A: (rank, in) float32; of a convolution with the kernel's axes in `in`, of an embedding (rank, vocabulary).
        lora_B: (out, rank) float32.
        scaling: alpha / rank, or as the configuration says.
        embedding: whether the weight is stored as (in, out), as an embedding's is.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return self.lora_A.shape[0]


@dataclass(frozen=True)
class AdapterFactors:
    """An adapter.

    Attributes:
        label: for titles and tables: the rank, after the directory's name or, where that is `adapter`, the run's.
        directory: where its files lie.
        base_model: as adapter_config.json names it, if it does.
        modules: by dotted path, in the order of the file.
        stored_bytes: size of the file of factors.
        record: what backhand.json says of its base, if there is one.
    """

    label: str
    directory: Path
    base_model: str | None
    modules: Mapping[str, ModuleFactors]
    stored_bytes: int
    record: AdapterRecord | None = None

    @property
    def element_count(self) -> int:
        """Trained numbers."""
        return sum(module.lora_A.numel() + module.lora_B.numel() for module in self.modules.values())


def read_factors(path: Path) -> AdapterFactors:
    """Read an adapter as far as it goes without its model.

    Raises:
        ArtifactError: there is none, or it cannot be used; lists what is wrong.
    """
    contents = read_adapter_directory(path)
    if contents.problems:
        raise UnusableAdapterError(contents.directory, contents.problems)
    found: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for key, tensor in contents.tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            continue  # a copy of a base weight beside the factors of an embedding or head
        name = key.removesuffix(suffix).removeprefix(PREFIX)
        if "embedding" in suffix:
            embeddings.add(name)
        found.setdefault(name, {})[_SUFFIXES[suffix]] = tensor
    config = contents.described.config
    modules = {}
    for target in module_values(config, list(found), strict=False):
        lora_A, lora_B = (found[target.name][factor].float().flatten(1) for factor in ("lora_A", "lora_B"))
        if lora_A.shape[0] != lora_B.shape[1]:
            raise ArtifactError(
                f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not belong together",
                where=f"{contents.directory}: {target.name}",
            )
        modules[target.name] = ModuleFactors(lora_A, lora_B, target.scaling, target.name in embeddings)
    if not modules:
        raise ArtifactError("holds no factors", where=str(contents.directory))
    ranks = sorted({module.rank for module in modules.values()})
    label = f"{_name(contents.directory)}, rank {'/'.join(map(str, ranks))}"
    stored = (contents.directory / TENSOR_FILE).stat().st_size
    return AdapterFactors(label, contents.directory, contents.described.base_model, modules, stored, contents.record)


def base_weight(source: ModelSource, module: str, factors: ModuleFactors) -> Tensor:
    """The frozen weight of a module as (out, in), in the shape of its update.

    Raises:
        ArtifactError: the base model has no such weight, or one of another shape.
    """
    name = base_weight_name(source, module)
    weight = source.load(name)
    weight = weight.T if factors.embedding else weight.flatten(1)
    expected = (factors.lora_B.shape[0], factors.lora_A.shape[1])
    if tuple(weight.shape) != expected:
        raise ArtifactError(
            f"the adapter is for a weight of {expected}, the base model has {tuple(weight.shape)}",
            where=name,
            next_step="give the base that the adapter was trained on as --model",
        )
    return weight


def _name(directory: Path) -> str:
    """`adapter` is what every run calls it: the run's name says more."""
    directory = directory.resolve()
    return (directory.parent.name or directory.name) if directory.name == "adapter" else directory.name

"""Read an adapter's factors from PEFT's files, without a model, and check that several adapters fit one another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.adapters.contents import PICKLE_FILE, TENSOR_FILE, UnusableAdapterError
from backhand.adapters.loading import base_weight_name, check_source, read_adapter, source_digests
from backhand.adapters.module_factors import ModuleFactors, factors_without_model
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import PREFIX, factor_of
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import Target
from backhand.arithmetic.options import CombineOptions, CompressOptions, DiffOptions
from backhand.errors import ArtifactError
from backhand.nn.decoder.config_facts import config_facts, recorded_facts
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource
from backhand.words import name_list

_WHOLE_MODULE = "a whole module trained in addition to the factors, which is no update of low rank"


class Part(NamedTuple):
    """A kind of tensor in an adapter's file."""

    name: str
    no_update: str | None = _WHOLE_MODULE  # why the tensor is no part of a ΔW, None if it does not matter


_PARTS = {
    ".base_layer.weight": Part("copies of base weights", no_update=None),
    ".lora_magnitude_vector": Part(
        "magnitudes (DoRA)",
        no_update="DoRA scales the sum of base weight and update, which is no update that could be added",
    ),
    ".lora_B.bias": Part("biases of lora_B", no_update="a trained bias in addition to the factors"),
    ".trainable_tokens_delta": Part("trained token rows", no_update="trained rows of an embedding"),
}
"""Kinds of tensors that are no factors, by the suffix of the tensor's name."""
_WHOLE = Part("whole modules")


def part_of(key: str) -> Part:
    """Return the kind of the tensor with this name."""
    if (factor := factor_of(key)) is not None:
        return Part("lora_A" if "_A" in factor[1] else "lora_B")
    return next((part for end, part in _PARTS.items() if key.endswith(end)), _WHOLE)


@dataclass(frozen=True)
class AdapterFactors:
    """The factors of one adapter."""

    # title in tables and pictures: the name of the directory (or of the run, if the directory is `adapter`) and the
    # rank, unless the name contains it
    label: str
    directory: Path  # the adapter's directory, or its GGUF file
    described: PEFTConfig
    modules: Mapping[str, ModuleFactors]  # by dotted path, in the order of the file
    targets: Sequence[Target]  # rank, alpha and scaling of the same modules, as the configuration gives them
    stored_bytes: int  # size of the file with the factors
    # tensors of the file that are no factors, by name: base weights, magnitudes, whole modules
    others: Mapping[str, Tensor] = field(default_factory=dict)
    part_bytes: Mapping[str, int] = field(default_factory=dict)  # size of each tensor of the file, by name
    record: AdapterRecord | None = None
    dtype: torch.dtype = torch.float32  # of all factors in the file; float32 if they differ

    @property
    def whole_tensors(self) -> dict[str, Tensor]:
        """The tensors of modules that are trained in full, by name."""
        return {key.removeprefix(PREFIX): one for key, one in self.others.items() if part_of(key) is _WHOLE}

    @property
    def element_count(self) -> int:
        """The number of trained elements."""
        return sum(module.lora_A.numel() + module.lora_B.numel() for module in self.modules.values())


def read_factors(path: Path, source: ModelSource | None = None, *, allow_pickle: bool = False) -> AdapterFactors:
    """Read an adapter, and check it as far as possible without its model.

    Raises:
        UsageError: if it is a GGUF file and no model is given.
        ArtifactError: if there is no adapter, or it cannot be used; lists the problems.
    """
    contents = read_adapter(path, source, allow_pickle=allow_pickle)
    if contents.problems:
        raise UnusableAdapterError(contents.directory, contents.problems)
    if contents.described.config.target_parameters:
        raise ArtifactError(
            "adapts parameters that hold the matrices of several experts",
            where=str(contents.directory),
            why="adapters are combined, compared and compressed module by module",
            next_step="merge it into its base; adapters of modules can be combined, compared and compressed",
        )
    stored, targets, others = factors_without_model(contents)
    if not stored:
        raise ArtifactError("holds no factors", where=str(contents.directory))
    modules = {
        name: replace(module, lora_A=module.lora_A.float(), lora_B=module.lora_B.float())
        for name, module in stored.items()
    }
    ranks = sorted({module.rank for module in modules.values()})
    dtypes = {factor.dtype for module in stored.values() for factor in (module.lora_A, module.lora_B)}
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
        dtypes.pop() if len(dtypes) == 1 else torch.float32,
    )


def read_updates(
    paths: Sequence[Path], options: CombineOptions | DiffOptions | CompressOptions
) -> tuple[tuple[AdapterFactors, ...], ModelSource | None]:
    """Return adapters that consist of a ΔW per module and fit one another, and the base model if it is given.

    `diff` also takes modules that are trained in full, whose weights it compares.

    Raises:
        UsageError, ArtifactError: see `read_factors`, `refuse_more_than_factors` and `check_shapes`.
    """
    model = None if options.model is None else open_model(options.model)
    adapters = tuple(read_factors(path, model, allow_pickle=options.reading.allow_pickle) for path in paths)
    for adapter in adapters:
        refuse_more_than_factors(adapter, options)
    check_shapes(adapters)
    return adapters, model


def _label(name: str, rank: str) -> str:
    """Return a title such as `runs/mine, rank 8`, without repeating a rank that the name contains."""
    return name if re.search(rf"rank[-_]?{re.escape(rank)}$", name) else f"{name}, rank {rank}"


def _stored_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    file = path / TENSOR_FILE
    return (file if file.exists() else path / PICKLE_FILE).stat().st_size


def base_weight(source: ModelSource, module: str, factors: ModuleFactors) -> Tensor:
    """Return the frozen weight of a module as (out, in), in the shape of its update.

    Raises:
        ArtifactError: if the base model has no such weight, or one of another shape.
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
    """Return the directory's name, or the run's name for `adapter`, which every run uses."""
    path = path.resolve()
    name = path.stem if path.is_file() else path.name
    return (path.parent.name or name) if name == "adapter" else name


# Checks that the updates of adapters can be added: the tensors in their files, and the base they belong to.

_DIGESTS = {
    "base_digest": "base model: their adapted weights are not the same",
    "tokenizer_digest": "tokenizer: their tokens or merges are not the same",
    "chat_template_digest": "chat template: it is not the same",
}
_COPIED_FIELDS = (*_DIGESTS, "labels", "system", "model_config", "bare")
"""Fields that are copied into the new record if they are equal in all records."""


def refuse_more_than_factors(
    adapter: AdapterFactors, options: CombineOptions | DiffOptions | CompressOptions | None = None
) -> None:
    """Refuse an adapter that contains more than a ΔW per module.

    A copy of a base weight next to the factors of an embedding or head is not part of the update, and is accepted.

    Args:
        adapter: the adapter.
        options: of the command that needs it, for the advice; `diff` accepts modules that are trained in full.

    Raises:
        UnusableAdapterError: names every tensor that is not a factor.
    """
    parts = {key.removeprefix(PREFIX): part_of(key) for key in adapter.others}
    accepted = _WHOLE if isinstance(options, DiffOptions) else None
    if problems := [f"{key}: {part.no_update}" for key, part in parts.items() if part.no_update and part != accepted]:
        step = "continue one of the adapters on the rows of the other: backhand train --from-adapter"
        if isinstance(options, DiffOptions):
            step = "show the factors of each adapter by itself: backhand inspect"
        elif isinstance(options, CompressOptions):
            step = "use it as it is, or train again with a lower --rank: the smaller adapter would have factors alone"
        raise UnusableAdapterError(adapter.directory, problems, next_step=step)


def check_shapes(adapters: Sequence[AdapterFactors]) -> None:
    """Refuse adapters whose updates of one module have different sizes or kinds.

    Raises:
        ArtifactError: lists every such module with both shapes.
    """
    first_of: dict[str, AdapterFactors] = {}
    problems = []
    for adapter in adapters:
        for name, module in adapter.modules.items():
            other = first_of.setdefault(name, adapter).modules[name]
            if (module.weight_shape, module.embedding) != (other.weight_shape, other.embedding):
                problems.append(
                    f"{name}: a weight of {other.weight_shape} in {first_of[name].label}, "
                    f"of {module.weight_shape} in {adapter.label}"
                )
    if problems:
        raise ArtifactError(
            f"the adapters do not fit each other in {len(problems)} modules",
            why=name_list(problems, limit=12),
            next_step="combine adapters of one base model",
        )


def common_record(
    adapters: Sequence[AdapterFactors], source: ModelSource | None, *, force_base: bool
) -> tuple[AdapterRecord, tuple[str, ...]]:
    """Return the record of the base for the combination's backhand.json, and notes for the user.

    Args:
        adapters: checked here to belong to one base model, as far as their files tell.
        source: the base model if it is available; the adapters are then checked against it.
        force_base: return notes about different bases instead of raising.

    Raises:
        ArtifactError: if the adapters belong to different base models, tokenizers or chat templates; names them.
    """
    notes: list[str] = []
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    different = _differences(adapters)
    if different and not force_base:
        raise ArtifactError(
            "the adapters do not belong to the same model",
            why="; ".join(different),
            next_step="combine adapters of one base model, or give --force-base to combine them anyway",
        )
    notes += [f"combined by force: {sentence}" for sentence in different]
    records = [adapter.record or AdapterRecord() for adapter in adapters]
    agreed: dict[str, Any] = {
        field: _common([getattr(record, field) for record in records]) for field in _COPIED_FIELDS
    }
    if any(set(adapter.modules) != set(names) for adapter in adapters):
        agreed["base_digest"] = None
    origin = _common([record.origin for record in records])
    if source is not None:
        for adapter in adapters:
            notes += check_source(
                adapter.record, str(adapter.directory), source, adapter.modules, force_base=force_base
            )
        digests = source_digests(source, names)
        agreed |= {"base_digest": digests["base_digest"], "tokenizer_digest": digests["tokenizer_digest"]}
        agreed["model_config"] = recorded_facts(config_facts(source))
        origin = source.origin
    elif agreed["base_digest"] is None and any(record.base_digest for record in records):
        notes.append("the new adapter does not know its base model's digest: give --model to record it")
    agreed |= {"model_config": agreed["model_config"] or {}, "bare": agreed["bare"] or False}
    tokenizers = {agreed["tokenizer_digest"], *(record.tokenizer_digest for record in records)}
    if agreed["labels"] is None or len(tokenizers) > 1 or None in tokenizers:  # labels are tokens
        agreed["labels"] = {}
    return AdapterRecord(origin=origin, **agreed), tuple(notes)


def _differences(adapters: Sequence[AdapterFactors]) -> list[str]:
    """Return a sentence per difference between the adapters' own files."""
    found = []
    for name, sentence in _DIGESTS.items():
        by_digest: dict[str, str] = {}
        for adapter in adapters:
            digest = getattr(adapter.record, name, None)
            # Digests of different sets of weights cannot be compared.
            comparable = name != "base_digest" or set(adapter.modules) == set(adapters[0].modules)
            if digest is not None and comparable:
                by_digest.setdefault(digest, adapter.label)
        if len(by_digest) > 1:
            each = ", ".join(f"{label}: {digest[7:15]}…" for digest, label in by_digest.items())
            found.append(f"{sentence} ({each})")
    proven = _common([getattr(adapter.record, "base_digest", None) for adapter in adapters]) is not None
    by_name: dict[str, str] = {}
    for adapter in adapters:
        if adapter.described.base_model is not None:
            by_name.setdefault(adapter.described.base_model, adapter.label)
    if len(by_name) > 1 and not proven and not any(sentence.startswith("base model") for sentence in found):
        found.append(f"base model: {'; '.join(f'{name} of {label}' for name, label in by_name.items())}")
    return found


def _common(values: Sequence[Any]) -> Any:
    """Return the value if all are equal, else None."""
    return values[0] if all(value == values[0] for value in values) else None

"""Saving and loading an adapter as PEFT's files: lossless both ways, and strict on the way in.

A directory holds adapter_config.json, adapter_model.safetensors, README.md and backhand.json. Loading gives exactly
what was saved or raises one error that lists everything that is wrong; there is no loading in part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from backhand.adapters.adapter_directory import (
    CARD_FILE,
    CONFIG_FILE,
    RECORD_FILE,
    TENSOR_FILE,
    AdapterContents,
    UnusableAdapterError,
    read_adapter_directory,
)
from backhand.adapters.adapter_record import AdapterRecord, installed_packages, record_bytes
from backhand.adapters.atomic_files import make_directory, write_atomically
from backhand.adapters.config import LoRAConfig
from backhand.adapters.digests import bytes_digest
from backhand.adapters.model_card import model_card
from backhand.adapters.peft_config import PEFTConfig, peft_config_bytes
from backhand.adapters.peft_keys import FactorShapes, match_tensors, slot_shapes, trained_key
from backhand.adapters.safetensors_file import tensor_bytes
from backhand.adapters.targets import (
    OUTPUT_HEADS,
    Target,
    module_values,
    resolve_targets,
    target_slot,
    trained_beside,
)
from backhand.errors import CheckError, UsageError
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot, TrainedTensor
from backhand.nn.module_shapes import embeddings_of


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter from files, checked completely against a model's modules.

    Attributes:
        directory: where the files lie.
        described: configuration, base model and task as adapter_config.json has them.
        targets: the adapted modules.
        shapes: what each of them has in the file.
        factors: everything that was trained, by its name in `LoRAParameters`, on the CPU, in the dtype of the file.
        base_copies: whole base weights found beside factors of embeddings and heads, by module; to be compared with the
            base model by who has it.
        record: backhand.json, if there is one.
        slots: for linear modules and embeddings, what `LoRAParameters` takes.
        trained: the tensors trained as they are.
        forced: a sentence for each thing that is not as in training, where the user said to use the adapter anyway.
    """

    directory: Path
    described: PEFTConfig
    targets: tuple[Target, ...]
    shapes: tuple[FactorShapes, ...]
    factors: Mapping[str, Tensor]
    base_copies: Mapping[str, Tensor]
    record: AdapterRecord | None
    slots: tuple[LoRASlot, ...] = ()
    forced: tuple[str, ...] = ()
    trained: tuple[TrainedTensor, ...] = ()

    @property
    def config(self) -> LoRAConfig:
        """What the adapter looks like."""
        return self.described.config

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read over and may interest a person."""
        wide = [
            f"{shape.name}: rank {shape.lora_A[0]} is above the smaller side of its weight {shape.weight}"
            for shape in self.shapes
            if not shape.embedding and shape.lora_A[0] > min(shape.weight[:2])
        ]
        copies = [f"{name}: the file also holds the whole base weight" for name in self.base_copies]
        return (*self.forced, *self.described.notes, *wide, *copies, *self._overlapping())

    @property
    def beside(self) -> dict[str, str]:
        """By module, what it has that is no plain factors of a linear module; who knows only those must refuse it."""
        kinds = {tensor.name.rpartition(".")[0]: "it is trained in full, or in single rows" for tensor in self.trained}
        for shape in self.shapes:
            if shape.magnitude is not None:
                kinds[shape.name] = "DoRA rescales the sum of base weight and update"
            elif shape.lora_bias is not None:
                kinds[shape.name] = "lora_B has a bias"
            elif shape.embedding:
                kinds[shape.name] = "it is an embedding"
        return kinds

    def _overlapping(self) -> list[str]:
        """Modules whose alpha depends on the order of alpha_pattern's keys, which PEFT loses when it writes."""
        reordered = replace(self.config, alpha_pattern=dict(reversed(list(self.config.alpha_pattern.items()))))
        others = module_values(reordered, [target.name for target in self.targets], strict=False)
        return [
            f"{target.name}: keys of alpha_pattern overlap; alpha {target.alpha:g} is read, as in PEFT, but "
            f"{other.alpha:g} may have been trained"
            for target, other in zip(self.targets, others, strict=True)
            if target.alpha != other.alpha
        ]

    def fill(self, parameters: LoRAParameters) -> None:
        """Copy everything into `parameters`, which must have been built from `slots` and `trained`."""
        if parameters.layout != (self.slots, self.trained):
            raise ValueError("the parameters were built from other slots than the adapter's")
        with torch.no_grad():
            for name, view in parameters.named_tensors():
                view.copy_(self.factors[name])

    def parameters(self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoRAParameters:
        """New `LoRAParameters` that hold the adapter."""
        parameters = LoRAParameters(self.slots, trained=self.trained, device=device, dtype=dtype)
        self.fill(parameters)
        return parameters


def save_adapter(
    directory: Path | str,
    config: LoRAConfig,
    parameters: LoRAParameters,
    *,
    base_model: str | None,
    task_type: str | None = "CAUSAL_LM",
    revision: str | None = None,
    record: AdapterRecord | None = None,
    card: Mapping[str, object] | None = None,
    module_names: Collection[str] | None = None,
) -> Path:
    """Write an adapter of linear modules; the same adapter gives the same bytes.

    Args:
        directory: created if need be; files of an adapter that is there are replaced, each in one step.
        config, parameters, base_model, task_type, revision, record, card, module_names: see `adapter_files`.

    Returns:
        the directory.

    Raises:
        UsageError: the directory is a file, or a file in it is a link or a device.
        ResourceError: disk full or not writable; no file is left half written.
        CheckError: a value is not finite.
    """
    contents = adapter_files(
        config,
        parameters,
        base_model=base_model,
        task_type=task_type,
        revision=revision,
        record=record,
        card=card,
        module_names=module_names,
    )
    return write_files(Path(directory), contents)


def adapter_files(
    config: LoRAConfig,
    parameters: LoRAParameters,
    *,
    base_model: str | None,
    task_type: str | None = "CAUSAL_LM",
    revision: str | None = None,
    record: AdapterRecord | None = None,
    card: Mapping[str, object] | None = None,
    module_names: Collection[str] | None = None,
) -> dict[str, bytes]:
    """The files of an adapter of linear modules, by name, in the order to write them.

    Args:
        config: what `parameters` was built from.
        parameters: the trained factors; written in fp32.
        base_model: hub id or path that PEFT can open.
        task_type: as PEFT names it.
        revision: of the base model on the hub.
        record: origin and digests for backhand.json; package versions and file digests are added here.
        card: further rows for the table in README.md.
        module_names: all linear modules of the model, see `peft_config.written_targets`.

    Raises:
        CheckError: a value is not finite.
    """
    targets = module_values(config, list(parameters.slots), strict=False)
    for target, slot in zip(targets, parameters.slots.values(), strict=True):
        if (target.rank, target.scaling) != (slot.rank, slot.scaling):
            raise ValueError(f"{slot.name} has rank and scaling other than the configuration's")
    return module_adapter_files(
        PEFTConfig(config, base_model, task_type, revision),
        targets,
        [slot_shapes(slot) for slot in parameters.slots.values()],
        dict(parameters.named_tensors()),
        record,
        card,
        module_names,
        list(parameters.trained.values()),
    )


def module_adapter_files(
    described: PEFTConfig,
    targets: Sequence[Target],
    shapes: Sequence[FactorShapes],
    factors: Mapping[str, Tensor],
    record: AdapterRecord | None,
    card: Mapping[str, object] | None,
    module_names: Collection[str] | None,
    trained: Sequence[TrainedTensor] = (),
) -> dict[str, bytes]:
    """The files of an adapter of any modules, see `adapter_files`."""
    if bad := [name for name, tensor in factors.items() if not bool(torch.isfinite(tensor).all())]:
        raise CheckError(
            f"{len(bad)} of {len(factors)} factors hold values that are not finite",
            where=bad[0],
            next_step="lower the learning rate; nothing was written",
        )
    tensors = {key: factors[name] for module in shapes for name, key, _ in module.tensors()}
    tensors |= {trained_key(tensor): factors[tensor.name] for tensor in trained}
    elements = sum(tensor.numel() for tensor in tensors.values())
    contents = {
        CARD_FILE: model_card(described, targets, elements, card or {}).encode("utf-8"),
        TENSOR_FILE: tensor_bytes(tensors),
        CONFIG_FILE: peft_config_bytes(described, targets, module_names),
    }
    described_files = {name: bytes_digest(contents[name]) for name in (CONFIG_FILE, TENSOR_FILE)}
    record = replace(record or AdapterRecord(), files=described_files)
    if not record.packages:
        record = replace(record, packages=installed_packages())
    # Last, since it vouches for the others: after a crash in between, loading says that they do not fit.
    contents[RECORD_FILE] = record_bytes(record)
    return contents


def write_files(directory: Path, contents: Mapping[str, bytes]) -> Path:
    """Write an adapter's files in their order, each in one step; see `save_adapter` for what may go wrong."""
    make_directory(directory)
    for name, data in contents.items():
        write_atomically(directory / name, data)
    return directory


def load_adapter(
    directory: Path | str,
    module_shapes: Mapping[str, tuple[int, int]],
    *,
    heads: Collection[str] = OUTPUT_HEADS,
    allow_pickle: bool = False,
) -> LoadedAdapter:
    """Read an adapter of linear modules and embeddings, and check it completely.

    Args:
        directory: of the adapter, or one that holds a single adapter in a sub-folder.
        module_shapes: (out, in) of every linear module of the model, by dotted path; a `ModuleShapes` also knows
            embeddings and what else can be trained.
        heads: what `all-linear` leaves out, should the file say that.
        allow_pickle: also read adapter_model.bin, with torch's restricted unpickler.

    Raises:
        UnusableAdapterError: an ArtifactError that lists every problem; see its `problems`.
    """
    contents = read_adapter_directory(directory, allow_pickle=allow_pickle)
    return match_linear_adapter(contents, module_shapes, heads=heads)


def match_linear_adapter(
    contents: AdapterContents, module_shapes: Mapping[str, tuple[int, int]], *, heads: Collection[str] = OUTPUT_HEADS
) -> LoadedAdapter:
    """Hold an adapter of linear modules that has been read against a model; arguments and errors as `load_adapter`."""
    config = contents.described.config

    def slots(targets: Sequence[Target]) -> list[LoRASlot]:
        return [target_slot(target, module_shapes, config) for target in targets]

    loaded = match_adapter(
        contents,
        [*module_shapes, *embeddings_of(module_shapes)],
        lambda targets: [slot_shapes(slot) for slot in slots(targets)],
        linear=module_shapes.keys(),
        heads=heads,
        trained=lambda targets: trained_beside(config, module_shapes, [t.name for t in targets], strict=False),
    )
    return replace(loaded, slots=tuple(slots(loaded.targets)))


def match_adapter(
    contents: AdapterContents,
    module_names: Sequence[str],
    shapes: Callable[[Sequence[Target]], list[FactorShapes]],
    *,
    linear: Collection[str] | None = None,
    heads: Collection[str] = (),
    differences: Callable[[Sequence[Target]], list[str]] | None = None,
    trained: Callable[[Sequence[Target]], Sequence[TrainedTensor]] = lambda _: (),
) -> LoadedAdapter:
    """Hold what was read against a model.

    Args:
        contents: of the directory, with the problems found so far.
        module_names: every module that may be adapted.
        shapes: what targets must have in the file.
        linear, heads: for `all-linear`, see `targets.resolve_targets`.
        differences: what more is wrong with the targets, one sentence each; the tensors are then not looked at.
        trained: the tensors trained as they are, beside these targets.

    Raises:
        UnusableAdapterError: lists these problems and those found here.
    """
    problems = list(contents.problems)
    targets: list[Target] = []
    further: list[str] = []
    expected: list[FactorShapes] = []
    beside: Sequence[TrainedTensor] = ()
    if contents.config_usable:
        try:
            # What matches nothing is no problem in itself here: the tensors say what was adapted.
            targets = resolve_targets(contents.described.config, module_names, linear=linear, heads=heads, strict=False)
            further = differences(targets) if differences is not None else []
            if not further:
                expected, beside = shapes(targets), trained(targets)
        except UsageError as error:
            problems.append(str(error))
    matched = match_tensors(expected, contents.tensors, module_names, beside)
    problems.extend(matched.problems if expected else further)
    if problems:
        raise UnusableAdapterError(contents.directory, problems)
    return LoadedAdapter(
        contents.directory,
        contents.described,
        tuple(targets),
        tuple(expected),
        matched.factors,
        matched.base_copies,
        contents.record,
        trained=tuple(beside),
    )

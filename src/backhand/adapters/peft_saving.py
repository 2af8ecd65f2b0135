"""An adapter as PEFT's files: adapter_config.json, adapter_model.safetensors, README.md, and our backhand.json.

The same adapter gives the same bytes; each file is written in one step, the one that vouches for the others last.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from backhand.adapters.adapter_directory import CARD_FILE, CONFIG_FILE, RECORD_FILE, TENSOR_FILE
from backhand.adapters.adapter_record import AdapterRecord, installed_packages, record_bytes
from backhand.adapters.atomic_files import make_directory, write_atomically
from backhand.adapters.config import LoRAConfig
from backhand.adapters.digests import bytes_digest
from backhand.adapters.model_card import model_card
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_config_writer import peft_config_bytes
from backhand.adapters.peft_keys import FactorShapes, slot_shapes, trained_key
from backhand.adapters.safetensors_file import tensor_bytes
from backhand.adapters.targets import Target, module_values
from backhand.errors import CheckError
from backhand.nn.lora_parameters import LoRAParameters, TrainedTensor


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
        module_names: all linear modules of the model, see `peft_config_writer.written_targets`.

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

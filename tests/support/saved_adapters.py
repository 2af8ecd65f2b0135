"""Adapters of linear modules written straight to a directory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import read_adapter_directory
from backhand.adapters.loading import LoadedAdapter, match_linear_adapter
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_saving import AdapterParts, adapter_files
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import OUTPUT_HEADS, resolve_adapter
from backhand.files import write_together
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot


def resolve_slots(
    config: LoRAConfig, module_shapes: Mapping[str, tuple[int, int]], *, heads: Collection[str] = OUTPUT_HEADS
) -> list[LoRASlot]:
    """Return the modules that `config` adapts on a model, without the tensors that are trained in addition."""
    return list(resolve_adapter(config, module_shapes, heads=heads).slots)


def load_adapter(
    directory: Path | str, module_shapes: Mapping[str, tuple[int, int]], *, allow_pickle: bool = False
) -> LoadedAdapter:
    """The adapter in a directory, checked completely against the modules of a model."""
    return match_linear_adapter(read_adapter_directory(directory, allow_pickle=allow_pickle), module_shapes)


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
        config, parameters, base_model, record, module_names: see `backhand.adapters.peft_saving.adapter_files`.

    Returns:
        the directory.

    Raises:
        UsageError: the directory is a file, or a file in it is a link or a device.
        ResourceError: disk full or not writable; no file is left half written.
        CheckError: a value is not finite.
    """
    parts = AdapterParts.of(PEFTConfig(config, base_model, task_type, revision), parameters)
    write_together(Path(directory), adapter_files(parts, record=record, card=card, module_names=module_names))
    return Path(directory)

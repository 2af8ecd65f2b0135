"""Open the base model of a command: the one that is named, or else the one that its adapter was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from backhand.adapters.contents import CONFIG_FILE, RECORD_FILE, find_adapter, read_json_object
from backhand.adapters.gguf_adapter import is_gguf_file
from backhand.adapters.peft_config import PEFTConfig, read_peft_config
from backhand.adapters.record import AdapterRecord, read_record
from backhand.errors import ArtifactError
from backhand.nn.loading.hub import is_hub_id
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.stores import LM_STUDIO, OLLAMA, PACKAGED, SMOLLM2


def open_base(model: str | None, adapter: Path | str | None, *, quantize: str | None = None) -> ModelSource:
    """Open the base model of a command without reading its weights.

    Args:
        model: name or path of the model; None for the model that the adapter was trained on, or `smollm2-135m` if there
            is no adapter, or its files name no model.
        adapter: directory of an adapter, or a GGUF file, which names no model.

    Raises:
        ArtifactError: if there is no adapter, or the model cannot be opened. Nothing that only an adapter names is
            downloaded.
        UsageError: see `open_model`.
    """
    if model is not None or adapter is None or is_gguf_file(adapter):
        return open_model(model or SMOLLM2, quantize=quantize)
    directory = find_adapter(adapter)
    described, _ = read_peft_config(read_json_object(directory / CONFIG_FILE))
    record = None
    with suppress(ArtifactError):  # reported when the whole adapter is read
        record = read_record(read_json_object(directory / RECORD_FILE), RECORD_FILE)
    names = recorded_bases(described, record)
    if not names:
        return open_model(SMOLLM2, quantize=quantize)
    try:
        return open_recorded(names, described.revision, quantize=quantize)
    except ArtifactError as error:
        name = names[-1]
        next_step = "give --model with its place on this machine"
        raise ArtifactError(
            f"the adapter was trained on {name}, which cannot be opened",
            where=str(directory),
            why=error.what + (f": {error.why}" if error.why else ""),
            next_step=f"give --model {name}, which downloads it" if is_hub_id(name) else next_step,
        ) from None


def recorded_bases(described: PEFTConfig, record: AdapterRecord | None) -> list[str]:
    """Return the names for `open_model` of the base of an adapter, the surest first; empty if its files name none."""
    name, origin = described.base_model, (record and record.origin) or ""
    if name is None:
        return []
    if origin.startswith((OLLAMA, LM_STUDIO)):
        return [origin, name]
    packaged = PACKAGED.get(name)
    # A hub id may also be that of the model in a package, whose weights may be quantized.
    return [name] if packaged is None or origin.startswith(name) else [packaged, name]


def open_recorded(names: Sequence[str], revision: str | None, *, quantize: str | None = None) -> ModelSource:
    """Open the first of several names that is on this machine. Raises ArtifactError of the last one if none is."""
    for name in names[:-1]:
        with suppress(ArtifactError):
            return open_model(name, fetch=False, quantize=quantize)
    return open_model(names[-1], revision=revision, fetch=False, quantize=quantize)

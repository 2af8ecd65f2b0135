"""Base models in GGUF files, whole or split into parts."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.kernels.dequantize import is_compiled, native_dtype, type_name
from backhand.kernels.quantized_matrix import StoredRows
from backhand.nn.loading.expert_tensors import parse_expert_name
from backhand.nn.loading.gguf_config import huggingface_config
from backhand.nn.loading.gguf_families import prediction_block_count
from backhand.nn.loading.gguf_file import GGUFFile, GGUFTensor
from backhand.nn.loading.gguf_layouts import Layout, layout, stored_sizes
from backhand.nn.loading.gguf_tensors import (
    ARCHITECTURES,
    GRANITE_HYBRID,
    GRANITE_PARTS,
    LONG_FACTORS,
    ROPE_FACTORS,
    SCORE_HEAD,
    SHORT_FACTORS,
    has_shared_mlp,
    huggingface_name,
    huggingface_names,
    is_skipped,
    shared_name,
)
from backhand.nn.loading.gguf_tokenizer import build_tokenizer
from backhand.nn.loading.gguf_values import dequantize_into, dequantized, is_readable
from backhand.nn.loading.source import ModelSource, shape_mismatch
from backhand.nn.loading.wrappers import is_excluded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_PART = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


_NO_LANGUAGE_MODEL = ("clip", "mmproj")


class GGUFModel(ModelSource):
    """An opened GGUF model. The tensors stay mapped and quantized until they are read.

    Args:
        path: the file, or any part of a split model.
        hub_id: the id under which others can download the model, None if unknown.
        origin: a readable description of the source, the path if not given.

    Attributes:
        metadata: the file with the metadata. Its `tensors` contain the tensors of all parts.

    Raises:
        ArtifactError: if a file is missing or damaged, or its architecture is unknown; names the file.
    """

    def __init__(self, path: Path, *, hub_id: str | None = None, origin: str | None = None) -> None:
        self.path = path
        self.hub_id = hub_id
        self.origin = origin or str(path)
        self._files = [GGUFFile(part) for part in _parts(path)]
        self.metadata = self._files[0]
        self._check_parts()
        self.architecture = self._checked_architecture()
        self._place_of: dict[str, GGUFFile] = {}
        for file in self._files:
            for name in file.tensors:
                if name in self._place_of:
                    raise ArtifactError(
                        f"two parts of the model contain the tensor {name}",
                        where=f"{self._place_of[name].path}, {file.path}",
                        next_step="download the parts again: one belongs to another model or is duplicated",
                    )
                self._place_of[name] = file
        for file in self._files[1:]:
            self.metadata.tensors |= file.tensors
        self._check_types()
        self._drop_prediction_blocks()
        self.config = huggingface_config(self.metadata, self.architecture, self._rope_factors())
        self._sizes = stored_sizes(self.config)

    @cached_property
    def _stored(self) -> dict[str, tuple[GGUFTensor, ...]]:
        """Stored tensors by Hugging Face name. Several tensors are consecutive rows of one in Hugging Face."""
        stored: dict[str, tuple[GGUFTensor, ...]] = {}
        for name, tensor in self.metadata.tensors.items():
            names = huggingface_names(self.architecture, name, tensor.shape)
            if names and not is_excluded(self.config, names[0]):
                single = parse_expert_name(names[0]) is None
                parts = [tensor] if single else _expert_tensors(tensor, len(names))
                stored.update(zip(names, ((part,) for part in parts), strict=True))
        if self.architecture == GRANITE_HYBRID:
            shared = has_shared_mlp(self.config)
            blocks = [f"model.layers.{layer}." for layer in range(self.config["num_hidden_layers"])]
            for block, (ours, pieces) in product(("", *blocks), GRANITE_PARTS[self.config["model_type"]].items()):
                inside = [block + (shared_name(piece) if shared else piece) for piece in pieces]
                if all(name in stored for name in inside):
                    stored[block + ours] = tuple(stored.pop(name)[0] for name in inside)
        return stored

    def tensor_names(self) -> tuple[str, ...]:
        """Return the Hugging Face names of all tensors."""
        of_head = ARCHITECTURES[self.architecture].head.values()
        return tuple(name for name in self._stored if name.rpartition(".")[0] not in of_head)

    def head_tensor(self, name: str) -> Tensor | None:
        """Return a parameter of a score head, None if it is not there; some converters store C of one row as a list."""
        if name not in self._stored:
            return None
        tensor, is_list = self.load(name), len(self._tensors(name)[0].shape) == 1
        return tensor[None] if is_list and huggingface_name(self.architecture, SCORE_HEAD) == name else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in Hugging Face layout."""
        first, *others = self._tensors(name)
        rows, *columns = layout(self.architecture, name, self._sizes).shape(first.shape)
        return rows + sum(other.shape[0] for other in others), *columns

    def load(self, name: str) -> Tensor:
        """Return the tensor in Hugging Face layout: float32 if it is quantized, otherwise in the stored dtype."""
        parts, values = self._tensors(name), []
        for tensor in parts:
            values.append(dequantized(self._bytes(tensor), tensor.type_id).view(tensor.shape))
            self._place_of[tensor.name].drop_pages(tensor)
        return self._layout(name).to_huggingface(values[0] if len(values) == 1 else torch.cat(values))

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype, or float32 if the tensor is quantized."""
        return native_dtype(self._tensors(name)[0].type_id) or torch.float32

    def check_unchanged(self) -> None:
        """Check that every part is unchanged since it was opened.

        Raises:
            ArtifactError: if a part has changed; names the part.
        """
        for file in self._files:
            file.check_unchanged()

    @property
    def mapped_bytes(self) -> int:
        """Size of all parts in bytes."""
        return sum(file.size for file in self._files)

    def drop_mapped_pages(self) -> None:
        """Release the resident pages of every tensor."""
        for tensors in self._stored.values():
            for tensor in tensors:
                self._place_of[tensor.name].drop_pages(tensor)

    def stored_parts(self, name: str) -> list[StoredRows]:
        """Return the blocks of a matrix, mapped, with the order of its rows or columns as an index tensor."""
        return [self._rows(tensor, self._layout(name)) for tensor in self._tensors(name)]

    def _rows(self, tensor: GGUFTensor, stored_layout: Layout) -> StoredRows:
        data = self._bytes(tensor)
        blocks = data.reshape(tensor.shape[0], -1)
        if stored_layout.is_plain:
            return StoredRows(blocks, tensor.type_id)
        if stored_layout.reorders_columns:
            columns = stored_layout.to_huggingface(torch.arange(tensor.shape[1])[None])[0].contiguous()
            return StoredRows(blocks, tensor.type_id, column_order=columns)
        rows = stored_layout.to_huggingface(torch.arange(tensor.shape[0])).contiguous()
        return StoredRows(blocks, tensor.type_id, rows)

    def stored_bytes(self, name: str) -> int:
        """Return the size of a tensor's blocks in bytes."""
        return sum(tensor.byte_count for tensor in self._tensors(name))

    @property
    def quantized(self) -> bool:
        """True if some matrices are stored as quantized blocks."""
        return any(native_dtype(type_id) is None for type_id in self._matrix_types)

    @property
    def slow_types(self) -> tuple[str, ...]:
        """Names of matrix types that the gguf package dequantizes, because they have no compiled kernel."""
        return tuple(type_name(type_id) for type_id in sorted(self._matrix_types) if not is_compiled(type_id))

    @property
    def _matrix_types(self) -> set[int]:
        return {tensor.type_id for parts in self._stored.values() for tensor in parts if len(tensor.shape) == 2}

    def stored_tensors(self, name: str) -> list[tuple[GGUFTensor, np.ndarray[Any, np.dtype[np.uint8]]]]:
        """Return the stored tensors with this Hugging Face name, in the order of its rows, and their bytes, mapped.

        Raises:
            ArtifactError: if there is no such tensor.
        """
        return [(tensor, self._bytes(tensor)) for tensor in self._tensors(name)]

    def _bytes(self, tensor: GGUFTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the stored bytes of a tensor or of one expert in it."""
        return self._place_of[tensor.name].bytes_of(tensor)

    def bytes_of(self, stored_name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the stored bytes of the tensor with this GGUF name, mapped."""
        return self._place_of[stored_name].bytes_of(self.metadata.tensors[stored_name])

    def load_into(self, name: str, destination: Tensor) -> None:
        """Dequantize a tensor directly into `destination`."""
        parts = self._tensors(name)
        if self.shape(name) != tuple(destination.shape):
            raise ArtifactError(shape_mismatch(name, self.shape(name), tuple(destination.shape)), where=str(self.path))
        if self._layout(name).is_plain:
            rows = destination.split([tensor.shape[0] for tensor in parts])
            for tensor, piece in zip(parts, rows, strict=True):
                dequantize_into(self._bytes(tensor), tensor.type_id, piece)
        else:
            destination.copy_(self.load(name))
        for tensor in parts:
            self._place_of[tensor.name].drop_pages(tensor)

    def _layout(self, name: str) -> Layout:
        stored_layout, tensor = layout(self.architecture, name, self._sizes), self._tensors(name)[0]
        if (misfit := stored_layout.misfit(tensor.shape)) is not None:
            raise ArtifactError(f"{tensor.name}: {misfit}", where=str(self.path), next_step="download the file again")
        return stored_layout

    def _tensors(self, name: str) -> tuple[GGUFTensor, ...]:
        if name not in self._stored:
            raise ArtifactError(f"there is no tensor {name}", where=str(self.path), next_step="download the file again")
        return self._stored[name]

    def _rope_factors(self) -> dict[str, Tensor]:
        stored = ((name, self.metadata.tensors.get(name)) for name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS))
        return {
            name: dequantized(self.bytes_of(name), tensor.type_id).float()
            for name, tensor in stored
            if tensor is not None
        }

    def _drop_prediction_blocks(self) -> None:
        """Remove the multi-token prediction blocks after the last layer: they are neither read nor counted."""
        count = prediction_block_count(self.metadata, self.architecture)
        blocks = self.metadata.value(f"{self.architecture}.block_count")
        if not count or not isinstance(blocks, int):
            return
        prefixes = tuple(f"blk.{layer}." for layer in range(max(blocks - count, 0), blocks))
        for name in [name for name in self.metadata.tensors if name.startswith(prefixes)]:
            del self.metadata.tensors[name]

    def _check_parts(self) -> None:
        """Check what each part of a split model states: its number, and how many parts and tensors there are."""
        stated = self.metadata.value("split.count", 0)
        if isinstance(stated, int) and stated > 1 and len(self._files) == 1:
            raise ArtifactError(
                f"{self.path} is one of {stated} parts of a model, and its name does not lead to the others",
                next_step=f"restore the parts' names, such as model-00001-of-{stated:05d}.gguf, in one directory",
            )
        tensors = sum(len(file.tensors) for file in self._files)
        for number, file in enumerate(self._files if len(self._files) > 1 else ()):
            due = {"split.no": number, "split.count": len(self._files), "split.tensors.count": tensors}
            for key, value in due.items():
                if (states := file.value(key, value)) != value:
                    raise ArtifactError(
                        f"the part states {key} {states!r:.40}, and by the files' names and contents it is {value}",
                        where=str(file.path),
                        next_step="download all parts again into one directory, and keep their names",
                    )

    def _check_types(self) -> None:
        """Check, before any tensor is read, that every tensor can be dequantized."""
        bad = {
            f"{tensor.name} ({type_name(tensor.type_id)})"
            for name, tensor in self.metadata.tensors.items()
            if not is_readable(tensor.type_id) and not is_skipped(self.architecture, name)
        }
        if bad:
            shown = sorted(bad)[:3]
            raise ArtifactError(
                f"{len(bad)} tensors have a storage type that cannot be read: {', '.join(shown)}",
                where=str(self.path),
                why="the gguf package cannot dequantize the type",
                next_step="use a file with another quantization, such as Q8_0, Q4_K_M or BF16",
            )

    def _checked_architecture(self) -> str:
        architecture = self.metadata.value("general.architecture")
        if self.metadata.value("general.type", "model") == "adapter":
            raise ArtifactError(
                f"{self.path} is an adapter, not a base model",
                next_step="give it as --adapter, and its base model as --model",
            )
        is_image_part = str(architecture) in _NO_LANGUAGE_MODEL
        if is_image_part or self.metadata.value("general.type") == "imatrix":
            what = "the image part of a model" if is_image_part else "an importance matrix"
            raise ArtifactError(
                f"{self.path} is {what}, not a language model", next_step="give the .gguf file of the language model"
            )
        if architecture is None:
            raise ArtifactError(
                f"{self.path} does not state its architecture",
                why="general.architecture is missing; llama.cpp cannot open the file either",
                next_step="download the file again, or use the model's Hugging Face directory",
            )
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ArtifactError(
                f"GGUF files of architecture {architecture!r:.60} cannot be read",
                where=str(self.path),
                why=f"the known architectures are {', '.join(ARCHITECTURES)}",
                next_step="use the model's Hugging Face directory",
            )
        known: str = architecture
        return known

    def _read_tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.metadata)

    def _stated_stop_ids(self) -> list[int]:
        ends = (self.metadata.value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom"))
        return [*super()._stated_stop_ids(), *(end for end in ends if isinstance(end, int))]


def _expert_tensors(tensor: GGUFTensor, count: int) -> list[GGUFTensor]:
    """Split a stacked tensor into `count` consecutive matrices, each with the name of the stack."""
    size = tensor.byte_count // count
    return [
        replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + number * size, byte_count=size)
        for number in range(count)
    ]


def _parts(path: Path) -> list[Path]:
    """Return all parts of a split model in order, the one with the metadata first, or the file if it is not split."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise ArtifactError(
            f"{len(missing)} of {count} parts of the model are missing: {', '.join(missing)}",
            where=str(path.parent),
            next_step="download the missing parts into the same directory",
        )
    return parts

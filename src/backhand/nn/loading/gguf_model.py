"""A base model in a GGUF file, or in the parts of a split one."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_config import huggingface_config
from backhand.nn.loading.gguf_dequantize import dequantize_into, dequantized
from backhand.nn.loading.gguf_file import GGUFFile, GGUFTensor
from backhand.nn.loading.gguf_tensors import ARCHITECTURES, ROPE_FACTORS, huggingface_name, layout
from backhand.nn.loading.gguf_tokenizer import build_tokenizer
from backhand.nn.loading.source import ModelSource, mismatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PART = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFModel(ModelSource):
    """An opened GGUF file; the tensors stay mapped and quantized until they are read.

    Args:
        path: of the file; of any part of a split one.
        hub_id: the id under which others can fetch the model, None if unknown.
        origin: how to name it to people; the path if not given.

    Raises:
        ArtifactError: naming the file, for one that is missing, damaged, or of an architecture that cannot be read.
    """

    def __init__(self, path: Path, *, hub_id: str | None = None, origin: str | None = None) -> None:
        self.path = path
        self.hub_id = hub_id
        self.origin = origin or str(path)
        self._files = [GGUFFile(part) for part in _parts(path)]
        self._main = self._files[0]
        self.architecture = self._known_architecture()
        self._place_of: dict[str, GGUFFile] = {}
        for file in self._files:
            self._place_of |= dict.fromkeys(file.tensors, file)
        for file in self._files[1:]:
            self._main.tensors |= file.tensors
        self.config = huggingface_config(self._main, self.architecture, self._rope_factors())
        self._head_dim: int = self.config["head_dim"]

    @cached_property
    def _stored(self) -> dict[str, GGUFTensor]:
        named = ((huggingface_name(self.architecture, name), tensor) for name, tensor in self._main.tensors.items())
        return {name: tensor for name, tensor in named if name is not None}

    def tensor_names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors."""
        return tuple(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in Hugging Face layout."""
        return self._tensor(name).shape

    def load(self, name: str) -> Tensor:
        """The tensor in Hugging Face layout: float32 if it is quantized, else as it is stored."""
        tensor = self._tensor(name)
        values = dequantized(self.bytes_of(tensor.name), tensor.type_id)
        self._place_of[tensor.name].forget(tensor)
        return layout(self.architecture, name, self._head_dim).restored(values.view(tensor.shape))

    @property
    def metadata(self) -> GGUFFile:
        """The file with the metadata; its `tensors` are those of all parts."""
        return self._main

    def stored_tensor(self, name: str) -> tuple[GGUFTensor, np.ndarray[Any, np.dtype[np.uint8]]]:
        """Where the tensor of this Hugging Face name lies, and its stored bytes, mapped.

        Raises:
            ArtifactError: if there is no such tensor.
        """
        tensor = self._tensor(name)
        return tensor, self.bytes_of(tensor.name)

    def bytes_of(self, stored_name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Stored bytes of the tensor that the file calls `stored_name`, mapped."""
        return self._place_of[stored_name].bytes_of(self._main.tensors[stored_name])

    def load_into(self, name: str, destination: Tensor) -> None:
        """Dequantise straight into the destination."""
        tensor = self._tensor(name)
        if tensor.shape != tuple(destination.shape):
            raise ArtifactError(mismatch(name, tensor.shape, tuple(destination.shape)), where=str(self.path))
        if layout(self.architecture, name, self._head_dim).is_plain:
            dequantize_into(self.bytes_of(tensor.name), tensor.type_id, destination)
        else:
            destination.copy_(self.load(name))
        self._place_of[tensor.name].forget(tensor)

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self._stored:
            raise ArtifactError(f"there is no tensor {name}", where=str(self.path), next_step="fetch the file again")
        return self._stored[name]

    def _rope_factors(self) -> Tensor | None:
        tensor = self._main.tensors.get(ROPE_FACTORS)
        if tensor is None:
            return None
        return dequantized(self.bytes_of(ROPE_FACTORS), tensor.type_id).float()

    def _known_architecture(self) -> str:
        architecture = self._main.value("general.architecture")
        if self._main.value("general.type", "model") == "adapter":
            raise ArtifactError(
                f"{self.path} is an adapter, not a base model",
                next_step="give it as --adapter, and its base as --model",
            )
        if architecture not in ARCHITECTURES:
            raise ArtifactError(
                f"GGUF files of architecture {architecture!r} cannot be read",
                where=str(self.path),
                why=f"known are {', '.join(ARCHITECTURES)}",
                next_step="use the model's Hugging Face directory",
            )
        known: str = architecture
        return known

    def _read_tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self._main)

    def _stated_stop_ids(self) -> list[int]:
        ends = (self._main.value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom"))
        return [*super()._stated_stop_ids(), *(end for end in ends if end is not None)]


def _parts(path: Path) -> list[Path]:
    """All parts of a split model in order, first the one with the metadata; the file alone if it is whole."""
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
            next_step="fetch the missing parts into the same directory",
        )
    return parts

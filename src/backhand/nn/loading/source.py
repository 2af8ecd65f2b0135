"""The interface of an opened base model: configuration, tensors and tokenizer, whatever the file format."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.nn.families.config_fields import token_ids
from backhand.nn.loading.stop_tokens import stop_token_ids
from backhand.nn.loading.wrappers import Wrapper
from backhand.ops.weight_tiles import FrozenMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_NATIVE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""ggml's type numbers of the dtypes that torch has too."""


class ModelSource(ABC):
    """An opened base model.

    Methods that read a tensor or the tokenizer raise ArtifactError if it is missing, has another shape, or cannot be
    read.
    """

    config: dict[str, Any]  # Hugging Face configuration keys, as in config.json
    path: Path  # the model's directory or file
    hub_id: str | None  # the id under which others can download the model, None if it is local only
    origin: str  # a readable description of the source, for messages and for backhand.json
    # The enclosing image model if the files contain one. `config` and all names are the text model's.
    wrapper: Wrapper | None = None

    @abstractmethod
    def tensor_names(self) -> tuple[str, ...]:
        """Return the Hugging Face names of all tensors, without a tied head."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in Hugging Face layout.

        Raises:
            ArtifactError: if there is no such tensor.
        """

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """Return a tensor in Hugging Face layout on the CPU.

        The dtype is the stored one, or float32 if the tensor is quantized. The result may be a view of the mapped
        file.
        """

    def head_tensor(self, name: str) -> Tensor | None:
        """Return a parameter of the head of transformers' class for sequence classification; None if it is not there.

        Such a tensor of an encoder is not among `tensor_names`, since it is not part of the base.
        """
        return self.load(name) if name in self.tensor_names() else None

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor that `load` returns, without dequantizing anything."""
        return self.load(name).dtype

    def check_unchanged(self) -> None:  # noqa: B027 - most formats are read once and not mapped
        """Check that mapped files have not changed since they were opened. Cheap enough to call in every step.

        Raises:
            ArtifactError: if a file has changed; names the file and the change.
        """

    @property
    def mapped_bytes(self) -> int:
        """Size of the files that stay mapped, in bytes."""
        return 0

    def drop_mapped_pages(self) -> None:  # noqa: B027 - most formats are read once and not mapped
        """Release the resident pages of mapped files. They are read from disk again on the next access."""

    def load_into(self, name: str, destination: Tensor) -> None:
        """Write a tensor into `destination` with one rounding and without an intermediate copy.

        Args:
            destination: contiguous, of the tensor's shape, of any floating dtype, on any device.
        """
        if self.shape(name) != tuple(destination.shape):
            raise ArtifactError(shape_mismatch(name, self.shape(name), tuple(destination.shape)), where=str(self.path))
        destination.copy_(self.load(name))

    def stored_parts(self, name: str) -> list[StoredRows]:
        """Return a matrix in its stored form, mapped if the source maps its files.

        The parts are consecutive rows in Hugging Face order, several if the source stores the matrix in several
        tensors.
        """
        tensor = self.load(name).detach().cpu().contiguous()
        if tensor.dtype not in _NATIVE_TYPES:
            tensor = tensor.float()
        return [StoredRows(tensor.view(torch.uint8).numpy(), _NATIVE_TYPES[tensor.dtype])]

    def load_in_pieces(self, name: str) -> FrozenMatrix:
        """Return a matrix as a float32 QuantizedMatrix, dequantized block by block, and any other tensor by `load`."""
        return (
            QuantizedMatrix(self.stored_parts(name), torch.float32) if len(self.shape(name)) == 2 else self.load(name)
        )

    def stored_bytes(self, name: str) -> int:
        """Return the stored size of a tensor in bytes."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    @property
    def quantized(self) -> bool:
        """True if some matrices are stored as quantized blocks."""
        return False

    @property
    def slow_types(self) -> tuple[str, ...]:
        """Names of stored matrix types without a compiled kernel. The gguf package dequantizes them, much slower."""
        return ()

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Contents of generation_config.json, empty if there is no such file."""
        return {}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the model's fast tokenizer with its chat template. Every call returns the same object."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return self._read_tokenizer()

    @abstractmethod
    def _read_tokenizer(self) -> PreTrainedTokenizerFast: ...

    def stop_token_ids(self) -> tuple[int, ...]:
        """Return the ids that complete a generated answer (end of text, end of turn), ascending."""
        return stop_token_ids(self.tokenizer(), self._stated_stop_ids())

    def _stated_stop_ids(self) -> list[int]:
        stated: list[int] = []
        for config in (self.generation_config, self.config):
            stated += token_ids(config.get("eos_token_id"))
        return stated


class DerivedSource(ModelSource):
    """A model that is computed from another one. It has everything of the other one that it does not compute itself.

    Attributes:
        source: the other model.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.config, self.path, self.hub_id, self.origin = source.config, source.path, source.hub_id, source.origin
        self.wrapper = source.wrapper

    def tensor_names(self) -> tuple[str, ...]:
        return self.source.tensor_names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def check_unchanged(self) -> None:
        self.source.check_unchanged()

    @property
    def mapped_bytes(self) -> int:
        return self.source.mapped_bytes

    def drop_mapped_pages(self) -> None:
        self.source.drop_mapped_pages()

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return self.source.generation_config

    def _read_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.source.tokenizer()


def shape_mismatch(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return the message for a tensor whose shape does not fit the configuration."""
    return f"{name} has shape {shape}, and the configuration asks for {expected}"


def fill(
    source: ModelSource,
    destinations: Iterable[tuple[str, Tensor]],
    examine: Callable[[Sequence[str]], None] | None = None,
) -> None:
    """Load tensors of a source into existing tensors, after checking all names and shapes.

    Args:
        destinations: (Hugging Face name, contiguous tensor to fill).
        examine: called with the names of a few tensors just before they are written, to read them while their pages
            are at hand.

    Raises:
        ArtifactError: if tensors are missing or have another shape; lists all of them. Nothing has been written then.
    """
    tensors = dict(destinations)
    check_shapes(source, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    names = list(tensors)
    at_once = torch.get_num_threads() if examine is not None else max(1, len(names))
    for start in range(0, len(names), at_once):
        few = names[start : start + at_once]
        if examine is not None:
            examine(few)
        for name in few:
            source.load_into(name, tensors[name])


def check_shapes(source: ModelSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a source has tensors of the expected names and shapes.

    Raises:
        ArtifactError: if tensors are missing or have another shape; lists all of them.
    """
    available = set(source.tensor_names())
    problems = [
        f"{name} {shape} is missing" if name not in available else shape_mismatch(name, source.shape(name), shape)
        for name, shape in expected.items()
        if name not in available or source.shape(name) != shape
    ]
    if problems:
        shown = problems[:_SHOWN_PROBLEMS]
        rest = len(problems) - len(shown)
        raise ArtifactError(
            f"the weights do not fit the configuration in {len(problems)} of {len(expected)} tensors",
            where=str(source.path),
            why="; ".join([*shown, f"and {rest} more"] if rest else shown),
            next_step="fetch the model again; config.json and weights may belong to different models",
        )


_SHOWN_PROBLEMS = 12


def check_floating(tensor: Tensor, name: str, where: str) -> Tensor:
    """Return the tensor unchanged.

    Raises:
        ArtifactError: if its dtype is not float64, float32, float16 or bfloat16.
    """
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ArtifactError(
            f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is not a floating-point dtype",
            where=where,
            why="quantized weights are read from GGUF files only",
        )
    return tensor

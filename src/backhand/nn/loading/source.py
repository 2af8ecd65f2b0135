"""Where a base model's configuration, tensors and tokenizer come from: one interface for every kind of file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.loading.stop_tokens import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ModelSource(ABC):
    """An opened base model.

    Attributes:
        config: Hugging Face configuration keys, as config.json has them.
        path: the directory or file it lies in.
        hub_id: the id under which others can fetch it, None if it is only here.
        origin: where it came from, in words for people and for backhand.json.
    """

    config: dict[str, Any]
    path: Path
    hub_id: str | None
    origin: str

    @abstractmethod
    def tensor_names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors; a tied head is not among them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in Hugging Face layout.

        Raises:
            ArtifactError: if there is no such tensor.
        """

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """A tensor in Hugging Face layout, on the CPU, in the dtype it is stored in or, if quantized, in float32.

        It may be a view of the mapped file.

        Raises:
            ArtifactError: if there is no such tensor, or its data cannot be read.
        """

    def load_into(self, name: str, destination: Tensor) -> None:
        """Write a tensor into a contiguous one of the same shape, any floating dtype and device: one rounding, no copy.

        Raises:
            ArtifactError: if there is no such tensor or it has another shape, or its data cannot be read.
        """
        if self.shape(name) != tuple(destination.shape):
            raise ArtifactError(mismatch(name, self.shape(name), tuple(destination.shape)), where=str(self.path))
        destination.copy_(self.load(name))

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Keys of generation_config.json, empty if there is none."""
        return self._read_generation_config()

    def _read_generation_config(self) -> dict[str, Any]:
        return {}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's fast tokenizer with its chat template; the same object at every call.

        Raises:
            ArtifactError: if there is none, or it cannot be read.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return self._read_tokenizer()

    @abstractmethod
    def _read_tokenizer(self) -> PreTrainedTokenizerFast: ...

    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids after which a generated answer is complete: ends of text and of a turn, ascending.

        Raises:
            ArtifactError: if there is no tokenizer, or it cannot be read.
        """
        return stop_token_ids(self.tokenizer(), self._stated_stop_ids())

    def _stated_stop_ids(self) -> list[int]:
        stated: list[int] = []
        for config in (self.generation_config, self.config):
            value = config.get("eos_token_id")
            stated += value if isinstance(value, list) else [] if value is None else [value]
        return stated


def mismatch(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """One line of a report about shapes."""
    return f"{name} has shape {found}, and the configuration asks for {wanted}"


def fill(source: ModelSource, destinations: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors of a source into their places, after checking that all are there in the right shapes.

    Args:
        source: an opened model.
        destinations: (Hugging Face name, contiguous tensor to fill).

    Raises:
        ArtifactError: listing every tensor that is missing or of another shape; then nothing has been written.
    """
    places = dict(destinations)
    check_shapes(source, {name: tuple(place.shape) for name, place in places.items()})
    for name, place in places.items():
        source.load_into(name, place)


def check_shapes(source: ModelSource, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes.

    Raises:
        ArtifactError: listing every tensor that is missing or of another shape.
    """
    there = set(source.tensor_names())
    problems = [
        f"{name} {shape} is missing" if name not in there else mismatch(name, source.shape(name), shape)
        for name, shape in wanted.items()
        if name not in there or source.shape(name) != shape
    ]
    if problems:
        shown = problems[:_SHOWN_PROBLEMS]
        rest = len(problems) - len(shown)
        raise ArtifactError(
            f"the weights do not fit the configuration in {len(problems)} of {len(wanted)} tensors",
            where=str(source.path),
            why="; ".join([*shown, f"and {rest} more"] if rest else shown),
            next_step="fetch the model again; config.json and weights may be of different models",
        )


_SHOWN_PROBLEMS = 12


def floating(tensor: Tensor, name: str, where: str) -> Tensor:
    """The tensor itself.

    Raises:
        ArtifactError: if its dtype is none of float64, float32, float16 and bfloat16.
    """
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ArtifactError(
            f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is no floating type of weights",
            where=where,
            why="quantized weights are read from GGUF files only",
        )
    return tensor

"""Where a base model's configuration, tensors and tokenizer come from: one interface for every kind of file."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.nn.loading.wrappers import Wrapper
from backhand.ops.weight_tiles import FrozenMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_NATIVE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""ggml's numbers of the types that torch has too."""


class ModelSource(ABC):
    """An opened base model.

    What reads a tensor or the tokenizer raises ArtifactError where there is none, none of that shape, or none to read.
    """

    config: dict[str, Any]  # Hugging Face configuration keys, as config.json has them
    path: Path  # the directory or file it lies in
    hub_id: str | None  # the id under which others can fetch it, None if it is only here
    origin: str  # where it came from, in words for people and for backhand.json
    # the image model around it, if its files hold one; `config` and all names are the text model's
    wrapper: Wrapper | None = None

    @abstractmethod
    def tensor_names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors; a tied head is not among them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in Hugging Face layout. Raises ArtifactError: if there is no such tensor."""

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """A tensor in Hugging Face layout, on the CPU, in the dtype it is stored in or, if quantized, in float32.

        It may be a view of the mapped file.
        """

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of what `load` gives; nothing is unpacked for it."""
        return self.load(name).dtype

    def check_unchanged(self) -> None:  # noqa: B027 - most kinds of files are read once
        """Look whether the files that stay mapped are as they were when they were opened; cheap enough for each step.

        Raises:
            ArtifactError: naming the file, and what about it has changed.
        """

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the files that stay mapped."""
        return 0

    def drop_mapped_pages(self) -> None:  # noqa: B027 - most kinds of files are read once
        """Give the memory of mapped files back; they are read again when they are needed again."""

    def load_into(self, name: str, destination: Tensor) -> None:
        """Write a tensor into a contiguous one of its shape, any floating dtype and device: one rounding, no copy."""
        if self.shape(name) != tuple(destination.shape):
            raise ArtifactError(shape_mismatch(name, self.shape(name), tuple(destination.shape)), where=str(self.path))
        destination.copy_(self.load(name))

    def stored_rows(self, name: str) -> StoredRows:
        """A matrix as it is stored, its rows in Hugging Face's order; mapped where the source maps its files."""
        tensor = self.load(name).detach().cpu().contiguous()
        if tensor.dtype not in _NATIVE_TYPES:
            tensor = tensor.float()
        return StoredRows(tensor.view(torch.uint8).numpy(), _NATIVE_TYPES[tensor.dtype])

    def load_in_pieces(self, name: str) -> FrozenMatrix:
        """What `load` gives, a matrix as one in float32 that is unpacked piece by piece."""
        return (
            QuantizedMatrix([self.stored_rows(name)], torch.float32) if len(self.shape(name)) == 2 else self.load(name)
        )

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    @property
    def quantized(self) -> bool:
        """Whether some matrices are stored in blocks."""
        return False

    @property
    def slow_types(self) -> tuple[str, ...]:
        """Types of its matrices that the kernels do not unpack: the gguf package does, several times slower."""
        return ()

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Keys of generation_config.json, empty if there is none."""
        return {}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's fast tokenizer with its chat template; the same object at every call."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return self._read_tokenizer()

    @abstractmethod
    def _read_tokenizer(self) -> PreTrainedTokenizerFast: ...

    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids after which a generated answer is complete: ends of text and of a turn, ascending."""
        return stop_token_ids(self.tokenizer(), self._stated_stop_ids())

    def _stated_stop_ids(self) -> list[int]:
        stated: list[int] = []
        for config in (self.generation_config, self.config):
            stated += token_ids(config.get("eos_token_id"))
        return stated


def token_ids(stated: object) -> list[int]:
    """The ids that `eos_token_id` names: one, a list, or none. Raises ArtifactError: it is something else."""
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
        raise ArtifactError(
            f"eos_token_id = {stated!r} is neither a token id nor a list of them",
            where="config.json or generation_config.json",
            next_step="write the id of the token that ends a text there, or take the key out",
        )
    return list(ids)


def shape_mismatch(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """One line of a report about shapes."""
    return f"{name} has shape {found}, and the configuration asks for {wanted}"


def fill(source: ModelSource, destinations: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors of a source into their places, after checking that all are there in the right shapes.

    Args:
        destinations: (Hugging Face name, contiguous tensor to fill).

    Raises:
        ArtifactError: listing every tensor that is missing or of another shape; then nothing has been written.
    """
    places = dict(destinations)
    check_shapes(source, {name: tuple(place.shape) for name, place in places.items()})
    for name, place in places.items():
        source.load_into(name, place)


def check_shapes(source: ModelSource, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes. Raises ArtifactError: listing every tensor that is missing or of another shape."""
    there = set(source.tensor_names())
    problems = [
        f"{name} {shape} is missing" if name not in there else shape_mismatch(name, source.shape(name), shape)
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


def check_floating(tensor: Tensor, name: str, where: str) -> Tensor:
    """The tensor itself. Raises ArtifactError: if its dtype is none of float64, float32, float16 and bfloat16."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ArtifactError(
            f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is no floating type of weights",
            where=where,
            why="quantized weights are read from GGUF files only",
        )
    return tensor


_END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|return|>",
    "<|call|>",
)
"""Special tokens by which the supported families' chat templates end a turn or a text."""

_ENDS_A_PART = {"<|end|>": "<|return|>"}
"""What ends a part of an answer alone where there is another token too that ends the whole (gpt-oss's thoughts)."""


def stop_token_ids(tokenizer: Any, stated: Iterable[int]) -> tuple[int, ...]:
    """Ids that end an answer, ascending.

    They are what the files state (eos_token_id of config and generation config, a GGUF file's end-of-turn ids), the
    tokenizer's own end-of-sequence token, and those special tokens of its vocabulary by which the known chat templates
    end a turn: a model's files often name only one of the two ends.
    """
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [token for token in _END_TOKENS if token in special and _ENDS_A_PART.get(token) not in special]
    ids = {*stated, *(special[token] for token in ends)}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


# Whether a stored head is the embedding once more, where the config says that the two are one matrix.
#
# As transformers 5 has it: a head that is stored with other values than the embedding is a matrix of its own, whatever
# the config says.

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"
_BLOCK_ELEMENTS = 1 << 24
"""Compared at once: few enough that two mapped matrices are never in memory whole."""


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether a config says that the head is the embedding; where Gemma's are silent, it is."""
    stated = config.get("tie_word_embeddings")
    return stated is True or (stated is None and str(config.get("model_type")).startswith("gemma"))


def has_separate_head(source: ModelSource) -> bool:
    """Whether a source has both matrices with different values; it reads them block by block, up to a difference.

    Raises:
        ArtifactError: one of them cannot be read.
    """
    if not {EMBEDDING_WEIGHT, HEAD_WEIGHT} <= set(source.tensor_names()):
        return False
    shape = source.shape(EMBEDDING_WEIGHT)
    if source.shape(HEAD_WEIGHT) != shape:
        return True
    if len(shape) != 2 or 0 in shape:
        return False
    rows = max(_BLOCK_ELEMENTS // shape[1], 1)
    return any(_differ(source, slice(start, start + rows)) for start in range(0, shape[0], rows))


def _differ(source: ModelSource, rows: slice) -> bool:
    # Loaded anew for each block: what was read of a mapping stays in memory until the mapping ends.
    embedding, head = source.load(EMBEDDING_WEIGHT)[rows], source.load(HEAD_WEIGHT)[rows]
    if embedding.data_ptr() == head.data_ptr() and embedding.dtype == head.dtype:
        return False
    common = torch.promote_types(embedding.dtype, head.dtype)
    return not torch.equal(embedding.to(common), head.to(common))

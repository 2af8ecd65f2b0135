"""A merged Granite 4 in the words of Granite 3, which its GGUF files have: gate and up one by one.

    input_linear = [gate; up]   (2f, hidden)        output_linear = down   (hidden, f)

The rows of gate and up have their own rows of lora_B and of DoRA's lengths, and the same lora_A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from backhand.adapters.module_factors import ModuleFactors
from backhand.errors import ArtifactError
from backhand.export.merged_weights import MergedWeights
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FUSED, _DOWN = ".shared_mlp.input_linear", ".shared_mlp.output_linear"
_PARTS, _DOWN_THERE = (".mlp.gate_proj", ".mlp.up_proj"), ".mlp.down_proj"
_OWN = (
    "layer_types",
    "position_embedding_type",
    "shared_intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
)
"""Fields of a Granite 4's configuration that Granite 3 has no use for."""

Value = TypeVar("Value")


def in_parts(weights: MergedWeights) -> MergedWeights:
    """The same merged model as a Granite 3; any other model as it is.

    Raises:
        ArtifactError: a Granite 4 in which nothing turns, which no Granite 3 can be.
    """
    source = weights.source
    if source.config.get("model_type") != "granitemoehybrid":
        return weights
    if any(layer.rotary is None for layer in decoder_config(source.config).layers):
        raise ArtifactError(
            "a Granite 4 without rotary embeddings becomes no GGUF file here",
            where=str(source.path),
            why="llama.cpp's form of it is a file of architecture granite that says so, which is not read here",
            next_step="merge into a Hugging Face directory, and run llama.cpp's convert_hf_to_gguf.py on it",
        )
    factors: dict[str, ModuleFactors] = {}
    for name, change in weights.factors.items():
        factors |= _named(name, change, _of_rows)
    trained: dict[str, Tensor] = {}
    for name, tensor in weights.trained.items():
        trained |= _named(name, tensor, lambda whole, half: whole.chunk(2)[half])
    return replace(weights, source=_Granite3(source), factors=factors, trained=trained)


def _named(name: str, whole: Value, half_of: Callable[[Value, int], Value]) -> dict[str, Value]:
    """What belongs to a module or a tensor, by the names that it has in a Granite 3."""
    if _FUSED in name:
        return {name.replace(_FUSED, part): half_of(whole, half) for half, part in enumerate(_PARTS)}
    return {name.replace(_DOWN, _DOWN_THERE): whole}


def _of_rows(change: ModuleFactors, half: int) -> ModuleFactors:
    """The first or the second half of a module's outputs."""
    magnitude = None if change.magnitude is None else change.magnitude.chunk(2)[half]
    return replace(change, lora_B=change.lora_B.chunk(2)[half], magnitude=magnitude)


class _Place(NamedTuple):
    """A tensor of the directory, or which half of its rows."""

    name: str
    half: int | None = None


class _Granite3(ModelSource):
    """A Granite 4's directory, opened as if it were a Granite 3's."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        stated = {key: value for key, value in source.config.items() if key not in _OWN and "mamba" not in key}
        width = source.config["shared_intermediate_size"]
        self.config = stated | {"model_type": "granite", "intermediate_size": width, "mlp_bias": False}
        self.path, self.hub_id, self.origin = source.path, source.hub_id, source.origin
        self._places: dict[str, _Place] = {}
        for name in source.tensor_names():
            self._places |= _named(name, _Place(name), lambda whole, half: _Place(whole.name, half))

    def tensor_names(self) -> tuple[str, ...]:
        """Gate and up in the place of both."""
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `ModelSource`."""
        stored, half = self._place(name)
        rows, *columns = self._source.shape(stored)
        return (rows if half is None else rows // 2, *columns)

    def load(self, name: str) -> Tensor:
        """See `ModelSource`."""
        stored, half = self._place(name)
        tensor = self._source.load(stored)
        return tensor if half is None else tensor.chunk(2)[half]

    def dtype(self, name: str) -> torch.dtype:
        """See `ModelSource`."""
        return self._source.dtype(self._place(name).name)

    def _place(self, name: str) -> _Place:
        return self._places.get(name, _Place(name))

    def _read_tokenizer(self) -> PreTrainedTokenizerFast:
        return self._source.tokenizer()

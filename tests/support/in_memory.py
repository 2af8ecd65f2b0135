"""A model that is already in memory, as a source: a transformers model's tensors, or any others with a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.loading.expert_tensors import split_experts
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.tied_head import HEAD_WEIGHT, has_separate_head, ties_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def experts_apart(tensors: Mapping[str, Tensor], model_type: object = None) -> dict[str, Tensor]:
    """The tensors of a transformers model by the names of a source: every expert's matrix by itself, a view."""
    return {
        ours: tensor if piece is None else piece.view(tensor)
        for name, tensor in tensors.items()
        for ours, piece in split_experts(name, tuple(tensor.shape), model_type)
    }


class InMemoryModel(ModelSource):
    """A source over tensors in memory, which it neither copies nor changes.

    Args:
        config: Hugging Face configuration keys.
        tensors: by Hugging Face name, in Hugging Face layout; a head that is tied may be among them or not. One with
            other values than the embedding is a head of its own, whatever the config says.
        tokenizer: what `tokenizer()` returns.
        origin: how to name it to people.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        tokenizer: PreTrainedTokenizerFast | None = None,
        origin: str = "memory",
    ) -> None:
        self.config = dict(config)
        self.path = Path(origin)
        self.hub_id = None
        self.origin = origin
        self._tensors = experts_apart(tensors, config.get("model_type"))
        self._given_tokenizer = tokenizer
        if ties_head(self.config):
            if has_separate_head(self):
                self.config["tie_word_embeddings"] = False
            else:
                self._tensors.pop(HEAD_WEIGHT, None)

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.load(name).shape)

    def load(self, name: str) -> Tensor:
        """The tensor itself."""
        if name not in self._tensors:
            raise ArtifactError(f"there is no tensor {name}", where=self.origin)
        return self._tensors[name].detach()

    def _read_tokenizer(self) -> PreTrainedTokenizerFast:
        if self._given_tokenizer is None:
            raise ArtifactError("this model came without a tokenizer", where=self.origin)
        return self._given_tokenizer

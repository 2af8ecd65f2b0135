"""An embedding with trained rows, and the tied output head that shares them. See `ops.token_rows`.

Each module stays the same object, see `nn.modules.adapted_module`. The rows are a parameter of the embedding, and a
tied head reads them there. Both train the same rows under one name in the state dict, because safetensors stores no
tensor under two names.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from backhand.nn.modules.adapted_module import AdaptedModule
from backhand.nn.modules.functions import token_embedding, token_linear


class TokenModule(AdaptedModule):
    """A module with trained rows. It is created by `adapt`, never by a constructor."""

    base_type: ClassVar[type[nn.Module]]
    added_buffers = ("token_ids",)

    token_ids: Tensor  # (n,) int64

    @property
    def rows(self) -> nn.Parameter:
        """Trained rows, (n, hidden)."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Return the reason why rows of this module cannot be trained, or None."""
        weight = module._parameters.get("weight")
        if type(module) is not cls.base_type:
            return f"rows of a {type(module).__qualname__} cannot be trained"
        if weight is None or not weight.is_floating_point():
            return "its weight is not a plain tensor of floating-point numbers"
        if getattr(module, "max_norm", None) is not None or getattr(module, "scale_grad_by_freq", False):
            return "max_norm and scale_grad_by_freq are not supported"
        return None

    @classmethod
    def _adapted(cls, module: nn.Module, token_ids: Tensor) -> Self:
        """Return `module` with this class and its ids. Raises ValueError if there is an obstacle."""
        if (reason := cls.obstacle(module)) is not None:
            raise ValueError(reason)
        adapted = cls._convert(module)
        adapted.register_buffer("token_ids", token_ids.to(adapted.weight.device), persistent=False)
        return adapted

    @torch.no_grad()
    def merge(self) -> None:
        """Write the rows into `weight`, which becomes a new parameter of this module.

        The base weight is stored for `unmerge`.
        """
        if self._unmerged is None:
            rows = self.rows.to(self.weight.dtype)
            self._keep_unmerged()
            self.weight = nn.Parameter(self.weight.index_copy(0, self.token_ids, rows), requires_grad=False)


class TokenEmbedding(TokenModule):
    """An nn.Embedding with trained rows."""

    base_type = nn.Embedding
    added_parameters = ("trainable_tokens",)

    trainable_tokens: nn.Parameter  # (n, hidden), the trained rows
    padding_idx: int | None

    @classmethod
    def adapt(cls, module: nn.Module, token_ids: Tensor) -> Self:
        """Turn `module` into one with trained rows, in place. The rows start at the values of the table.

        Args:
            token_ids: (n,) int64.

        Raises:
            ValueError: there is an obstacle.
        """
        adapted = cls._adapted(module, token_ids)
        # In half precision, optimizer steps would vanish in rounding.
        wide = torch.promote_types(adapted.weight.dtype, torch.float32)
        adapted.trainable_tokens = nn.Parameter(adapted.weight.detach()[adapted.token_ids].to(wide))
        return adapted

    @property
    def rows(self) -> nn.Parameter:
        """Trained rows, (n, hidden)."""
        return self.trainable_tokens

    def _adapted_forward(self, ids: Tensor) -> Tensor:
        """Map (...) ids to (..., hidden)."""
        return token_embedding(ids, self.weight, self.trainable_tokens, self.token_ids, self.padding_idx)


class TokenLinear(TokenModule):
    """An nn.Linear that shares the weight of an embedding with trained rows."""

    base_type = nn.Linear
    added_parameters = ()
    added_attributes = ("_embedding", *AdaptedModule.added_attributes)

    _embedding: tuple[TokenEmbedding]

    @classmethod
    def adapt(cls, module: nn.Module, embedding: TokenEmbedding) -> Self:
        """Turn `module` into one that reads the rows of `embedding`, in place.

        Raises:
            ValueError: there is an obstacle.
        """
        adapted = cls._adapted(module, embedding.token_ids)
        adapted._embedding = (embedding,)  # in a tuple, else it would be registered as a submodule
        return adapted

    @property
    def rows(self) -> nn.Parameter:
        """Trained rows of the embedding, (n, hidden)."""
        return self._embedding[0].trainable_tokens

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Map (..., hidden) to (..., vocab)."""
        x, weight, bias = self._cast(x)
        return token_linear(x, weight, bias, self.rows, self.token_ids)

"""An embedding, and the output head whose weight it is, with some rows trained as they are: see `ops.token_rows`.

Each is the module it was, see `adapted_module`. The rows are a parameter of the embedding, and a tied head reads them
there: both train the same rows, under one name in the state dict (safetensors stores no tensor under two).
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from backhand.nn.modules.adapted_module import AdaptedModule
from backhand.nn.modules.functions import token_embedding, token_linear


class TokenModule(AdaptedModule):
    """A module with trained rows; made by `adapt`, never by its constructor."""

    base_type: ClassVar[type[nn.Module]]
    own_buffers = ("token_ids",)

    token_ids: Tensor  # (n,) int64

    @property
    def rows(self) -> nn.Parameter:
        """(n, hidden), the trained rows."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Why rows of this module cannot be trained, or None."""
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
        """`module` with this class and its ids. Raises ValueError: there is an obstacle."""
        if (reason := cls.obstacle(module)) is not None:
            raise ValueError(reason)
        adapted = cls._take_over(module)
        adapted.register_buffer("token_ids", token_ids.to(adapted.weight.device), persistent=False)
        return adapted

    @torch.no_grad()
    def merge(self) -> None:
        """Put the rows into `weight`, which becomes a parameter of this module's own; the base weight is kept."""
        if self._unmerged is None:
            rows = self.rows.to(self.weight.dtype)
            self._keep_unmerged()
            self.weight = nn.Parameter(self.weight.index_copy(0, self.token_ids, rows), requires_grad=False)


class TokenEmbedding(TokenModule):
    """An nn.Embedding with trained rows."""

    base_type = nn.Embedding
    own_parameters = ("trainable_tokens",)

    trainable_tokens: nn.Parameter  # (n, hidden), the trained rows
    padding_idx: int | None

    @classmethod
    def adapt(cls, module: nn.Module, token_ids: Tensor) -> Self:
        """Turn `module` into one with trained rows, in place; they start with what is there.

        Args:
            token_ids: (n,) int64.

        Raises:
            ValueError: there is an obstacle.
        """
        adapted = cls._adapted(module, token_ids)
        # In half precision a step of the optimizer would vanish in rounding.
        wide = torch.promote_types(adapted.weight.dtype, torch.float32)
        adapted.trainable_tokens = nn.Parameter(adapted.weight.detach()[adapted.token_ids].to(wide))
        return adapted

    @property
    def rows(self) -> nn.Parameter:
        """(n, hidden), the trained rows."""
        return self.trainable_tokens

    def _with_added(self, ids: Tensor) -> Tensor:
        """(...) ids → (..., hidden)."""
        return token_embedding(ids, self.weight, self.trainable_tokens, self.token_ids, self.padding_idx)


class TokenLinear(TokenModule):
    """An nn.Linear that shares the weight of an embedding with trained rows."""

    base_type = nn.Linear
    own_parameters = ()
    own_attributes = ("_embedding", *AdaptedModule.own_attributes)

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
        """(n, hidden), the embedding's trained rows."""
        return self._embedding[0].trainable_tokens

    def _with_added(self, x: Tensor) -> Tensor:
        """(..., hidden) → (..., vocab)."""
        x, weight, bias = self._cast(x)
        return token_linear(x, weight, bias, self.rows, self.token_ids)

"""An embedding, and the output head whose weight it is, with some rows trained as they are: see `ops.token_rows`.

Like an adapted module (`lora_module`), each is the module it was, of another class, and `restore` leaves no trace. A
tied head holds the very same parameter as the embedding, so that both read, and train, the same rows.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from backhand.nn.lora_functions import TokenEmbeddingFunction, TokenLinearFunction

_OWN_ATTRIBUTES = ("enabled", "_unmerged", "_base_class")


class TokenModule(nn.Module):
    """A module with trained rows; made by `adapt`, never by its constructor.

    Attributes:
        weight: the frozen base parameter.
        trainable_tokens: (n, hidden), the trained rows.
        token_ids: (n,) int64.
        enabled: False makes the module compute what it did before.
    """

    base_type: ClassVar[type[nn.Module]]

    weight: nn.Parameter
    bias: nn.Parameter | None
    trainable_tokens: nn.Parameter
    token_ids: Tensor
    enabled: bool
    _unmerged: tuple[nn.Parameter] | None
    _base_class: type[nn.Module]

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Why rows of this module cannot be trained, or None."""
        weight = module._parameters.get("weight")
        if type(module) is not cls.base_type:
            return f"rows of a {type(module).__qualname__} cannot be trained"
        if weight is None or weight.is_meta or not weight.is_floating_point():
            return "its weight is not a plain tensor of floating-point numbers in memory"
        if getattr(module, "max_norm", None) is not None or getattr(module, "scale_grad_by_freq", False):
            return "max_norm and scale_grad_by_freq are not supported"
        return None

    @classmethod
    def adapt(cls, module: nn.Module, token_ids: Tensor, rows: nn.Parameter | None = None) -> Self:
        """Turn `module` into one with trained rows, in place.

        Args:
            module: one without an obstacle.
            token_ids: (n,) int64.
            rows: of the embedding whose weight this module shares; None to start with the rows that are there.

        Raises:
            ValueError: there is an obstacle.
        """
        if (reason := cls.obstacle(module)) is not None:
            raise ValueError(reason)
        base_class = type(module)
        module.__class__ = cls
        adapted = cast("Self", module)
        if rows is None:
            # In half precision a step of the optimizer would vanish in rounding.
            wide = torch.promote_types(adapted.weight.dtype, torch.float32)
            rows = nn.Parameter(adapted.weight.detach()[token_ids.to(adapted.weight.device)].to(wide))
        adapted.trainable_tokens = rows
        adapted.register_buffer("token_ids", token_ids.to(adapted.weight.device), persistent=False)
        adapted.enabled, adapted._unmerged, adapted._base_class = True, None, base_class
        return adapted

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the rows at the moment."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Put the rows into `weight`, which becomes a parameter of this module's own; the base weight is kept."""
        if self._unmerged is None:
            rows = self.trainable_tokens.to(self.weight.dtype)
            self._unmerged = (self.weight,)  # in a tuple, else it would be registered as a parameter
            self.weight = nn.Parameter(self.weight.index_copy(0, self.token_ids, rows), requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back: the same parameter, bit by bit."""
        if self._unmerged is None:
            return
        (base,) = self._unmerged
        if (base.device, base.dtype) != (self.weight.device, self.weight.dtype):  # the model was moved while merged
            base.data = base.data.to(self.weight)
        self.weight, self._unmerged = base, None

    def restore(self) -> nn.Module:
        """Take the rows away: the module is of its old class again, with its base weight."""
        self.unmerge()
        base_class = self._base_class
        del self._parameters["trainable_tokens"], self._buffers["token_ids"]
        self._non_persistent_buffers_set.discard("token_ids")
        for name in _OWN_ATTRIBUTES:
            del self.__dict__[name]
        module: nn.Module = self
        module.__class__ = base_class
        return module

    @property
    def _adapts(self) -> bool:
        return self.enabled and self._unmerged is None

    def _base_forward(self, x: Tensor) -> Tensor:
        y: Tensor = cast("Any", self._base_class).forward(self, x)
        return y


class TokenEmbedding(TokenModule):
    """An nn.Embedding with trained rows."""

    base_type = nn.Embedding

    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids → (..., hidden)."""
        if not self._adapts:
            return self._base_forward(ids)
        y: Tensor = cast("Any", TokenEmbeddingFunction).apply(
            ids, self.weight, self.trainable_tokens, self.token_ids, self.padding_idx
        )
        return y


class TokenLinear(TokenModule):
    """An nn.Linear that shares the weight of an embedding with trained rows."""

    base_type = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) → (..., vocab)."""
        if not self._adapts:
            return self._base_forward(x)
        y: Tensor = cast("Any", TokenLinearFunction).apply(
            x, self.weight, self.bias, self.trainable_tokens, self.token_ids
        )
        return y

"""The base class of all adapted modules of torch models.

An adapted module computes more than before, and can be restored. It stays the same object, with the same weight, hooks
and place in the model. Only its class changes, to one with another `forward` (as in torch.nn.utils.parametrize), and
parameters are added by `adapt`. Names in the base model's state dict therefore stay, references to the module stay
valid, and `restore` leaves no trace.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from backhand.errors import UsageError


class AdaptedModule(nn.Module):
    """Base class of adapted modules. They are created by `adapt`, never by a constructor."""

    added_parameters: ClassVar[tuple[str, ...]]
    added_buffers: ClassVar[tuple[str, ...]] = ()
    added_attributes: ClassVar[tuple[str, ...]] = ("enabled", "_unmerged", "_base_class")

    weight: nn.Parameter
    bias: nn.Parameter | None
    enabled: bool  # False makes the module compute the same as before it was adapted
    _unmerged: tuple[nn.Parameter, nn.Parameter | None] | None
    _base_class: type[nn.Module]

    @classmethod
    def _convert(cls, module: nn.Module) -> Self:
        """Change the class of `module` to this one. The caller adds the trained parameters."""
        base_class = type(module)
        module.__class__ = cls
        adapted = cast("Self", module)
        adapted.enabled, adapted._unmerged, adapted._base_class = True, None, base_class
        return adapted

    @property
    def merged(self) -> bool:
        """Return True if `weight` currently contains the adapter's update."""
        return self._unmerged is not None

    def _keep_unmerged(self) -> None:
        """Store the base parameters for `unmerge`, in a tuple because parameters as attributes would be registered."""
        self._unmerged = self.weight, self._parameters.get("bias")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight: the same parameter, with the same bits and ties."""
        if self._unmerged is None:
            return
        weight, bias = self._unmerged
        for base in (weight, bias):
            if base is not None and (base.device, base.dtype) != (self.weight.device, self.weight.dtype):
                base.data = base.data.to(self.weight)  # the model was moved while merged
        self.weight = weight
        if bias is not None:
            self.bias = bias
        self._unmerged = None

    def restore(self) -> nn.Module:
        """Remove all additions: the module has its old class and its base weight again."""
        self.unmerge()
        base_class = self._base_class
        for name in self.added_parameters:
            del self._parameters[name]
        for name in self.added_buffers:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        for name in self.added_attributes:
            del self.__dict__[name]
        module: nn.Module = self
        module.__class__ = base_class
        return module

    @property
    def _is_active(self) -> bool:
        """Return True if the added parameters take part in the computation.

        Raises:
            UsageError: a base parameter requires a gradient, which the hand-written backward does not compute.
        """
        if not self.enabled or self._unmerged is not None:
            return False
        if torch.is_grad_enabled():
            for name in ("weight", "bias"):
                parameter = self._parameters.get(name)
                if parameter is not None and parameter.requires_grad:
                    raise UsageError(
                        f"the {name} of an adapted {self._base_class.__name__} requires a gradient",
                        why="inject froze it, and the adapted module computes no gradient for it",
                        next_step="freeze it again; to train the module in full, inject with it in modules_to_save "
                        "and not in target_modules",
                    )
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Compute the module for x, or for the ids of an embedding, of any leading axes."""
        return self._adapted_forward(x) if self._is_active else self._base_forward(x)

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Compute the module with the added parameters."""
        raise NotImplementedError

    def _base_forward(self, x: Tensor) -> Tensor:
        """Compute the module as before it was adapted, by the same code."""
        y: Tensor = cast("Any", self._base_class).forward(self, x)
        return y

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x, weight and bias in the dtype in which the base module would multiply them, also in autocast."""
        device = x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            return x, self.weight, self.bias
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

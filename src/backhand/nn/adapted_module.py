"""A module of somebody's model that computes more than it did, and can be given back as it was.

It is the same object, with the same weight, hooks and places in the model; only its class is another, with another
`forward` (as torch.nn.utils.parametrize does it), and parameters of ours stand beside its own. So names in the base
model's state dict stay, whoever holds the module holds the adapted one, and `restore` leaves no trace.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from backhand.errors import UsageError


class AdaptedModule(nn.Module):
    """What all kinds share; each is made by an `adapt` of its own, never by a constructor.

    Attributes:
        weight, bias: the frozen base parameters.
        enabled: False makes the module compute what it did before it was adapted.
    """

    own_parameters: ClassVar[tuple[str, ...]]
    own_buffers: ClassVar[tuple[str, ...]] = ()
    own_attributes: ClassVar[tuple[str, ...]] = ("enabled", "_unmerged", "_base_class")

    weight: nn.Parameter
    bias: nn.Parameter | None
    enabled: bool
    _unmerged: tuple[nn.Parameter, nn.Parameter | None] | None
    _base_class: type[nn.Module]

    @classmethod
    def _take_over(cls, module: nn.Module) -> Self:
        """Give `module` this class; the caller adds what is trained."""
        base_class = type(module)
        module.__class__ = cls
        adapted = cast("Self", module)
        adapted.enabled, adapted._unmerged, adapted._base_class = True, None, base_class
        return adapted

    @property
    def merged(self) -> bool:
        """Whether `weight` holds what was trained at the moment."""
        return self._unmerged is not None

    def _keep_unmerged(self) -> None:
        """Keep the base parameters for `unmerge`; in a tuple, else they would be registered as parameters."""
        self._unmerged = self.weight, self._parameters.get("bias")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back: the same parameter, bit by bit, tied to what it was tied to."""
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
        """Take away what was added: the module is of its old class again, with its base weight."""
        self.unmerge()
        base_class = self._base_class
        for name in self.own_parameters:
            del self._parameters[name]
        for name in self.own_buffers:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        for name in self.own_attributes:
            del self.__dict__[name]
        module: nn.Module = self
        module.__class__ = base_class
        return module

    @property
    def _adapts(self) -> bool:
        """Whether what was added computes now.

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

    def _base_forward(self, x: Tensor) -> Tensor:
        """What the module computed before it was adapted, by the very same code."""
        y: Tensor = cast("Any", self._base_class).forward(self, x)
        return y

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, weight and bias as the base module would multiply them: in autocast's dtype inside autocast."""
        device = x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            return x, self.weight, self.bias
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

"""What every adapted module has in common; the kinds stand in `lora_modules`.

An adapted module is the module it was: the same object with the same `weight` and `bias`, hooks and places in the
model, to which `adapt` has added `lora_A` and `lora_B` and whose class it has changed to one with another `forward` (as
torch.nn.utils.parametrize does). So names in the base model's state dict stay, whoever holds the module holds the
adapted one, and `restore` leaves no trace.

Dropout seeds are drawn from torch's global generator, one a call: that is what gradient checkpointing rewinds before it
runs a forward pass again, so that both passes drop the same elements. The mask itself comes from a generator of its
own.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from backhand.ops.lora_linear import Dropout

_SEEDS = 2**62
_OWN_ATTRIBUTES = ("rank", "scaling", "dropout", "enabled", "_unmerged", "_base_class")

Shape = tuple[int, ...]


class LoRAModule(nn.Module):
    """An adapted module; made by `adapt`, never by its constructor.

    Attributes:
        weight, bias: the frozen base parameters.
        lora_A, lora_B: the trained factors in PEFT's shapes.
        rank, scaling, dropout: as in `LoRASlot`.
        enabled: False makes the module compute what it did before it was adapted.
    """

    base_type: ClassVar[type[nn.Module] | None] = None
    embedding: ClassVar[bool] = False

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    scaling: float
    dropout: float
    enabled: bool
    _unmerged: tuple[nn.Parameter] | None
    _base_class: type[nn.Module]

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether this class adapts the module: its type itself, since a subclass may compute something else."""
        return type(module) is cls.base_type

    @classmethod
    def obstacle(cls, module: nn.Module, rank: int) -> str | None:  # noqa: ARG003 - subclasses ask for it
        """Why a module that fits cannot be adapted all the same, or None."""
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is computed from something else, as by weight norm or pruning"
        if weight.is_meta:
            return "its weight is not in memory (meta device)"
        if not weight.is_floating_point():
            return f"its weight is stored as {weight.dtype}"
        if "forward" in module.__dict__:
            return "its forward has been replaced, as offloading does, and the adapter would never run"
        return None

    @classmethod
    def factor_shapes(cls, module: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """Shapes of lora_A and lora_B for this module."""
        raise NotImplementedError

    @classmethod
    def adapt(cls, module: nn.Module, *, rank: int, scaling: float, dropout: float = 0.0) -> Self:
        """Turn `module` into an adapted one, in place. The factors are zero until `initialise` or a file fills them.

        Args:
            module: one that fits and has no obstacle.
            rank: of the factors.
            scaling: multiplier of the low-rank branch.
            dropout: probability, active in training mode only.

        Returns:
            the same object.

        Raises:
            TypeError: the module is of another type.
            ValueError: there is an obstacle.
        """
        if not cls.fits(module):
            raise TypeError(f"{cls.__name__} does not adapt {type(module).__name__}")
        if (reason := cls.obstacle(module, rank)) is not None:
            raise ValueError(reason)
        shapes = cls.factor_shapes(module, rank)
        base_class = type(module)
        module.__class__ = cls
        adapted = cast("Self", module)
        # In half precision a step of the optimizer would vanish in rounding.
        dtype = torch.promote_types(adapted.weight.dtype, torch.float32)
        adapted.lora_A, adapted.lora_B = (
            nn.Parameter(torch.zeros(shape, dtype=dtype, device=adapted.weight.device)) for shape in shapes
        )
        adapted.rank, adapted.scaling, adapted.dropout = rank, scaling, dropout
        adapted.enabled, adapted._unmerged, adapted._base_class = True, None, base_class
        return adapted

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """As PEFT does: lora_A Kaiming-uniform with a = √5, that is U(-1/√fan_in, 1/√fan_in), and lora_B zero."""
        bound = 1 / math.sqrt(self.lora_A[0].numel())
        drawn = torch.rand(self.lora_A.shape, generator=generator, device=generator.device)
        self.lora_A.copy_((2 * drawn - 1) * bound)
        self.lora_B.zero_()

    def delta_weight(self) -> Tensor:
        """The update in the shape of `weight`, in the dtype of the factors.

        Raises:
            ValueError: it cannot be written as a weight of this module.
        """
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the update at the moment."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into `weight`, added in fp32 at least and then cast.

        The weight becomes a parameter of this module's own: where it was tied to another module's, that one keeps the
        base weight. The base weight is kept for `unmerge`.

        Raises:
            ValueError: the update cannot be written as a weight of this module.
        """
        if self._unmerged is not None:
            return
        delta = self.delta_weight()
        merged = (self.weight.to(delta.dtype) + delta).to(self.weight.dtype)
        self._unmerged = (self.weight,)  # in a tuple, else it would be registered as a parameter
        self.weight = nn.Parameter(merged, requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back: the same parameter, bit by bit, tied to what it was tied to."""
        if self._unmerged is None:
            return
        (base,) = self._unmerged
        if (base.device, base.dtype) != (self.weight.device, self.weight.dtype):  # the model was moved while merged
            base.data = base.data.to(self.weight)
        self.weight = base
        self._unmerged = None

    def restore(self) -> nn.Module:
        """Take the adapter away: the module is of its old class again, with its base weight, and has no factors."""
        self.unmerge()
        base_class = self._base_class
        for name in ("lora_A", "lora_B"):
            del self._parameters[name]
        for name in _OWN_ATTRIBUTES:
            del self.__dict__[name]
        module: nn.Module = self
        module.__class__ = base_class
        return module

    def extra_repr(self) -> str:
        """The base module's description and the adapter's."""
        base = self._base_class.extra_repr(self) or f"weight={tuple(self.weight.shape)}"
        return f"{base}, rank={self.rank}, scaling={self.scaling:g}"

    @property
    def _adapts(self) -> bool:
        return self.enabled and self._unmerged is None

    def _base_forward(self, x: Tensor) -> Tensor:
        """What the module computed before it was adapted, by the very same code."""
        y: Tensor = cast("Any", self._base_class).forward(self, x)
        return y

    def _drawn_dropout(self) -> Dropout | None:
        if not self.training or self.dropout == 0.0:
            return None
        return Dropout(self.dropout, int(torch.randint(_SEEDS, ())))

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, weight and bias as the base module would multiply them: in autocast's dtype inside autocast."""
        device = x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            return x, self.weight, self.bias
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a module that has one."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight

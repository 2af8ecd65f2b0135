"""The base class of all modules with LoRA factors. The kinds are in `nn.modules.kinds`.

Dropout seeds are drawn from torch's global generator, one per call. Gradient checkpointing restores that generator
before it repeats a forward pass, so both passes drop the same elements. The mask itself comes from a separate
generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from backhand.errors import not_none
from backhand.nn.modules.adapted_module import AdaptedModule
from backhand.ops.dora import dora_norm
from backhand.ops.lora_linear import Dropout

_SEEDS = 2**62
Shape = tuple[int, ...]


class LoRAModule(AdaptedModule):
    """A module with LoRA factors. It is created by `adapt`, never by a constructor."""

    added_parameters = ("lora_A", "lora_B", "lora_bias", "lora_magnitude")
    added_attributes = ("rank", "scaling", "dropout", *AdaptedModule.added_attributes)
    base_type: ClassVar[type[nn.Module] | None] = None
    transposed_weight: ClassVar[bool] = False  # the weight is (in, out): an output channel is a column
    embedding: ClassVar[bool] = False
    takes_lora_bias: ClassVar[bool] = True

    # lora_A, lora_B: the trained factors in PEFT's shapes
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    # lora_bias, lora_magnitude: the bias of lora_B and DoRA's magnitude in PEFT's shapes, or None
    lora_bias: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    # rank, scaling, dropout: as in `LoRASlot`
    rank: int
    scaling: float
    dropout: float

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Return True if this class adapts the module.

        Only the exact type fits: a subclass may compute something else.
        """
        return type(module) is cls.base_type

    @classmethod
    def obstacle(cls, module: nn.Module, rank: int) -> str | None:  # noqa: ARG003 - subclasses ask for it
        """Return the reason why a module that fits cannot be adapted, or None."""
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is computed from something else, as by weight norm or pruning"
        if not weight.is_floating_point():
            return f"its weight is stored as {weight.dtype}"
        if "forward" in module.__dict__:
            return "its forward has been replaced, as offloading does, and the adapter would never run"
        return None

    @classmethod
    def factor_shapes(cls, module: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """Return the shapes of lora_A and lora_B for this module: (rank, in) and (out, rank)."""
        out_features, in_features = base_weight(module).shape[:: -1 if cls.transposed_weight else 1]
        return (rank, in_features), (out_features, rank)

    @classmethod
    def channel_shape(cls, module: nn.Module) -> Shape:
        """Return the shape of DoRA's magnitude: one number per output channel."""
        return (cls.factor_shapes(module, 1)[1][0],)

    @classmethod
    def adapt(
        cls,
        module: nn.Module,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> Self:
        """Turn `module` into an adapted one, in place. The factors are zero until `initialise` or a file fills them.

        Args:
            dropout: probability, active in training mode only.
            use_dora: also train a magnitude, which starts at the norms of the weight's rows.

        Returns:
            the same object.

        Raises:
            TypeError: the module has another type.
            ValueError: there is an obstacle.
        """
        if not cls.fits(module):
            raise TypeError(f"{cls.__name__} does not adapt {type(module).__name__}")
        if (reason := cls.obstacle(module, rank)) is not None:
            raise ValueError(reason)
        lora_A, lora_B = cls.factor_shapes(module, rank)
        shapes = lora_A, lora_B, lora_B[:1] if lora_bias else None, cls.channel_shape(module) if use_dora else None
        adapted = cls._convert(module)
        device = adapted.weight.device
        # In half precision, optimizer steps would vanish in rounding.
        dtype = torch.promote_types(adapted.weight.dtype, torch.float32)
        for name, shape in zip(cls.added_parameters, shapes, strict=True):
            trained = None if shape is None else nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            adapted.register_parameter(name, trained)
        adapted.rank, adapted.scaling, adapted.dropout = rank, scaling, dropout
        adapted.reset_magnitude()
        return adapted

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names, such as `lora_A`, and values of the trained parameters."""
        for name in self.added_parameters:
            parameter = self._parameters[name]
            if parameter is not None:
                yield name, parameter

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set the magnitude to the norms of the adapted weight's rows, so that it has no effect."""
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self.dora_norm().view(self.lora_magnitude.shape))

    @torch.no_grad()
    def dora_norm(self) -> Tensor:
        """Return the norms of the adapted weight's rows, (out,), in float32 or wider."""
        weight = self.weight_rows()
        with torch.autocast(weight.device.type, enabled=False):  # autocast would multiply in half precision
            return dora_norm(weight, self.lora_A.flatten(1), self.lora_B.flatten(1), self.scaling)

    def weight_rows(self) -> Tensor:
        """Return the base weight with one row per output channel, (out, …)."""
        return self.weight.T if self.transposed_weight else self.weight.flatten(1)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Initialize as in PEFT: lora_A Kaiming-uniform with a = √5, i.e. U(-1/√fan_in, 1/√fan_in), and lora_B zero."""
        bound = 1 / math.sqrt(self.lora_A[0].numel())
        drawn = torch.rand(self.lora_A.shape, generator=generator, device=generator.device)
        self.lora_A.copy_((2 * drawn - 1) * bound)
        self.lora_B.zero_()
        self.reset_bias_and_magnitude()

    @torch.no_grad()
    def reset_bias_and_magnitude(self) -> None:
        """Set bias and magnitude to the values without effect."""
        if self.lora_bias is not None:
            self.lora_bias.zero_()
        self.reset_magnitude()

    def delta_weight(self) -> Tensor:
        """Return the update in the shape of `weight`, in the dtype of the factors.

        Raises:
            ValueError: the update is not a weight of this module.
        """
        delta = self.scaling * (self.lora_B @ self.lora_A)
        return delta.T if self.transposed_weight else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to `weight`, in float32 or wider, and cast the sum.

        The merged weight is a new parameter of this module. If the base weight was tied to another module's, that
        module keeps the base weight. The base weight is stored for `unmerge`.

        Raises:
            ValueError: the update is not a weight and a bias of this module.
        """
        if self._unmerged is not None:
            return
        bias = self._parameters.get("bias")
        if self.lora_bias is not None and bias is None:
            raise ValueError("the base module has no bias to which the bias of lora_B could be added")
        with torch.autocast(self.weight.device.type, enabled=False):
            delta = self.delta_weight()
        merged = self.weight.to(delta.dtype) + delta
        if self.lora_magnitude is not None:
            weight_scale = (self.lora_magnitude.flatten() / self.dora_norm()).to(merged.dtype)
            merged = merged * (
                weight_scale if self.transposed_weight else weight_scale.view(-1, *(1 for _ in merged.shape[1:]))
            )
        self._keep_unmerged()
        self.weight = nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)
        if self.lora_bias is not None and bias is not None:
            moved = bias.to(delta.dtype) + self.scaling * self.lora_bias
            self.bias = nn.Parameter(moved.to(bias.dtype), requires_grad=False)

    def extra_repr(self) -> str:
        """Return the descriptions of the base module and of the adapter."""
        base = self._base_class.extra_repr(self) or f"weight={tuple(self.weight.shape)}"
        more = "".join(f", {name}" for name, _ in self.trained() if name not in ("lora_A", "lora_B"))
        return f"{base}, rank={self.rank}, scaling={self.scaling:g}{more}"

    def _draw_dropout(self) -> Dropout | None:
        if not self.training or self.dropout == 0.0:
            return None
        return Dropout(self.dropout, int(torch.randint(_SEEDS, ())))


def base_weight(module: nn.Module) -> Tensor:
    """Return the weight of a module that has one."""
    return not_none(module._parameters["weight"])

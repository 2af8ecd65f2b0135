"""What every adapted module has in common; the kinds stand in `nn.modules.kinds`.

A module of somebody's model computes more than it did, and can be given back as it was. It is the same object, with the
same weight, hooks and places in the model; only its class is another, with another `forward` (as
torch.nn.utils.parametrize does it), and parameters of ours stand beside its own: `adapt` has added `lora_A` and
`lora_B`. So names in the base model's state dict stay, whoever holds the module holds the adapted one, and `restore`
leaves no trace.

Dropout seeds are drawn from torch's global generator, one a call: that is what gradient checkpointing rewinds before it
runs a forward pass again, so that both passes drop the same elements. The mask itself comes from a generator of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from backhand.errors import UsageError, not_none
from backhand.ops.dora import dora_norm
from backhand.ops.lora_linear import Dropout


class AdaptedModule(nn.Module):
    """What all kinds share; each is made by an `adapt` of its own, never by a constructor."""

    own_parameters: ClassVar[tuple[str, ...]]
    own_buffers: ClassVar[tuple[str, ...]] = ()
    own_attributes: ClassVar[tuple[str, ...]] = ("enabled", "_unmerged", "_base_class")

    weight: nn.Parameter
    bias: nn.Parameter | None
    enabled: bool  # False makes the module compute what it did before it was adapted
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

    def forward(self, x: Tensor) -> Tensor:
        """As the base module: x, or the ids of an embedding, of any leading axes."""
        return self._with_added(x) if self._adapts else self._base_forward(x)

    def _with_added(self, x: Tensor) -> Tensor:
        """The same with what was added."""
        raise NotImplementedError

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


_SEEDS = 2**62
Shape = tuple[int, ...]


class LoRAModule(AdaptedModule):
    """An adapted module; made by `adapt`, never by its constructor."""

    own_parameters = ("lora_A", "lora_B", "lora_bias", "lora_magnitude")
    own_attributes = ("rank", "scaling", "dropout", *AdaptedModule.own_attributes)
    base_type: ClassVar[type[nn.Module] | None] = None
    by_columns: ClassVar[bool] = False  # an output channel is a column of the weight: it lies the other way round
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
        """Whether this class adapts the module: its type itself, since a subclass may compute something else."""
        return type(module) is cls.base_type

    @classmethod
    def obstacle(cls, module: nn.Module, rank: int) -> str | None:  # noqa: ARG003 - subclasses ask for it
        """Why a module that fits cannot be adapted all the same, or None."""
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
        """Shapes of lora_A and lora_B for this module: (rank, in) and (out, rank)."""
        out_features, in_features = base_weight(module).shape[:: -1 if cls.by_columns else 1]
        return (rank, in_features), (out_features, rank)

    @classmethod
    def channel_shape(cls, module: nn.Module) -> Shape:
        """Shape of DoRA's magnitude: one number an output channel."""
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
            use_dora: train a magnitude as well, which starts at the lengths of the weight's rows.

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
        lora_A, lora_B = cls.factor_shapes(module, rank)
        shapes = lora_A, lora_B, lora_B[:1] if lora_bias else None, cls.channel_shape(module) if use_dora else None
        adapted = cls._take_over(module)
        device = adapted.weight.device
        # In half precision a step of the optimizer would vanish in rounding.
        dtype = torch.promote_types(adapted.weight.dtype, torch.float32)
        for name, shape in zip(cls.own_parameters, shapes, strict=True):
            trained = None if shape is None else nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            adapted.register_parameter(name, trained)
        adapted.rank, adapted.scaling, adapted.dropout = rank, scaling, dropout
        adapted.reset_magnitude()
        return adapted

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained here, by the last part of its name."""
        for name in self.own_parameters:
            parameter = self._parameters[name]
            if parameter is not None:
                yield name, parameter

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set the magnitude to the lengths of the adapted weight's rows, so that it changes nothing."""
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self.dora_norm().view(self.lora_magnitude.shape))

    @torch.no_grad()
    def dora_norm(self) -> Tensor:
        """(out,) lengths of the rows of the adapted weight, in float32 at least."""
        weight = self.weight_rows()
        with torch.autocast(weight.device.type, enabled=False):  # it would multiply in half precision
            return dora_norm(weight, self.lora_A.flatten(1), self.lora_B.flatten(1), self.scaling)

    def weight_rows(self) -> Tensor:
        """The base weight as one row an output channel, (out, …)."""
        return self.weight.T if self.by_columns else self.weight.flatten(1)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """As PEFT does: lora_A Kaiming-uniform with a = √5, that is U(-1/√fan_in, 1/√fan_in), and lora_B zero."""
        bound = 1 / math.sqrt(self.lora_A[0].numel())
        drawn = torch.rand(self.lora_A.shape, generator=generator, device=generator.device)
        self.lora_A.copy_((2 * drawn - 1) * bound)
        self.lora_B.zero_()
        self.reset_beside()

    @torch.no_grad()
    def reset_beside(self) -> None:
        """Bias and magnitude as they are where the factors change nothing."""
        if self.lora_bias is not None:
            self.lora_bias.zero_()
        self.reset_magnitude()

    def delta_weight(self) -> Tensor:
        """The update in the shape of `weight`, in the dtype of the factors.

        Raises:
            ValueError: it cannot be written as a weight of this module.
        """
        delta = self.scaling * (self.lora_B @ self.lora_A)
        return delta.T if self.by_columns else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into `weight`, added in fp32 at least and then cast.

        The weight becomes a parameter of this module's own: where it was tied to another module's, that one keeps the
        base weight. The base weight is kept for `unmerge`.

        Raises:
            ValueError: the update cannot be written as weight and bias of this module.
        """
        if self._unmerged is not None:
            return
        bias = self._parameters.get("bias")
        if self.lora_bias is not None and bias is None:
            raise ValueError("the bias of lora_B has no bias of the base module to go into")
        with torch.autocast(self.weight.device.type, enabled=False):
            delta = self.delta_weight()
        merged = self.weight.to(delta.dtype) + delta
        if self.lora_magnitude is not None:
            gain = (self.lora_magnitude.flatten() / self.dora_norm()).to(merged.dtype)
            merged = merged * (gain if self.by_columns else gain.view(-1, *(1 for _ in merged.shape[1:])))
        self._keep_unmerged()
        self.weight = nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)
        if self.lora_bias is not None and bias is not None:
            moved = bias.to(delta.dtype) + self.scaling * self.lora_bias
            self.bias = nn.Parameter(moved.to(bias.dtype), requires_grad=False)

    def extra_repr(self) -> str:
        """The base module's description and the adapter's."""
        base = self._base_class.extra_repr(self) or f"weight={tuple(self.weight.shape)}"
        more = "".join(f", {name}" for name, _ in self.trained() if name not in ("lora_A", "lora_B"))
        return f"{base}, rank={self.rank}, scaling={self.scaling:g}{more}"

    def _drawn_dropout(self) -> Dropout | None:
        if not self.training or self.dropout == 0.0:
            return None
        return Dropout(self.dropout, int(torch.randint(_SEEDS, ())))


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a module that has one."""
    return not_none(module._parameters["weight"])

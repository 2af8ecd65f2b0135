"""All trained tensors of one adapter in one flat buffer, and their gradients in a second one.

With one buffer, a step needs one fused optimizer call, one norm, one cast to the compute dtype and one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.ops.dora import row_squares

Shape = tuple[int, ...]
TOKENS = "trainable_tokens"
"""Trained embedding rows are named after the embedding, followed by this word."""


@dataclass(frozen=True)
class LoRASlot:
    """One adapted module: its path, the sizes of its factors, and its other trained tensors."""

    name: str  # dotted module path, e.g. `model.layers.0.self_attn.q_proj`
    # in_features, out_features: the frozen weight is (out_features, in_features), an embedding's (in, out)
    in_features: int
    out_features: int
    rank: int  # rows of lora_A, columns of lora_B
    scaling: float  # the multiplier of the low-rank branch, alpha / rank or alpha / √rank
    dropout: float = 0.0  # probability that an input element of the low-rank branch is dropped; an embedding has none
    use_dora: bool = False  # train a magnitude per row of the adapted weight, see `ops.dora`
    lora_bias: bool = False  # lora_B has a bias, see `ops.lora_bias`
    embedding: bool = False  # the module is an embedding of in_features tokens
    # number of experts whose matrices, (out_features, in_features) each, are one parameter; 0 for a module. As in PEFT,
    # their factors are two matrices: expert by expert in lora_A's rows, rank by rank in lora_B's columns
    # (`expert_factors`)
    experts: int = 0
    # the rows of the experts' lora_B interleave gate and up, as in PEFT for a parameter with interleaved outputs. The
    # matrices here have gate's rows before up's
    interleaved: bool = False

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of each trained tensor of the module, keyed by its name, such as `lora_A`."""
        rows = self.rank * max(1, self.experts)
        shapes: dict[str, Shape] = {"lora_A": (rows, self.in_features), "lora_B": (self.out_features, rows)}
        if self.lora_bias:
            shapes["lora_bias"] = (self.out_features,)
        if self.use_dora:
            shapes["lora_magnitude"] = (self.out_features,)
        return shapes

    @property
    def element_count(self) -> int:
        """Number of trained elements of this module."""
        return sum(math.prod(shape) for shape in self.shapes().values())


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor trained in full: a parameter of a module in `modules_to_save`, or rows of an embedding."""

    # name of the parameter (`lm_head.weight`), or the embedding's path with `trainable_tokens` for rows of an embedding
    name: str
    shape: Shape
    # ids of the tokens whose embedding rows are trained, in order; None for a parameter
    token_ids: tuple[int, ...] | None = None

    @property
    def base_name(self) -> str:
        """Name of the base model's tensor whose values it starts from."""
        return self.name if self.token_ids is None else self.name.removesuffix(TOKENS) + "weight"


class AdapterLayout(NamedTuple):
    """Contents of an adapter: the adapted modules and the tensors trained in full."""

    slots: tuple[LoRASlot, ...]
    full_tensors: tuple[TrainedTensor, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the adapted modules, and of the tensors trained in full."""
        return [*(slot.name for slot in self.slots), *(tensor.name for tensor in self.full_tensors)]

    @property
    def element_count(self) -> int:
        """Number of trained elements."""
        in_full = sum(math.prod(tensor.shape) for tensor in self.full_tensors)
        return in_full + sum(slot.element_count for slot in self.slots)


class LoRAParameters:
    """All trained tensors of an adapter, as views of one flat fp32 buffer.

    The buffer contains the slots in order, each with lora_A, lora_B and its other tensors, and then the tensors trained
    in full.

    Args:
        slots: the adapted modules. Names must be unique.
        full_tensors: the tensors trained in full.
        dtype: float32 in training, float64 in proofs.

    Attributes:
        slots, full_tensors: the arguments, by name.
        plain: True if there is nothing but lora_A and lora_B of linear modules.
        compute_values: the buffer in the compute dtype of the last `refresh_compute`. It is replaced when the dtype
            changes.
    """

    def __init__(
        self,
        slots: Iterable[LoRASlot],
        *,
        full_tensors: Iterable[TrainedTensor] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.slots: dict[str, LoRASlot] = {}
        for slot in slots:
            if slot.name in self.slots:
                raise ValueError(f"two slots are named {slot.name}")
            self.slots[slot.name] = slot
        self.full_tensors = {tensor.name: tensor for tensor in full_tensors}
        self.plain = not self.full_tensors and not any(
            slot.use_dora or slot.lora_bias or slot.embedding for slot in self.slots.values()
        )
        self._places: dict[str, tuple[int, int, Shape]] = {}
        offset = 0
        for name, shape in chain(
            ((f"{slot.name}.{part}", shape) for slot in self.slots.values() for part, shape in slot.shapes().items()),
            ((tensor.name, tensor.shape) for tensor in self.full_tensors.values()),
        ):
            end = offset + math.prod(shape)
            self._places[name] = (offset, end, shape)
            offset = end
        self.values = torch.zeros(offset, device=device, dtype=dtype)
        self.gradients = torch.zeros(offset, device=device, dtype=dtype)
        self._values, self._gradients = self._views(self.values), self._views(self.gradients)
        self.compute_values, self._computed = self.values, self._values

    @property
    def layout(self) -> AdapterLayout:
        """Contents of the buffers."""
        return AdapterLayout(tuple(self.slots.values()), tuple(self.full_tensors.values()))

    def __contains__(self, name: str) -> bool:
        return name in self.slots

    @property
    def element_count(self) -> int:
        """Number of trained elements."""
        return self.values.numel()

    def initialise(self, generator: torch.Generator) -> None:
        """Initialize the factors as in PEFT, so that they have no effect yet. Other tensors are zero.

        lora_A is Kaiming-uniform with a = √5, i.e. U(-1/√in, 1/√in), and lora_B zero. In an embedding, lora_A is zero
        and lora_B standard normal. `initialise_from_base` sets the other tensors.
        """
        self.values.zero_()
        for name, slot in self.slots.items():
            if slot.embedding:
                drawn = torch.randn(slot.out_features, slot.rank, generator=generator, device=generator.device)
                self.lora_B(name).copy_(drawn)
            else:
                bound = 1 / math.sqrt(slot.in_features)
                rows = slot.rank * max(1, slot.experts)
                drawn = torch.rand(rows, slot.in_features, generator=generator, device=generator.device)
                self.lora_A(name).copy_((2 * drawn - 1) * bound)
        self.refresh_compute(self.compute_values.dtype)

    def initialise_from_base(self, base_tensor: Callable[[str], Tensor]) -> None:
        """Set the tensors that start from the base model.

        Magnitudes start at the norms of the weight's rows, and tensors trained in full at the values of the base.

        Args:
            base_tensor: returns a tensor of the base model by its name, such as `lm_head.weight`.
        """
        for name, slot in self.slots.items():
            if slot.use_dora:
                weight = base_tensor(f"{name}.weight")
                self.tensor(f"{name}.lora_magnitude").copy_(row_squares(weight.T if slot.embedding else weight).sqrt())
        for name, tensor in self.full_tensors.items():
            base = base_tensor(tensor.base_name)
            self.tensor(name).copy_(base if tensor.token_ids is None else base[list(tensor.token_ids)])
        self.refresh_compute(self.compute_values.dtype)

    def refresh_compute(self, dtype: torch.dtype) -> None:
        """Cast all values to the compute dtype, once per optimizer step.

        For the buffer's own dtype, no copy is made.
        """
        if dtype == self.values.dtype:
            self.compute_values, self._computed = self.values, self._values
        elif self.compute_values.dtype == dtype:
            self.compute_values.copy_(self.values)
        else:
            self.compute_values = self.values.to(dtype)
            self._computed = self._views(self.compute_values)

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return views of all tensors in a buffer, by name.

        A step uses each view several times, and creating one takes longer than a lookup. All are created at once: small
        permanent objects allocated between activations would fragment the memory.
        """
        return {name: buffer[start:end].view(shape) for name, (start, end, shape) in self._places.items()}

    def tensor(self, name: str) -> Tensor:
        """Return the values of one tensor, such as `<module>.lora_magnitude`, as a view."""
        return self._values[name]

    def compute(self, name: str) -> Tensor:
        """Return one tensor in the compute dtype, as of the last `refresh_compute`, as a view."""
        return self._computed[name]

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of one tensor as a view."""
        return self._gradients[name]

    def token_ids(self, name: str) -> Tensor:
        """Return the ids of the tokens whose rows a trained tensor contains, (n,) int64."""
        return torch.tensor(not_none(self.full_tensors[name].token_ids), device=self.values.device)

    def lora_A(self, name: str) -> Tensor:
        """Return the values of lora_A of shape (rank, in) as a view."""
        return self._values[f"{name}.lora_A"]

    def lora_B(self, name: str) -> Tensor:
        """Return the values of lora_B of shape (out, rank) as a view."""
        return self._values[f"{name}.lora_B"]

    def compute_A(self, name: str) -> Tensor:
        """Return lora_A in the compute dtype, (rank, in), as of the last `refresh_compute`."""
        return self._computed[f"{name}.lora_A"]

    def compute_B(self, name: str) -> Tensor:
        """Return lora_B in the compute dtype, (out, rank), as of the last `refresh_compute`."""
        return self._computed[f"{name}.lora_B"]

    def d_lora_A(self, name: str) -> Tensor:
        """Return the gradient of lora_A of shape (rank, in) as a view."""
        return self._gradients[f"{name}.lora_A"]

    def d_lora_B(self, name: str) -> Tensor:
        """Return the gradient of lora_B of shape (out, rank) as a view."""
        return self._gradients[f"{name}.lora_B"]

    def delta_weight(self, name: str) -> Tensor:
        """Return s B A of shape (out, in) in the buffer's dtype. For experts it is stacked, (experts · out, in)."""
        slot, lora_A, lora_B = self.slots[name], self.lora_A(name), self.lora_B(name)
        if slot.experts:
            lora_A, lora_B = expert_factors(lora_A, lora_B, slot.experts)
            lora_B = deinterleave_gate_up(lora_B).flatten(1, 2) if slot.interleaved else lora_B
        return slot.scaling * (lora_B @ lora_A).view(-1, slot.in_features)

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Return (name, view) of all trained tensors in buffer order, such as `<module>.lora_A`."""
        return self._values.items()


def expert_factors(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return views of the experts' factors, (experts, rank, in) and (experts, out, rank).

    Args:
        lora_A: (experts · rank, in), expert by expert.
        lora_B: (out, rank · experts), with the experts interleaved in the columns.
    """
    return lora_A.unflatten(0, (experts, -1)), lora_B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def deinterleave_gate_up(lora_B: Tensor) -> Tensor:
    """Return a view of lora_B with interleaved gate and up rows, (experts, 2f, rank), as (experts, 2, f, rank)."""
    apart: Tensor = lora_B.unflatten(1, (-1, 2)).transpose(1, 2)
    return apart

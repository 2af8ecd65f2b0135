"""All trained tensors of one adapter in one flat buffer, their gradients in a second.

One buffer means one fused optimizer call, one norm, one cast to the compute dtype, one all-reduce.
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
"""Last part of the name of trained embedding rows."""


@dataclass(frozen=True)
class LoRASlot:
    """One adapted module: where it is, how large its factors are, and what is trained beside them."""

    name: str  # dotted module path, e.g. `model.layers.0.self_attn.q_proj`
    # in_features, out_features: the frozen weight is (out_features, in_features), an embedding's (in, out)
    in_features: int
    out_features: int
    rank: int  # rows of lora_A, columns of lora_B
    scaling: float  # the multiplier of the low-rank branch, alpha / rank or alpha / √rank
    dropout: float = 0.0  # probability that an input element of the low-rank branch is dropped; an embedding has none
    use_dora: bool = False  # whether a magnitude of the adapted weight's rows is trained, see `ops.dora`
    lora_bias: bool = False  # whether lora_B has a bias, see `ops.lora_bias`
    embedding: bool = False  # whether the module is an embedding, of in_features tokens
    # how many experts' matrices, (out_features, in_features) each, are one parameter; 0 for a module. Their factors lie
    # in two matrices as PEFT has them: expert by expert in lora_A's rows, rank by rank in lora_B's columns
    # (`expert_factors`)
    experts: int = 0
    # whether the rows of the experts' lora_B are gate's and up's interleaved, as PEFT has them where the parameter's
    # outputs are; the matrices here have gate's rows before up's
    interleaved: bool = False

    def shapes(self) -> dict[str, Shape]:
        """Shape of everything that is trained in this module, by the last part of its name."""
        rows = self.rank * max(1, self.experts)
        shapes: dict[str, Shape] = {"lora_A": (rows, self.in_features), "lora_B": (self.out_features, rows)}
        if self.lora_bias:
            shapes["lora_bias"] = (self.out_features,)
        if self.use_dora:
            shapes["lora_magnitude"] = (self.out_features,)
        return shapes

    @property
    def element_count(self) -> int:
        """Trained elements of this module."""
        return sum(math.prod(shape) for shape in self.shapes().values())


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor trained as it is beside the factors: a parameter of a module in `modules_to_save`, or embedding rows."""

    name: str  # of the parameter, e.g. `lm_head.weight`; of embedding rows, the embedding's path and `trainable_tokens`
    shape: Shape
    # of embedding rows, the tokens they belong to, in their order; None for a parameter
    token_ids: tuple[int, ...] | None = None

    @property
    def base_name(self) -> str:
        """The base model's tensor that it starts from."""
        return self.name if self.token_ids is None else self.name.removesuffix(TOKENS) + "weight"


class AdapterLayout(NamedTuple):
    """What an adapter consists of: the adapted modules, and the tensors trained as they are."""

    slots: tuple[LoRASlot, ...]
    trained: tuple[TrainedTensor, ...] = ()

    @property
    def element_count(self) -> int:
        """Trained elements in all."""
        beside = sum(math.prod(tensor.shape) for tensor in self.trained)
        return beside + sum(slot.element_count for slot in self.slots)


class LoRAParameters:
    """Everything an adapter trains, as views of one flat fp32 buffer.

    The order in the buffer is that of the slots, in each lora_A, lora_B and what else it has, and then that of the
    tensors trained as they are.

    Args:
        slots: the adapted modules; names must be unique.
        dtype: float32 in training; float64 in proofs.

    Attributes:
        slots, trained: as given, by name.
        plain: whether there is nothing but lora_A and lora_B of linear modules.
        compute_values: the buffer in the compute dtype of the last `refresh_compute`; another one where that changes.
    """

    def __init__(
        self,
        slots: Iterable[LoRASlot],
        *,
        trained: Iterable[TrainedTensor] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.slots: dict[str, LoRASlot] = {}
        for slot in slots:
            if slot.name in self.slots:
                raise ValueError(f"two slots are named {slot.name}")
            self.slots[slot.name] = slot
        self.trained = {tensor.name: tensor for tensor in trained}
        self.plain = not self.trained and not any(
            slot.use_dora or slot.lora_bias or slot.embedding for slot in self.slots.values()
        )
        self._places: dict[str, tuple[int, int, Shape]] = {}
        offset = 0
        for name, shape in chain(
            ((f"{slot.name}.{part}", shape) for slot in self.slots.values() for part, shape in slot.shapes().items()),
            ((tensor.name, tensor.shape) for tensor in self.trained.values()),
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
        """What the buffers hold."""
        return AdapterLayout(tuple(self.slots.values()), tuple(self.trained.values()))

    def __contains__(self, name: str) -> bool:
        return name in self.slots

    @property
    def element_count(self) -> int:
        """Trained elements in all."""
        return self.values.numel()

    def initialise(self, generator: torch.Generator) -> None:
        """Fill the factors as PEFT does, so that they change nothing yet; everything else is zero until `start_at`.

        lora_A is Kaiming-uniform with a = √5, i.e. U(-1/√in, 1/√in), and lora_B zero; in an embedding lora_A is zero
        and lora_B standard normal.
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

    def start_at(self, base_tensor: Callable[[str], Tensor]) -> None:
        """Set what starts from the base model: magnitudes to its weights' lengths, trained tensors to its own.

        Args:
            base_tensor: gives a tensor of the base model by its name, such as `lm_head.weight`.
        """
        for name, slot in self.slots.items():
            if slot.use_dora:
                weight = base_tensor(f"{name}.weight")
                self.tensor(f"{name}.lora_magnitude").copy_(row_squares(weight.T if slot.embedding else weight).sqrt())
        for name, tensor in self.trained.items():
            base = base_tensor(tensor.base_name)
            self.tensor(name).copy_(base if tensor.token_ids is None else base[list(tensor.token_ids)])
        self.refresh_compute(self.compute_values.dtype)

    def refresh_compute(self, dtype: torch.dtype) -> None:
        """Cast everything to the compute dtype, once an optimizer step; in the same dtype it is the same buffer."""
        if dtype == self.values.dtype:
            self.compute_values, self._computed = self.values, self._values
        elif self.compute_values.dtype == dtype:
            self.compute_values.copy_(self.values)
        else:
            self.compute_values = self.values.to(dtype)
            self._computed = self._views(self.compute_values)

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of all tensors in a buffer, by name.

        A step asks for each several times, and making one takes longer than finding it. All are made at once: what is
        made for good between activations that come and go keeps their places from being filled again.
        """
        return {name: buffer[start:end].view(shape) for name, (start, end, shape) in self._places.items()}

    def tensor(self, name: str) -> Tensor:
        """View of the trained values of one tensor, such as `<module>.lora_magnitude`."""
        return self._values[name]

    def compute(self, name: str) -> Tensor:
        """View of one tensor in the compute dtype, as of the last `refresh_compute`."""
        return self._computed[name]

    def gradient(self, name: str) -> Tensor:
        """View of the gradient buffer for one tensor."""
        return self._gradients[name]

    def token_ids(self, name: str) -> Tensor:
        """(n,) int64 ids of the tokens whose rows a trained tensor holds."""
        return torch.tensor(not_none(self.trained[name].token_ids), device=self.values.device)

    def lora_A(self, name: str) -> Tensor:
        """(rank, in) view of the trained values."""
        return self._values[f"{name}.lora_A"]

    def lora_B(self, name: str) -> Tensor:
        """(out, rank) view of the trained values."""
        return self._values[f"{name}.lora_B"]

    def compute_A(self, name: str) -> Tensor:
        """(rank, in) view in the compute dtype, as of the last `refresh_compute`."""
        return self._computed[f"{name}.lora_A"]

    def compute_B(self, name: str) -> Tensor:
        """(out, rank) view in the compute dtype, as of the last `refresh_compute`."""
        return self._computed[f"{name}.lora_B"]

    def d_lora_A(self, name: str) -> Tensor:
        """(rank, in) view of the gradient buffer."""
        return self._gradients[f"{name}.lora_A"]

    def d_lora_B(self, name: str) -> Tensor:
        """(out, rank) view of the gradient buffer."""
        return self._gradients[f"{name}.lora_B"]

    def delta_weight(self, name: str) -> Tensor:
        """s B A, (out, in) in the buffer's dtype; of experts (experts · out, in), one below the other."""
        slot, lora_A, lora_B = self.slots[name], self.lora_A(name), self.lora_B(name)
        if slot.experts:
            lora_A, lora_B = expert_factors(lora_A, lora_B, slot.experts)
            lora_B = gate_and_up(lora_B).flatten(1, 2) if slot.interleaved else lora_B
        return slot.scaling * (lora_B @ lora_A).view(-1, slot.in_features)

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """(name, view) of everything that is trained, in buffer order, such as `<module>.lora_A`."""
        return self._values.items()


def expert_factors(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Views of the experts' factors, (experts, rank, in) and (experts, out, rank).

    Args:
        lora_A: (experts · rank, in), one expert's rows below the other's.
        lora_B: (out, rank · experts), in whose columns the experts are interleaved.
    """
    return lora_A.unflatten(0, (experts, -1)), lora_B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def gate_and_up(lora_B: Tensor) -> Tensor:
    """View of experts' lora_B with interleaved rows of gate and up, (experts, 2f, rank): (experts, 2, f, rank)."""
    apart: Tensor = lora_B.unflatten(1, (-1, 2)).transpose(1, 2)
    return apart

"""An adapter in plain torch, for autograd to differentiate: low-rank factors, DoRA, dropout, tensors trained whole.

In float64 and without dropout it acts as W + s B A; `reference_decoder` says what it shares with the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from backhand.nn.batch import IGNORE_INDEX
from backhand.nn.decoder.adapted_group import BEFORE_BLOCKS, EMBEDDING, block_seed, group_of, group_seed
from backhand.nn.decoder.family import PER_LAYER_MODEL
from backhand.nn.lora_parameters import LoRASlot, TrainedTensor
from backhand.ops.dropout import dropout_multiplier

Tensors = Mapping[str, Tensor]
HEAD = "lm_head"


@dataclass(frozen=True)
class ReferenceAdapter:
    """An adapter for the reference."""

    slots: Mapping[str, LoRASlot]
    factors: Tensors  # everything trained by its name in `LoRAParameters`, the tensors that autograd differentiates for
    dropout_seed: int | None = None  # of the step, or None for no dropout
    trained: Mapping[str, TrainedTensor] = field(default_factory=dict)  # the tensors trained as they are, by name

    def weights(self, base: Tensors, tied: bool) -> Tensors:
        """The base's tensors with those trained as they are in their places; a head that is tied no longer by name."""
        found = dict(base)
        if tied:
            found[f"{HEAD}.weight"] = base[f"{EMBEDDING}.weight"]
        for name, tensor in self.trained.items():
            value = self.factors[name]
            if tensor.token_ids is None:
                found[name] = value
                continue
            token_ids = torch.tensor(tensor.token_ids, device=value.device)
            found[tensor.base_name] = base[tensor.base_name].index_copy(0, token_ids, value)
            if tied:
                found[f"{HEAD}.weight"] = found[tensor.base_name]
        return found

    def embedding(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of the table, (tokens, hidden), with the low-rank update and DoRA's magnitude where there are any."""
        slot = self.slots.get(EMBEDDING)
        if slot is None:
            return table[ids]
        lora_A, lora_B = self.factors[f"{EMBEDDING}.lora_A"], self.factors[f"{EMBEDDING}.lora_B"]
        rows = table[ids] + slot.scaling * (lora_A.T[ids] @ lora_B.T)
        return rows * self._gain(slot, table.T, lora_A, lora_B) if slot.use_dora else rows

    def _gain(self, slot: LoRASlot, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """DoRA's m / c, (out,), with c held constant."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        adapted = weight.to(wide) + slot.scaling * (lora_B.to(wide) @ lora_A.to(wide))
        norm = adapted.detach().square().sum(1).sqrt()
        return (self.factors[f"{slot.name}.lora_magnitude"] / norm).to(weight.dtype)

    def linear(self, x: Tensor, name: str, weights: Tensors, wanted: Tensor | None = None) -> Tensor:
        """The module `name` of a block on x (tokens, in): frozen weight, bias and low-rank update.

        wanted: (tokens,) bool, the rows that anybody reads, for which alone masks are drawn; None for all.
        """
        if self.dropout_seed is None or name not in self.slots:
            return self._linear(x, name, weights, None)
        if name == PER_LAYER_MODEL:
            seed = block_seed(self.dropout_seed, 0, BEFORE_BLOCKS)
        else:
            _, _, layer, part = name.split(".", 3)
            seed = block_seed(self.dropout_seed, int(layer), group_of(part))
        mask = self._mask(x, name, seed, wanted)
        return self._linear(x, name, weights, mask)

    def expert(self, x: Tensor, name: str, expert: int, weight: Tensor) -> Tensor:
        """One expert's matrix of the parameter `name`, (out, in), with its low-rank update, on x (tokens, in)."""
        slot = self.slots.get(name)
        if slot is None:
            return functional.linear(x, weight)
        lora_A = self.factors[f"{name}.lora_A"][expert * slot.rank : (expert + 1) * slot.rank]
        lora_B = self.factors[f"{name}.lora_B"][:, expert :: slot.experts]
        if x.dtype == torch.float64:
            return functional.linear(x, weight + slot.scaling * (lora_B @ lora_A))
        low_rank = functional.linear(functional.linear(x, lora_A), lora_B)
        return functional.linear(x, weight) + slot.scaling * low_rank

    def head(self, x: Tensor, weights: Tensors, labels: Tensor, layers: int) -> Tensor:
        """The head on x (tokens, hidden); it stands above `layers` blocks. Masks are drawn for supervised rows only."""
        if self.dropout_seed is None or HEAD not in self.slots:
            return self._linear(x, HEAD, weights, None)
        mask = self._mask(x, HEAD, group_seed(self.dropout_seed, layers, 0), labels != IGNORE_INDEX)
        return self._linear(x, HEAD, weights, mask)

    def _linear(self, x: Tensor, name: str, weights: Tensors, mask: Tensor | None) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        slot = self.slots.get(name)
        if slot is None:
            return functional.linear(x, weight, bias)
        lora_A, lora_B = self.factors[f"{name}.lora_A"], self.factors[f"{name}.lora_B"]
        if slot.use_dora:
            gain = self._gain(slot, weight, lora_A, lora_B)
            dropped = x if mask is None else x * mask
            low_rank = slot.scaling * functional.linear(functional.linear(dropped, lora_A), lora_B)
            # As PEFT writes it: what dropout takes out of x still passes through the frozen weight.
            frozen = functional.linear(x, weight, bias)
            return frozen + (gain - 1) * functional.linear(dropped, weight) + gain * low_rank
        if slot.lora_bias:
            offset = slot.scaling * self.factors[f"{name}.lora_bias"]
            bias = offset if bias is None else bias + offset
        if mask is None and x.dtype == torch.float64:
            return functional.linear(x, weight + slot.scaling * (lora_B @ lora_A), bias)
        # In low precision the sum W + s B A would be rounded to W's grid, which is not how adapters are trained.
        low_rank = functional.linear(functional.linear(x if mask is None else x * mask, lora_A), lora_B)
        return functional.linear(x, weight, bias) + slot.scaling * low_rank

    def _mask(self, x: Tensor, name: str, seed: int, wanted: Tensor | None) -> Tensor | None:
        """The dropout multiplier of x's shape, zero in rows not wanted; None where the module has no dropout."""
        probability = self.slots[name].dropout
        if not probability:
            return None
        rows = x if wanted is None else x[wanted]
        drawn = dropout_multiplier(rows.shape, probability, seed, dtype=x.dtype, device=x.device)
        return drawn if wanted is None else torch.zeros_like(x).masked_scatter(wanted[:, None], drawn)

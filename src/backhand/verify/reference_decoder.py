"""The decoder in plain torch, for autograd to differentiate: the engine's function by another route.

It calls no forward or backward of ours and shares only what is constant: the frozen weights by their Hugging Face
names, the family as data, the rotary frequencies (equal to transformers' bit by bit) and the dropout masks. Adapters
act as W + s B A where there is no dropout, each document is attended on its own with an explicit softmax, and the loss
comes from full logits.

In low precision it computes as transformers does: norms, rotation angles, softmax and loss in float32, the rest in the
weights' dtype. Its error there is the yardstick for the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.block_adapter import EMBEDDING, GROUPS, group_seed
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import LoRASlot, TrainedTensor
from backhand.nn.rotary_frequencies import inverse_frequencies
from backhand.ops.dropout import dropout_multiplier

Tensors = Mapping[str, Tensor]
HEAD = "lm_head"


@dataclass(frozen=True)
class ReferenceAdapter:
    """An adapter for the reference.

    Attributes:
        slots: the adapted modules by name.
        factors: everything trained by its name in `LoRAParameters`, the tensors that autograd differentiates for.
        dropout_seed: of the step, or None for no dropout.
        trained: the tensors trained as they are, by name.
    """

    slots: Mapping[str, LoRASlot]
    factors: Tensors
    dropout_seed: int | None = None
    trained: Mapping[str, TrainedTensor] = field(default_factory=dict)

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
        _, _, layer, part = name.split(".", 3)
        group = next(index for index, parts in enumerate(GROUPS) if part in parts)
        mask = self._mask(x, name, group_seed(self.dropout_seed, int(layer), group), wanted)
        return self._linear(x, name, weights, mask)

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


def reference_loss(weights: Tensors, config: DecoderConfig, batch: PackedBatch, adapter: ReferenceAdapter) -> Tensor:
    """Σ nats over the supervised positions, 0-d.

    Args:
        weights: every frozen tensor by its Hugging Face name, all in one dtype.
        config: the family.
        batch: the packed documents; a prefix that they share is computed for each of them.
        adapter: its factors in the dtype of the weights.
    """
    batch = _whole_documents(batch)
    weights = adapter.weights(weights, config.tied_head) if adapter.trained else weights
    x = reference_embedding(weights, config, batch.input_ids, adapter)
    layers = len(config.layers)
    for layer in range(layers):
        # Of the last block the loss reads the supervised positions alone.
        wanted = batch.labels != IGNORE_INDEX if layer == layers - 1 else None
        x = reference_block(x, layer, weights, config, batch.document_lengths, adapter, wanted)
    return reference_head(x, weights, config, batch.labels, adapter)


def _whole_documents(batch: PackedBatch) -> PackedBatch:
    """The same documents, each with the shared prefix in it."""
    shared = batch.shared_prefix
    if not shared:
        return batch
    lengths = list(batch.document_lengths)
    parts = [
        torch.cat([piece for own in tokens[shared:].split(lengths) for piece in (tokens[:shared], own)] or [tokens[:0]])
        for tokens in (batch.input_ids, batch.labels)
    ]
    return PackedBatch(parts[0], parts[1], tuple(shared + length for length in lengths))


def reference_embedding(weights: Tensors, config: DecoderConfig, ids: Tensor, adapter: ReferenceAdapter) -> Tensor:
    """(tokens, hidden)."""
    rows = adapter.embedding(ids, weights[f"{EMBEDDING}.weight"])
    return rows * torch.tensor(config.embedding_scaling, dtype=rows.dtype, device=rows.device)


def reference_head(
    x: Tensor, weights: Tensors, config: DecoderConfig, labels: Tensor, adapter: ReferenceAdapter
) -> Tensor:
    """Final norm, output projection at every position and Σ cross-entropy over the supervised ones, 0-d."""
    name = f"{HEAD}.weight" if f"{HEAD}.weight" in weights else f"{EMBEDDING}.weight"
    normed = _norm(x, weights["model.norm.weight"], config)
    logits = adapter.head(normed, {"lm_head.weight": weights[name]}, labels, len(config.layers))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def reference_block(
    x: Tensor,
    layer: int,
    weights: Tensors,
    config: DecoderConfig,
    document_lengths: Sequence[int],
    adapter: ReferenceAdapter,
    wanted: Tensor | None = None,
) -> Tensor:
    """One block on x (tokens, hidden), at all positions; wanted: as in `ReferenceAdapter.linear`."""
    block = f"model.layers.{layer}"
    branch = _norm(x, weights[f"{block}.input_layernorm.weight"], config)
    branch = _attention(branch, layer, weights, config, document_lengths, adapter, wanted)
    if config.sandwich_norms:
        branch = _norm(branch, weights[f"{block}.post_attention_layernorm.weight"], config)
    x = x + branch
    before_mlp = "pre_feedforward_layernorm" if config.sandwich_norms else "post_attention_layernorm"
    branch = _norm(x, weights[f"{block}.{before_mlp}.weight"], config)
    gate = adapter.linear(branch, f"{block}.mlp.gate_proj", weights, wanted)
    up = adapter.linear(branch, f"{block}.mlp.up_proj", weights, wanted)
    activated = functional.silu(gate) if config.activation == "silu" else functional.gelu(gate, approximate="tanh")
    branch = adapter.linear(activated * up, f"{block}.mlp.down_proj", weights, wanted)
    if config.sandwich_norms:
        branch = _norm(branch, weights[f"{block}.post_feedforward_layernorm.weight"], config)
    return x + branch


def _norm(x: Tensor, weight: Tensor, config: DecoderConfig) -> Tensor:
    """RMSNorm over the last axis; the gain is 1 + weight in some families."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + config.norm_eps)
    return (normed * (config.norm_offset + weight.to(wide.dtype))).to(x.dtype)


def _attention(
    x: Tensor,
    layer: int,
    weights: Tensors,
    config: DecoderConfig,
    document_lengths: Sequence[int],
    adapter: ReferenceAdapter,
    wanted: Tensor | None,
) -> Tensor:
    """The attention branch, (tokens, hidden), from the normed x, document by document."""
    name = f"model.layers.{layer}.self_attn"
    q, k, v = (adapter.linear(x, f"{name}.{part}_proj", weights).unflatten(-1, (-1, config.head_dim)) for part in "qkv")
    if config.qk_norm:
        q = _norm(q, weights[f"{name}.q_norm.weight"], config)
        k = _norm(k, weights[f"{name}.k_norm.weight"], config)
    rotary = config.rotary[config.layers[layer].rotary]
    frequencies = inverse_frequencies(rotary, config.head_dim, x.device)
    group = config.num_heads // config.num_key_value_heads
    outputs = []
    lengths = list(document_lengths)
    for q_one, k_one, v_one in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_turned, k_turned = _turn(q_one, frequencies), _turn(k_one, frequencies)
        k_each, v_each = (part.repeat_interleave(group, dim=1) for part in (k_turned, v_one))
        scores = torch.einsum("qhd,khd->hqk", q_turned, k_each) * config.attention_scaling
        scores = scores.masked_fill(~_visible(len(q_one), config.layers[layer].window, x.device), float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        probabilities = torch.softmax(scores, dim=-1, dtype=wide).to(x.dtype)
        outputs.append(torch.einsum("hqk,khd->qhd", probabilities, v_each).flatten(1))
    return adapter.linear(torch.cat(outputs), f"{name}.o_proj", weights, wanted)


def _turn(x: Tensor, frequencies: Tensor) -> Tensor:
    """x (length, heads, head_dim) turned by position · frequency, the pairs lying across the halves."""
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(x.shape[0], device=x.device, dtype=wide)
    angles = torch.outer(positions, frequencies.to(wide))
    cos, sin = (torch.cat([part, part], dim=-1)[:, None, :].to(x.dtype) for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys (columns) a query (row) sees: itself and those before it, as many as the window allows."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < (length if window is None else window))

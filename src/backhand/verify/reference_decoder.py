"""The decoder in plain torch, for autograd to differentiate: the engine's function by another route.

It calls no forward or backward of an op, only the references of convolutions and the delta rule. With the engine it
shares only constants: the frozen weights by their Hugging Face names, the family's configuration, the rotary
frequencies (equal to transformers' bit by bit) and the dropout masks. Adapters act as W + s B A unless there is
dropout. Each document is attended separately with an explicit softmax, and the loss is computed from full logits.

In low precision it computes as transformers does: norms, rotation angles, softmax and loss in float32, the rest in the
weights' dtype. Its error there is the yardstick for the engine's error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.errors import not_none
from backhand.nn.batch import IGNORE_INDEX, PackedBatch, document_runs
from backhand.nn.decoder.adapted_group import BEFORE_BLOCKS, HEAD, group_mask_seed, group_of
from backhand.nn.families.family import (
    ATTENTION,
    ATTENTION_AND_SSM,
    GATED_DELTA,
    LAYER_SCALAR,
    MLP,
    PER_LAYER_GROUPS,
    PER_LAYER_MODEL,
    PER_LAYER_MODEL_NORM,
    PER_LAYER_NORM,
    PER_LAYER_TABLE,
    SHORT_CONV,
    SINKS,
    SSM,
    DecoderConfig,
    Mixture,
    QueryScaling,
    RotaryConfig,
    split_layer,
)
from backhand.nn.families.rotary_frequencies import inverse_frequencies
from backhand.nn.lora_parameters import LoRASlot, TrainedTensor
from backhand.ops.causal_conv import Taps, causal_conv_reference
from backhand.ops.decay_gate import decay_gate_reference
from backhand.ops.document_groups import SegmentRun
from backhand.ops.dropout import dropout_multiplier
from backhand.ops.gated_delta_rule import gated_delta_rule_reference
from backhand.ops.ssd import ssd_reference
from backhand.ops.time_step import time_step_reference
from backhand.verify.packed_tokens import unshare_prefixes

Tensors = Mapping[str, Tensor]
NatsLoss = Callable[[Tensor], Tensor]
StatesLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ReferenceAdapter:
    """An adapter: low-rank factors, DoRA, dropout and fully trained tensors."""

    slots: Mapping[str, LoRASlot]
    factors: Tensors  # all trained tensors by their name in `LoRAParameters`, for which autograd differentiates
    dropout_seed: int | None = None  # seed of the micro-batch, or None for no dropout
    trained: Mapping[str, TrainedTensor] = field(default_factory=dict)  # name → fully trained tensor

    def weights(self, base: Tensors, config: DecoderConfig) -> Tensors:
        """Return the base's tensors with trained tensors replaced. A tied head gets a separate entry."""
        weights, tied = dict(base), config.has_head and config.tied_head
        if tied:
            weights[f"{HEAD}.weight"] = base[f"{config.embedding}.weight"]
        for name, tensor in self.trained.items():
            value = self.factors[name]
            if tensor.token_ids is None:
                weights[name] = value
                continue
            token_ids = torch.tensor(tensor.token_ids, device=value.device)
            weights[tensor.base_name] = base[tensor.base_name].index_copy(0, token_ids, value)
            if tied:
                weights[f"{HEAD}.weight"] = weights[tensor.base_name]
        return weights

    def embedding(self, ids: Tensor, name: str, table: Tensor) -> Tensor:
        """Return rows of the table, (tokens, hidden), with the low-rank update and DoRA's magnitude if adapted."""
        slot = self.slots.get(name)
        if slot is None:
            return table[ids]
        lora_A, lora_B = self._factors(name)
        rows = table[ids] + slot.scaling * (lora_A.T[ids] @ lora_B.T)
        return rows * self._magnitude_ratio(slot, table.T) if slot.use_dora else rows

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.factors[f"{name}.lora_A"], self.factors[f"{name}.lora_B"]

    def _magnitude_ratio(self, slot: LoRASlot, weight: Tensor) -> Tensor:
        """Return DoRA's m / c, (out,), with c held constant."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        lora_A, lora_B = (factor.to(wide) for factor in self._factors(slot.name))
        norm = (weight.to(wide) + slot.scaling * (lora_B @ lora_A)).detach().square().sum(1).sqrt()
        return (self.factors[f"{slot.name}.lora_magnitude"] / norm).to(weight.dtype)

    def linear(
        self, x: Tensor, name: str, weights: Tensors, loss_positions: Tensor | None = None, layers: int | None = None
    ) -> Tensor:
        """Apply the module `name` to x (tokens, in): frozen weight, bias and low-rank update.

        Args:
            loss_positions: (tokens,) bool, the rows for which dropout masks are drawn, None for all.
            layers: the number of blocks below a head.
        """
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        slot = self.slots.get(name)
        if slot is None:
            return functional.linear(x, weight, bias)
        mask, factors = self._mask(x, slot, loss_positions, layers), self._factors(name)
        dropped = x if mask is None else x * mask
        if slot.use_dora:
            ratio = self._magnitude_ratio(slot, weight)
            low_rank = slot.scaling * _low_rank(dropped, *factors)
            # PEFT's form: the features that dropout removes still pass through the frozen weight.
            return (
                functional.linear(x, weight, bias) + (ratio - 1) * functional.linear(dropped, weight) + ratio * low_rank
            )
        if slot.lora_bias:
            offset = slot.scaling * self.factors[f"{name}.lora_bias"]
            bias = offset if bias is None else bias + offset
        if mask is None:
            return _adapted_linear(x, weight, bias, *factors, slot.scaling)
        return functional.linear(x, weight, bias) + slot.scaling * _low_rank(dropped, *factors)

    def expert(self, x: Tensor, name: str, expert: int, weight: Tensor) -> Tensor:
        """Apply one expert's matrix of the parameter `name`, (out, in), with its low-rank update, to x (tokens, in)."""
        slot = self.slots.get(name)
        if slot is None:
            return functional.linear(x, weight)
        lora_A, lora_B = self._factors(name)
        factors = lora_A[expert * slot.rank : (expert + 1) * slot.rank], lora_B[:, expert :: slot.experts]
        return _adapted_linear(x, weight, None, *factors, slot.scaling)

    def _mask(self, x: Tensor, slot: LoRASlot, loss_positions: Tensor | None, layers: int | None) -> Tensor | None:
        """Return the dropout multiplier of x's shape, zero outside loss_positions, or None without dropout."""
        if self.dropout_seed is None or not slot.dropout:
            return None
        if layers is not None:
            seed = group_mask_seed(self.dropout_seed, layers, 0)
        elif slot.name == PER_LAYER_MODEL:
            seed = group_mask_seed(self.dropout_seed, 0, BEFORE_BLOCKS)
        else:
            layer, part = not_none(split_layer(slot.name))
            seed = group_mask_seed(self.dropout_seed, layer, group_of(part))
        rows = x if loss_positions is None else x[loss_positions]
        drawn = dropout_multiplier(rows.shape, slot.dropout, seed, dtype=x.dtype, device=x.device)
        return drawn if loss_positions is None else torch.zeros_like(x).masked_scatter(loss_positions[:, None], drawn)


def _low_rank(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, lora_A), lora_B)


def _adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    if x.dtype == torch.float64:
        return functional.linear(x, weight + scaling * (lora_B @ lora_A), bias)
    # In low precision the sum W + s B A would be rounded to the weight's dtype, unlike in training.
    return functional.linear(x, weight, bias) + scaling * _low_rank(x, lora_A, lora_B)


@dataclass
class ReferenceCrossLayer:
    """Inputs of blocks in addition to the stream: per-layer embeddings (tokens, layers, width), and keys and values."""

    inputs: Tensor | None = None
    shared_kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class ReferenceLayer(NamedTuple):
    """A layer with its weights, configuration, adapter and documents."""

    number: int
    weights: Tensors  # by their Hugging Face names
    config: DecoderConfig
    lengths: Sequence[int]  # lengths of the documents
    adapter: ReferenceAdapter
    loss_positions: Tensor | None = None  # as in `ReferenceAdapter.linear`
    # Per-layer embeddings and shared keys and values. The layer adds its keys and values, if they are shared.
    cross_layer: ReferenceCrossLayer | None = None

    @property
    def name(self) -> str:
        """Prefix of the names of the layer's tensors."""
        return self.config.block_path(self.number)

    def linear(self, x: Tensor, part: str, *, loss_positions_only: bool = False) -> Tensor:
        """Apply a module of the layer to x (tokens, in)."""
        return self.adapter.linear(
            x, f"{self.name}.{part}", self.weights, self.loss_positions if loss_positions_only else None
        )

    def norm(self, x: Tensor, part: str | None) -> Tensor:
        """Apply a norm of the layer, or return x if `part` is None."""
        return x if part is None else _named_norm(x, f"{self.name}.{part}", self.weights, self.config)

    @property
    def runs(self) -> tuple[SegmentRun, ...]:
        """The documents in the form that ops take."""
        return document_runs(tuple(self.lengths))

    def by_document(self, one: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply a function to each document's part of these tensors, (tokens, …), and concatenate the results."""
        return torch.cat([one(*parts) for parts in zip(*(x.split(list(self.lengths)) for x in tensors), strict=True)])


def reference_loss(
    weights: Tensors,
    config: DecoderConfig,
    batch: PackedBatch,
    adapter: ReferenceAdapter,
    nats_loss: NatsLoss = torch.sum,
    loss_of_states: StatesLoss | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Return the sum of nats over the supervised positions, 0-d. For an encoder, return its `state_loss`.

    Args:
        weights: every frozen tensor by its Hugging Face name, all in one dtype.
        batch: the packed documents; what they share is computed for each of them.
        adapter: the adapter, with factors in the dtype of the weights.
        nats_loss: another loss of the nats of the documents' supervised tokens, (supervised,).
        loss_of_states: a loss of the supervised final states, instead of the nats.
        positions: positions at which the last block draws dropout masks; None for the supervised ones.
    """
    batch = (
        unshare_prefixes(batch) if batch.parents else batch
    )  # a batch without prefixes keeps its order, in which dropout masks are drawn
    weights = adapter.weights(weights, config) if adapter.trained else weights
    x = reference_embedding(weights, config, batch, adapter)
    layers = len(config.layers)
    cross_layer = ReferenceCrossLayer(reference_inputs(x, weights, config, batch.input_ids, adapter))
    for layer in range(layers):
        # The loss reads only the supervised positions of the last block.
        loss_positions = _loss_positions(batch, positions) if layer == layers - 1 else None
        x = reference_block(
            x, ReferenceLayer(layer, weights, config, batch.lengths, adapter, loss_positions, cross_layer)
        )
    if loss_of_states is not None or not config.has_head:
        return (loss_of_states or state_loss)(reference_states(x, weights, config)[batch.labels != IGNORE_INDEX])
    return reference_head(x, weights, config, batch.labels, adapter, lambda nats: nats_loss(batch.per_document(nats)))


def _loss_positions(batch: PackedBatch, positions: Tensor | None) -> Tensor:
    """Return True for the positions at which the last block draws masks, (tokens,) bool."""
    if positions is None:
        return batch.labels != IGNORE_INDEX
    return torch.zeros_like(batch.labels, dtype=torch.bool).index_fill_(0, positions, value=True)


def reference_states(x: Tensor, weights: Tensors, config: DecoderConfig) -> Tensor:
    """Return the final states of the last block's output: after the final norm, if there is one."""
    return x if config.final_norm is None else _named_norm(x, config.final_norm, weights, config)


def state_loss(states: Tensor) -> Tensor:
    """Return a loss of an encoder's final states, (positions, hidden): a sum with weights of any size and sign."""
    return (state_weights(states) * states).sum()


def state_weights(states: Tensor) -> Tensor:
    """Return ∂/∂states of `state_loss`, (positions, hidden)."""
    places = torch.arange(1, states.numel() + 1, dtype=torch.float64, device=states.device)
    return torch.sin(places).view(states.shape).to(states.dtype)


def reference_embedding(
    weights: Tensors, config: DecoderConfig, batch: PackedBatch, adapter: ReferenceAdapter
) -> Tensor:
    """Return the input of the first block, (tokens, hidden)."""
    rows = adapter.embedding(batch.input_ids, config.embedding, weights[f"{config.embedding}.weight"])
    rows = rows * torch.tensor(config.embedding_scaling, dtype=rows.dtype, device=rows.device)
    if (names := config.inputs) is None:
        return rows
    if names.token_types is not None:
        types = torch.zeros_like(batch.input_ids) if batch.token_types is None else batch.token_types
        rows = rows + functional.embedding(types, weights[f"{names.token_types}.weight"])
    if names.positions is not None:
        places = [torch.arange(length, device=rows.device) for length in batch.lengths]
        rows = rows + functional.embedding(torch.cat(places), weights[f"{names.positions}.weight"])
    return _named_norm(rows, names.norm, weights, config)


def reference_inputs(
    x: Tensor, weights: Tensors, config: DecoderConfig, ids: Tensor, adapter: ReferenceAdapter
) -> Tensor | None:
    """Return the per-layer embeddings, (tokens, layers, width), or None for a model without them."""
    if config.per_layer is None:
        return None
    width, layers, _ = config.per_layer
    projected = adapter.linear(x, PER_LAYER_MODEL, weights) / config.hidden_size**0.5
    projected = _norm(projected.unflatten(-1, (layers, width)), weights[f"{PER_LAYER_MODEL_NORM}.weight"], config)
    rows = weights[f"{PER_LAYER_TABLE}.weight"][ids]
    # transformers rounds the root to the dtype of the rows.
    root = torch.tensor(width**0.5, dtype=torch.float32, device=rows.device).to(rows.dtype)
    return (projected + (rows * root).view_as(projected)) / 2**0.5


def reference_head(
    x: Tensor,
    weights: Tensors,
    config: DecoderConfig,
    labels: Tensor,
    adapter: ReferenceAdapter,
    nats_loss: NatsLoss = torch.sum,
) -> Tensor:
    """Return the sum of cross-entropy over the supervised positions, 0-d, after final norm and output projection."""
    head = weights[f"{HEAD if f'{HEAD}.weight' in weights else config.embedding}.weight"]
    normed = _named_norm(x, not_none(config.final_norm), weights, config)
    supervised = labels != IGNORE_INDEX  # masks are drawn for these rows only
    logits = adapter.linear(normed, HEAD, {f"{HEAD}.weight": head}, supervised, len(config.layers))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * config.logits.scaling
    if config.logits.cap is not None:
        logits = config.logits.cap * torch.tanh(logits / config.logits.cap)
    nats = functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return nats_loss(nats[supervised])


def reference_block(x: Tensor, at: ReferenceLayer) -> Tensor:
    """Apply one block to x (tokens, hidden), at all positions."""
    layer = at.config.layers[at.number]
    config = at.config.at(layer)
    at, times = at._replace(config=config), config.residual_multiplier
    normed = at.norm(x, config.norms.before_attention if layer.input_norm else None)
    x = _sum(x, _MIXERS.get(layer.mixer, _attention)(normed, at), config.norms.after_attention, at)
    branch = at.norm(x, config.norms.before_mlp)
    if not config.has_mlp:
        return x
    mixed = _experts(branch, at) if layer.experts else torch.zeros_like(branch)
    if not config.has_mlp_in(layer):
        return x + at.norm(mixed, config.norms.after_mlp) * times
    both = torch.cat([at.linear(branch, part, loss_positions_only=True) for part in config.groups[2]], -1)
    gate, up = both.chunk(2, -1) if config.gated_mlp else (both, 1.0)
    product = _activated(gate * config.multipliers.gate, config) * up
    branch = at.linear(product, config.groups[3][0], loss_positions_only=True) * config.multipliers.down + mixed
    x = _sum(x, branch, config.norms.after_mlp, at)
    if config.per_layer is not None:
        (gate_name,), (projection,) = PER_LAYER_GROUPS
        gate, inputs = at.linear(x, gate_name, loss_positions_only=True), not_none(not_none(at.cross_layer).inputs)
        branch = at.linear(_activated(gate, config) * inputs[:, at.number], projection, loss_positions_only=True)
        x = x + at.norm(branch, PER_LAYER_NORM)
    return x * at.weights[f"{at.name}.{LAYER_SCALAR}"] if config.layer_scalar else x


def _sum(x: Tensor, branch: Tensor, norm: str | None, at: ReferenceLayer) -> Tensor:
    """Return the stream after a sublayer: the norm is that of the sublayer's output, or of the sum."""
    if at.config.norms_of_sums:
        return at.norm(x + branch, norm)
    return x + at.norm(branch, norm) * at.config.residual_multiplier


def _activated(gate: Tensor, config: DecoderConfig) -> Tensor:
    if config.activation == "silu":
        return functional.silu(gate)
    if config.activation == "relu2":
        return functional.relu(gate) * gate
    return functional.gelu(gate, approximate="tanh" if config.activation == "gelu_tanh" else "none")


def _experts(x: Tensor, at: ReferenceLayer) -> Tensor:
    """Return the mixture's output, (tokens, hidden): every expert on every token, times zero unless chosen."""
    mixture, weights, all_experts = not_none(at.config.mixture), at.weights, f"{at.name}.mlp.experts"
    router = f"{at.name}.{mixture.router}"
    logits = functional.linear(x, weights[f"{router}.weight"], weights.get(f"{router}.bias"))
    shares = torch.softmax(logits, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    chosen = torch.zeros_like(shares).scatter(-1, shares.topk(mixture.chosen).indices, 1.0)
    shares = shares * chosen if mixture.of_all else shares * chosen / (shares * chosen).sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in range(mixture.experts):
        name = f"{all_experts}.{expert}"
        both = at.adapter.expert(x, f"{all_experts}.gate_up_proj", expert, _gate_up(weights, name, "weight", mixture))
        if mixture.bias:
            both = both + _gate_up(weights, name, "bias", mixture)
        gate, up = both.unflatten(-1, (-1, 2)).unbind(-1) if mixture.interleaved else both.chunk(2, dim=-1)
        product = _activated(gate, at.config) * up if mixture.clamp is None else _clamped(gate, up, *mixture.clamp)
        output = at.adapter.expert(product, f"{all_experts}.down_proj", expert, weights[f"{name}.down_proj.weight"])
        if mixture.bias:
            output = output + weights[f"{name}.down_proj.bias"]
        y = y + output * shares[:, expert, None].to(x.dtype)
    return y


def _gate_up(weights: Tensors, expert: str, kind: str, mixture: Mixture) -> Tensor:
    """Return gate_up_proj of one expert in transformers' layout: rows of gate and up interleaved or concatenated."""
    both = [weights[f"{expert}.{part}.{kind}"] for part in ("gate_proj", "up_proj")]
    return torch.stack(both, dim=1).flatten(0, 1) if mixture.interleaved else torch.cat(both)


def _clamped(gate: Tensor, up: Tensor, gain: float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * gain))


def _named_norm(x: Tensor, name: str, weights: Tensors, config: DecoderConfig) -> Tensor:
    """Apply the norm with this name, of the family's kind."""
    if config.norm == "layer":
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        return functional.layer_norm(x, weight.shape, weight, bias, config.norm_eps)
    return _norm(x, weights[f"{name}.weight"], config)


def _norm(x: Tensor, weight: Tensor, config: DecoderConfig) -> Tensor:
    """Apply RMSNorm over the last axis. In some families the scale is 1 + weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + config.norm_eps)
    return (normed * (config.norm_offset + weight.to(wide.dtype))).to(x.dtype)


def _attention(x: Tensor, at: ReferenceLayer) -> Tensor:
    """Return attention's output, (tokens, hidden), from the normed x. Keys and values may be another layer's."""
    config, layer = at.config, at.config.layers[at.number]
    rotary = None if layer.rotary is None else config.rotary[layer.rotary]
    parts = config.mixers[ATTENTION if layer.mixer == ATTENTION_AND_SSM else layer.mixer].groups[0]
    q, *others = (at.linear(x, part) for part in parts)
    if len(config.groups[0]) == 1:
        heads = [config.num_heads, config.num_key_value_heads, config.num_key_value_heads]
        q, *others = q.split([count * config.head_dim for count in heads], dim=-1)
    gate = None
    if config.attention_gate:
        q, gate = (part.flatten(1) for part in q.unflatten(-1, (config.num_heads, 2, config.head_dim)).unbind(-2))

    def rotated(part: Tensor, norm: str) -> Tensor:
        part = at.norm(part, norm if config.qk_norm == "width" else None).unflatten(-1, (-1, config.head_dim))
        part = at.norm(part, norm if config.qk_norm == "head" else None)
        return part if rotary is None else at.by_document(lambda one: _rotate(one, rotary), part)

    q = rotated(q, config.qk_norms[0])
    if (scaling := config.query_scaling) is not None:
        q = at.by_document(lambda one: one * _query_scale(one, scaling), q)
    if layer.kv_source is None:
        v = others[-1].unflatten(-1, (-1, config.head_dim))  # projected of keys in some layers, which have nothing else
        v = _norm(v, torch.ones(config.head_dim).to(v), config) if config.value_norm else v
        shared_kv = rotated(others[0], config.qk_norms[1]), v
        if at.cross_layer is not None:
            at.cross_layer.shared_kv[at.number] = shared_kv
    else:
        shared_kv = not_none(at.cross_layer).shared_kv[layer.kv_source]
    rest = config.attention_scaling, config.attention_cap, at.weights.get(f"{at.name}.{SINKS}")

    def attended(*qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1) for part in qkv)
        seen = visible(q.shape[1], layer.window, q.device, causal=config.causal)
        one = softmax_attention(q, k, v, seen, *rest)
        return one.transpose(0, 1).flatten(1)

    output = at.by_document(attended, q, *shared_kv)
    if gate is not None:
        output = output / (1 + torch.exp(-gate))
    return at.linear(output, config.groups[1][0], loss_positions_only=True)


def _gated_delta(x: Tensor, at: ReferenceLayer) -> Tensor:
    """Return the gated delta rule's output, (tokens, hidden), by its recurrence, document by document."""
    sizes, runs, weights, inside = not_none(at.config.delta), at.runs, at.weights, f"{at.name}.linear_attn"
    inputs, (output_name,) = at.config.mixers[GATED_DELTA].groups
    qkv, z, b, a = (at.linear(x, part) for part in inputs)
    qkv = causal_conv_reference(qkv, Taps(weights[f"{inside}.conv1d.weight"].squeeze(1)), runs, silu=True)
    keys, wide = sizes.key_heads * sizes.key_width, torch.promote_types(x.dtype, torch.float32)
    q, k, v = qkv.split([keys, keys, sizes.value_heads * sizes.value_width], dim=-1)
    q, k = (part.unflatten(-1, (sizes.key_heads, sizes.key_width)).to(wide) for part in (q, k))
    q, k = (part / torch.sqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    decay = decay_gate_reference(a, weights[f"{inside}.A_log"], weights[f"{inside}.dt_bias"])
    v = v.unflatten(-1, (sizes.value_heads, sizes.value_width))
    output = gated_delta_rule_reference(q / sizes.key_width**0.5, k, v, decay, torch.sigmoid(b), runs)
    normed = _norm(output, weights[f"{inside}.norm.weight"], replace(at.config, norm_offset=0.0))
    return at.linear(normed.flatten(1) * functional.silu(z), output_name, loss_positions_only=True)


def _ssm(x: Tensor, at: ReferenceLayer) -> Tensor:
    """Return the output of Mamba-2, (tokens, hidden), by its recurrence, document by document."""
    sizes, runs, weights, inside = not_none(at.config.ssm), at.runs, at.weights, f"{at.name}.{at.config.ssm_path}"
    (input_name,), (output_name,) = at.config.mixers[SSM].groups
    projected = at.linear(x, input_name)
    if at.config.multipliers.ssm:
        parts = zip(projected.split(sizes.parts, dim=-1), at.config.multipliers.ssm, strict=True)
        projected = torch.cat([part * multiplier for part, multiplier in parts], dim=-1)
    z, xbc, a = projected.split(sizes.inputs, dim=-1)
    taps = Taps(weights[f"{inside}.conv1d.weight"].squeeze(1), weights.get(f"{inside}.conv1d.bias"))
    shared = sizes.groups * sizes.state_width
    xs, b, c = causal_conv_reference(xbc, taps, runs, silu=True).split([sizes.width, shared, shared], dim=-1)
    xs, (b, c) = xs.unflatten(-1, (sizes.heads, -1)), (part.unflatten(-1, (sizes.groups, -1)) for part in (b, c))
    dt = time_step_reference(a, weights[f"{inside}.dt_bias"], sizes.time_steps)
    scanned = ssd_reference(xs, dt, b, c, weights[f"{inside}.A_log"], weights[f"{inside}.D"], runs).flatten(1)

    def normed(y: Tensor) -> Tensor:
        gain = weights[f"{inside}.norm.weight"].unflatten(0, (sizes.groups, -1))
        return _norm(y.unflatten(-1, (sizes.groups, -1)), gain, replace(at.config, norm_offset=0.0)).flatten(1)

    gated = (normed(scanned) if sizes.norm == "before_gate" else scanned) * functional.silu(z)
    output = normed(gated) if sizes.norm == "after_gate" else gated
    return at.linear(output, output_name, loss_positions_only=True)


def _attention_and_ssm(x: Tensor, at: ReferenceLayer) -> Tensor:
    """Return the sum of attention's and Mamba-2's outputs, each with its multiplier, (tokens, hidden)."""
    multipliers = at.config.multipliers
    return _attention(x, at) * multipliers.output + _ssm(x, at) * multipliers.second_output


def _mlp(x: Tensor, at: ReferenceLayer) -> Tensor:
    """Return the output of an MLP without a gate, (tokens, hidden)."""
    (up,), (down,) = at.config.mixers[MLP].groups
    return at.linear(_activated(at.linear(x, up), at.config), down, loss_positions_only=True)


def _short_conv(x: Tensor, at: ReferenceLayer) -> Tensor:
    """Return the gated short convolution's output, (tokens, hidden), document by document."""
    (input_name,), (output_name,) = at.config.mixers[SHORT_CONV].groups
    b, c, x = at.linear(x, input_name).chunk(3, dim=-1)
    taps, bias = at.weights[f"{at.name}.conv.conv.weight"].squeeze(1), at.weights.get(f"{at.name}.conv.conv.bias")
    return at.linear(c * causal_conv_reference(b * x, Taps(taps, bias), at.runs), output_name, loss_positions_only=True)


_MIXERS: dict[str, Callable[[Tensor, ReferenceLayer], Tensor]] = {
    SHORT_CONV: _short_conv,
    GATED_DELTA: _gated_delta,
    SSM: _ssm,
    ATTENTION_AND_SSM: _attention_and_ssm,
    MLP: _mlp,
}


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scaling: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """Compute attention, (…, heads, queries, head_dim), by an explicit softmax over the visible keys."""
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = q @ k.mT * scaling
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:  # a sink is one more key without a value
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)[..., : k.shape[-2]] @ v


def _rotate(x: Tensor, rotary: RotaryConfig) -> Tensor:
    """Rotate the first features of one document's x, (length, heads, head_dim), and scale them by attention_factor.

    The angle is position · frequency. Features without a frequency stay unchanged. The features of a pair are
    neighbours, or have the same place in the two halves of the rotated features.
    """
    frequencies = inverse_frequencies(rotary, x.shape[-1], x.device, length=x.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(x.shape[0], device=x.device, dtype=wide)
    angles = torch.outer(positions, frequencies.to(wide))
    cos, sin = (part[:, None, :].to(x.dtype) for part in (angles.cos(), angles.sin()))
    turning, still = x.split([2 * len(frequencies), x.shape[-1] - 2 * len(frequencies)], dim=-1)
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if rotary.interleaved else turning.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(pair, dim=-1).flatten(-2) if rotary.interleaved else torch.cat(pair, dim=-1)
    return torch.cat([rotated * rotary.attention_factor, still], dim=-1)


def _query_scale(q: Tensor, scaling: QueryScaling) -> Tensor:
    """Return the factors of one document's queries, (length, 1, 1)."""
    steps = torch.arange(q.shape[0], device=q.device) // scaling.length
    return (1 + scaling.beta * steps.to(torch.promote_types(q.dtype, torch.float32)).log1p()).to(q.dtype)[:, None, None]


def visible(length: int, window: int | None, device: torch.device, *, causal: bool = True) -> Tensor:
    """Return a bool mask of the keys (columns) that a query (row) sees: itself and earlier keys within the window.

    Without `causal`, later keys within the window too.
    """
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) | (not causal)) & (distance.abs() < (length if window is None else window))

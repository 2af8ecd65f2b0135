"""The decoder in plain torch, for autograd to differentiate: the engine's function by another route.

It calls no forward or backward of ours, of the delta rule's ops the references, and shares only what is constant: the
frozen weights by their Hugging Face names, the family as data, the rotary frequencies (equal to transformers' bit by
bit) and the dropout masks. Adapters act as W + s B A where there is no dropout, each document is attended on its own
with an explicit softmax, and the loss comes from full logits.

In low precision it computes as transformers does: norms, rotation angles, softmax and loss in float32, the rest in the
weights' dtype. Its error there is the yardstick for the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.errors import present
from backhand.nn.batch import IGNORE_INDEX, PackedBatch, document_runs
from backhand.nn.decoder.adapted_group import EMBEDDING
from backhand.nn.decoder.family import (
    ATTENTION,
    FUSED_QKV,
    GATED_DELTA,
    KEYS_AS_VALUES,
    LAYER_SCALAR,
    PER_LAYER_GROUPS,
    PER_LAYER_MODEL,
    PER_LAYER_MODEL_NORM,
    PER_LAYER_NORM,
    PER_LAYER_TABLE,
    SHARED_KEYS,
    SHORT_CONV,
    SINKS,
    VALUE_NORMED,
    DecoderConfig,
    Mixture,
    QueryScaling,
    RotaryConfig,
)
from backhand.nn.decoder.rotary import inverse_frequencies
from backhand.ops.causal_conv import Taps, causal_conv_reference
from backhand.ops.decay_gate import decay_gate_reference
from backhand.ops.gated_delta_rule import gated_delta_rule_reference
from backhand.verify.reference_adapter import HEAD, ReferenceAdapter, Tensors

OfNats = Callable[[Tensor], Tensor]


@dataclass
class ReferenceCarried:
    """What blocks have beside the stream: inputs (tokens, layers, width), and keys and values lent, by their layer."""

    inputs: Tensor | None = None
    lent: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def reference_loss(
    weights: Tensors,
    config: DecoderConfig,
    batch: PackedBatch,
    adapter: ReferenceAdapter,
    of_nats: OfNats = torch.sum,
) -> Tensor:
    """Σ nats over the supervised positions, 0-d.

    Args:
        weights: every frozen tensor by its Hugging Face name, all in one dtype.
        batch: the packed documents; what they share is computed for each of them.
        adapter: its factors in the dtype of the weights.
        of_nats: another loss of the nats of the documents' supervised tokens, (supervised,).
    """
    batch = apart(batch) if batch.parents else batch  # else in its own order, in which dropout's masks are drawn
    weights = adapter.weights(weights, config.tied_head) if adapter.trained else weights
    x = reference_embedding(weights, config, batch.input_ids, adapter)
    layers = len(config.layers)
    carried = ReferenceCarried(reference_inputs(x, weights, config, batch.input_ids, adapter))
    for layer in range(layers):
        # Of the last block the loss reads the supervised positions alone.
        wanted = batch.labels != IGNORE_INDEX if layer == layers - 1 else None
        x = reference_block(x, layer, weights, config, batch.lengths, adapter, wanted, carried)
    return reference_head(x, weights, config, batch.labels, adapter, lambda nats: of_nats(batch.of_documents(nats)))


def apart(batch: PackedBatch) -> PackedBatch:
    """The same documents, each by itself."""
    paths = [batch.path(end) for end in batch.ends]
    starts = batch.starts
    places = [place for path in paths for one in path for place in range(starts[one], starts[one + 1])]
    chosen = torch.tensor(places, dtype=torch.int64, device=batch.input_ids.device)
    lengths = tuple(sum(batch.lengths[one] for one in path) for path in paths)
    return PackedBatch(batch.input_ids[chosen], batch.labels[chosen], lengths)


def reference_embedding(weights: Tensors, config: DecoderConfig, ids: Tensor, adapter: ReferenceAdapter) -> Tensor:
    """(tokens, hidden)."""
    rows = adapter.embedding(ids, weights[f"{EMBEDDING}.weight"])
    return rows * torch.tensor(config.embedding_scaling, dtype=rows.dtype, device=rows.device)


def reference_inputs(
    x: Tensor, weights: Tensors, config: DecoderConfig, ids: Tensor, adapter: ReferenceAdapter
) -> Tensor | None:
    """What each layer is given of its own, (tokens, layers, width), from the embedded tokens; None without."""
    if config.per_layer is None:
        return None
    width, layers, _ = config.per_layer
    made = adapter.linear(x, PER_LAYER_MODEL, weights) / config.hidden_size**0.5
    made = _norm(made.unflatten(-1, (layers, width)), weights[f"{PER_LAYER_MODEL_NORM}.weight"], config)
    rows = weights[f"{PER_LAYER_TABLE}.weight"][ids]
    # The root as transformers rounds it.
    root = torch.tensor(width**0.5, dtype=torch.float32, device=rows.device).to(rows.dtype)
    return (made + (rows * root).view_as(made)) / 2**0.5


def reference_head(
    x: Tensor,
    weights: Tensors,
    config: DecoderConfig,
    labels: Tensor,
    adapter: ReferenceAdapter,
    of_nats: OfNats = torch.sum,
) -> Tensor:
    """Final norm, output projection at every position and Σ cross-entropy over the supervised ones, 0-d."""
    name = f"{HEAD}.weight" if f"{HEAD}.weight" in weights else f"{EMBEDDING}.weight"
    normed = _norm(x, weights[f"{config.final_norm}.weight"], config)
    logits = adapter.head(normed, {"lm_head.weight": weights[name]}, labels, len(config.layers))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * config.logits.scaling
    if config.logits.cap is not None:
        logits = config.logits.cap * torch.tanh(logits / config.logits.cap)
    nats = functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return of_nats(nats[labels != IGNORE_INDEX])


class _Layer(NamedTuple):
    """Where a mixer's branch is taken: the layer with what it knows, and keys and values lent by others."""

    layer: int
    weights: Tensors
    config: DecoderConfig
    lengths: list[int]
    adapter: ReferenceAdapter
    wanted: Tensor | None
    lent: dict[int, tuple[Tensor, Tensor]]


def reference_block(
    x: Tensor,
    layer: int,
    weights: Tensors,
    config: DecoderConfig,
    document_lengths: Sequence[int],
    adapter: ReferenceAdapter,
    wanted: Tensor | None = None,
    carried: ReferenceCarried | None = None,
) -> Tensor:
    """One block on x (tokens, hidden), at all positions; wanted: as in `ReferenceAdapter.linear`.

    carried: needed where the block has more than the stream; keys and values of its own are put into it.
    """
    block, config = f"model.layers.{layer}", config.at(config.layers[layer])

    def normed(branch: Tensor, name: str | None) -> Tensor:
        return branch if name is None else _norm(branch, weights[f"{block}.{name}.weight"], config)

    branch = normed(x, config.norms.before_attention)
    lent = {} if carried is None else carried.lent
    at = _Layer(layer, weights, config, list(document_lengths), adapter, wanted, lent)
    branch = _MIXERS[config.layers[layer].mixer](branch, at)
    x = x + normed(branch, config.norms.after_attention) * config.residual_multiplier
    branch = normed(x, config.norms.before_mlp)
    if config.layers[layer].experts:
        branch = _experts(branch, f"{block}.mlp", weights, config, adapter)
        return x + normed(branch, config.norms.after_mlp) * config.residual_multiplier
    parts = [adapter.linear(branch, f"{block}.{part}", weights, wanted) for part in config.groups[2]]
    gate, up = torch.cat(parts, dim=-1).chunk(2, dim=-1)
    branch = adapter.linear(_activated(gate, config) * up, f"{block}.{config.groups[3][0]}", weights, wanted)
    x = x + normed(branch, config.norms.after_mlp) * config.residual_multiplier
    if config.per_layer is not None:
        (entering,), (projection,) = PER_LAYER_GROUPS
        gated = _activated(adapter.linear(x, f"{block}.{entering}", weights, wanted), config)
        gated = gated * present(present(carried).inputs)[:, layer]
        branch = adapter.linear(gated, f"{block}.{projection}", weights, wanted)
        x = x + normed(branch, PER_LAYER_NORM)
    return x * weights[f"{block}.{LAYER_SCALAR}"] if config.layer_scalar else x


def _activated(gate: Tensor, config: DecoderConfig) -> Tensor:
    return functional.silu(gate) if config.activation == "silu" else functional.gelu(gate, approximate="tanh")


def _experts(x: Tensor, name: str, weights: Tensors, config: DecoderConfig, adapter: ReferenceAdapter) -> Tensor:
    """The mixture's branch, (tokens, hidden): every expert on every token, those not chosen times zero."""
    mixture = present(config.mixture)
    router = f"{name.removesuffix('.mlp')}.{mixture.router}"
    logits = functional.linear(x, weights[f"{router}.weight"], weights.get(f"{router}.bias"))
    shares = torch.softmax(logits, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    kept = torch.zeros_like(shares).scatter(-1, shares.topk(mixture.chosen).indices, 1.0)
    shares = shares * kept if mixture.of_all else shares * kept / (shares * kept).sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in range(mixture.experts):
        own = f"{name}.experts.{expert}"
        gate_up = _gate_up(weights, own, "weight", mixture)
        both = adapter.expert(x, f"{name}.experts.gate_up_proj", expert, gate_up)
        down = weights[f"{own}.down_proj.weight"]
        if mixture.bias:
            both = both + _gate_up(weights, own, "bias", mixture)
        gate, up = both.unflatten(-1, (-1, 2)).unbind(-1) if mixture.interleaved else both.chunk(2, dim=-1)
        product = _activated(gate, config) * up if mixture.clamp is None else _clamped(gate, up, *mixture.clamp)
        output = adapter.expert(product, f"{name}.experts.down_proj", expert, down)
        if mixture.bias:
            output = output + weights[f"{own}.down_proj.bias"]
        y = y + output * shares[:, expert, None].to(x.dtype)
    return y


def _gate_up(weights: Tensors, expert: str, kind: str, mixture: Mixture) -> Tensor:
    """gate_up_proj of one expert as transformers has it: gate's rows and up's interleaved, or one below the other."""
    both = [weights[f"{expert}.{part}.{kind}"] for part in ("gate_proj", "up_proj")]
    return torch.stack(both, dim=1).flatten(0, 1) if mixture.interleaved else torch.cat(both)


def _clamped(gate: Tensor, up: Tensor, gain: float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * gain))


def _norm(x: Tensor, weight: Tensor, config: DecoderConfig) -> Tensor:
    """RMSNorm over the last axis; the gain is 1 + weight in some families."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + config.norm_eps)
    return (normed * (config.norm_offset + weight.to(wide.dtype))).to(x.dtype)


def _attention(x: Tensor, at: _Layer) -> Tensor:
    """The attention branch, (tokens, hidden), from the normed x, document by document."""
    layer, weights, config, lengths, adapter, wanted, _ = at
    name = f"model.layers.{layer}"
    if (FUSED_QKV,) in config.groups:
        fused = adapter.linear(x, f"{name}.{FUSED_QKV}", weights)
        heads = [config.num_heads, config.num_key_value_heads, config.num_key_value_heads]
        q, k, v = fused.split([count * config.head_dim for count in heads], dim=-1)
    else:
        q, k, v = (adapter.linear(x, f"{name}.{part}", weights) for part in config.groups[0])
    gate = None
    if config.attention_gate:
        q, gate = q.unflatten(-1, (config.num_heads, 2, config.head_dim)).unbind(-2)
        q = q.flatten(1)
    if config.qk_norm == "width":
        q, k = (
            _norm(x, weights[f"{name}.{norm}.weight"], config) for x, norm in zip((q, k), config.qk_norms, strict=True)
        )
    q, k, v = (x.unflatten(-1, (-1, config.head_dim)) for x in (q, k, v))
    if config.qk_norm == "head":
        q, k = (
            _norm(x, weights[f"{name}.{norm}.weight"], config) for x, norm in zip((q, k), config.qk_norms, strict=True)
        )
    which = config.layers[layer].rotary
    rotary = None if which is None else config.rotary[which]
    outputs = []
    for q_one, k_one, v_one in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_turned, k_turned = (part if rotary is None else _turn(part, rotary) for part in (q_one, k_one))
        if config.query_scaling is not None:
            q_turned = q_turned * _growth(q_turned, config.query_scaling)
        sinks = weights.get(f"{name}.{SINKS}")
        outputs.append(_attended(q_turned, k_turned, v_one, config, config.layers[layer].window, sinks))
    output = torch.cat(outputs)
    if gate is not None:
        output = output / (1 + torch.exp(-gate.flatten(1)))
    return adapter.linear(output, f"{name}.{config.groups[1][0]}", weights, wanted)


def _gated_delta(x: Tensor, at: _Layer) -> Tensor:
    """The branch of the gated delta rule, (tokens, hidden), by its recurrence, document by document."""
    layer, weights, config, lengths, adapter, wanted, _ = at
    name, sizes, runs = f"model.layers.{layer}", present(config.delta), document_runs(tuple(lengths))
    entering, (leaving,) = config.mixers[GATED_DELTA].groups
    qkv, z, b, a = (adapter.linear(x, f"{name}.{part}", weights) for part in entering)
    inside = f"{name}.linear_attn"
    qkv = causal_conv_reference(qkv, Taps(weights[f"{inside}.conv1d.weight"].squeeze(1)), runs, silu=True)
    keys, wide = sizes.key_heads * sizes.key_width, torch.promote_types(x.dtype, torch.float32)
    q, k, v = qkv.split([keys, keys, sizes.value_heads * sizes.value_width], dim=-1)
    q, k = (part.unflatten(-1, (sizes.key_heads, sizes.key_width)).to(wide) for part in (q, k))
    q, k = (part / torch.sqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    decay = decay_gate_reference(a, weights[f"{inside}.A_log"], weights[f"{inside}.dt_bias"])
    v = v.unflatten(-1, (sizes.value_heads, sizes.value_width))
    output = gated_delta_rule_reference(q / sizes.key_width**0.5, k, v, decay, torch.sigmoid(b), runs)
    normed = _norm(output, weights[f"{inside}.norm.weight"], replace(config, norm_offset=0.0))
    return adapter.linear(normed.flatten(1) * functional.silu(z), f"{name}.{leaving}", weights, wanted)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, config: DecoderConfig, window: int | None, sinks: Tensor | None = None
) -> Tensor:
    """One document's attention, (length, heads · head_dim), by an explicit softmax."""
    k_each, v_each = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k_each) * config.attention_scaling
    if config.attention_cap is not None:
        scores = config.attention_cap * torch.tanh(scores / config.attention_cap)
    scores = scores.masked_fill(~_visible(len(q), window, q.device), float("-inf"))
    if sinks is not None:  # a key more, that has no value
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", probabilities, v_each).flatten(1)


def _shared_attention(x: Tensor, at: _Layer) -> Tensor:
    """The branch of attention with normed values, (tokens, hidden), whose keys and values may be another layer's."""
    layer, weights, config, lengths, adapter, wanted, lent = at
    name, own = f"model.layers.{layer}", config.layers[layer]

    def projected(part: str) -> Tensor:
        by_head: Tensor = adapter.linear(x, f"{name}.{part}", weights).unflatten(-1, (-1, config.head_dim))
        return by_head

    def turned(part: Tensor, norm: str) -> Tensor:
        normed = _norm(part, weights[f"{name}.{norm}.weight"], config)
        if own.rotary is None:
            return normed
        return torch.cat([_turn(one, config.rotary[own.rotary]) for one in normed.split(lengths)])

    parts = config.mixers[own.mixer].groups[0]
    q = turned(projected(parts[0]), config.qk_norms[0])
    if own.keys_of is None:
        raw_k = projected(parts[1])
        raw_v = raw_k if own.mixer == KEYS_AS_VALUES else projected(parts[2])
        lent[layer] = turned(raw_k, config.qk_norms[1]), _norm(raw_v, torch.ones(config.head_dim).to(raw_v), config)
    k, v = lent[layer if own.keys_of is None else own.keys_of]
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    outputs = [_attended(*one, config, own.window) for one in documents]
    return adapter.linear(torch.cat(outputs), f"{name}.{config.groups[1][0]}", weights, wanted)


def _short_conv(x: Tensor, at: _Layer) -> Tensor:
    """The branch of the gated short convolution, (tokens, hidden), by torch's convolution, document by document."""
    layer, weights, config, lengths, adapter, wanted, _ = at
    name = f"model.layers.{layer}"
    (entering,), (leaving,) = config.mixers[SHORT_CONV].groups
    b, c, x = adapter.linear(x, f"{name}.{entering}", weights).chunk(3, dim=-1)
    taps, bias = weights[f"{name}.conv.conv.weight"], weights.get(f"{name}.conv.conv.bias")
    channels, _, width = taps.shape
    outputs = []
    for own in (b * x).split(lengths):
        padded = functional.pad(own.T[None], (width - 1, 0))
        outputs.append(functional.conv1d(padded, taps, bias, groups=channels)[0].T)
    return adapter.linear(c * torch.cat(outputs), f"{name}.{leaving}", weights, wanted)


_MIXERS: dict[str, Callable[[Tensor, _Layer], Tensor]] = {
    ATTENTION: _attention,
    SHORT_CONV: _short_conv,
    GATED_DELTA: _gated_delta,
    **dict.fromkeys((VALUE_NORMED, KEYS_AS_VALUES, SHARED_KEYS), _shared_attention),
}


def _turn(x: Tensor, rotary: RotaryConfig) -> Tensor:
    """One document's x (length, heads, head_dim), the first features turned by position · frequency and lengthened.

    Features that do not turn stay as they are; the pairs are neighbours, or lie across the halves of those that do.
    """
    frequencies = inverse_frequencies(rotary, x.shape[-1], x.device, length=x.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(x.shape[0], device=x.device, dtype=wide)
    angles = torch.outer(positions, frequencies.to(wide))
    cos, sin = (part[:, None, :].to(x.dtype) for part in (angles.cos(), angles.sin()))
    turning, still = x.split([2 * len(frequencies), x.shape[-1] - 2 * len(frequencies)], dim=-1)
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if rotary.interleaved else turning.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if rotary.interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned * rotary.attention_factor, still], dim=-1)


def _growth(q: Tensor, scaling: QueryScaling) -> Tensor:
    """(length, 1, 1): by what one document's queries are multiplied."""
    steps = torch.arange(q.shape[0], device=q.device) // scaling.length
    return (1 + scaling.beta * steps.to(torch.promote_types(q.dtype, torch.float32)).log1p()).to(q.dtype)[:, None, None]


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys (columns) a query (row) sees: itself and those before it, as many as the window allows."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < (length if window is None else window))

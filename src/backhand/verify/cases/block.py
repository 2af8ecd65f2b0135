"""One decoder block of every family: d_x0 and every adapter gradient. Mutants run the backward in a wrong context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backhand.nn.decoder.adapted_group import BlockAdapter, GroupAdapter, block_adapter
from backhand.nn.decoder.block import BlockSaved
from backhand.nn.decoder.experts import ExpertsKept
from backhand.nn.decoder.family import ATTENTION, LayerConfig
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.clamped_glu import Clamp
from backhand.ops.document_groups import Run
from backhand.ops.rotary import RotaryTable
from backhand.verify.block_case import BlockGrads, BlockInputs, block_case, block_gradients, rotated_where_alike
from backhand.verify.case import Mutant, OpProof, standard_mutants, wrong
from backhand.verify.tiny_decoders import FAMILIES

CASES = (
    *(block_case(family, family) for family in FAMILIES),
    block_case("gemma3, full attention", "gemma3", layer=1),
    block_case("olmo3, full attention", "olmo3, yarn", layer=1),
    block_case("llama, dropout, recompute mlp", "llama, biases everywhere", dropout=0.3, recompute="mlp"),
    block_case("llama, dropout, recompute block", "llama", dropout=0.3, recompute="block"),
    block_case("qwen2, dropout", "qwen2, qkv bias, tied head", dropout=0.3),
    block_case("qwen3, dropout, recompute block", "qwen3, q/k norm", dropout=0.3, recompute="block"),
    block_case("gemma3, dropout, recompute mlp", "gemma3", dropout=0.3, recompute="mlp"),
    block_case("gemma3, dropout, recompute block", "gemma3", layer=1, dropout=0.3, recompute="block"),
    block_case("q and v adapted", "llama", targets=("q_proj", "v_proj"), dropout=0.3),
    block_case("down adapted", "gemma3", targets=("down_proj",)),
    block_case("some rows wanted", "llama, biases everywhere", rows=(3, 8, 9, 16), dropout=0.3),
    block_case("some rows wanted, recompute mlp", "gemma3", rows=(0, 5, 17), recompute="mlp"),
    block_case("some rows wanted, recompute block", "qwen3, q/k norm", rows=(12,), dropout=0.3, recompute="block"),
    block_case("no row wanted", "llama", rows=(), dropout=0.3),
    block_case("granite, recompute mlp", "granite, four multipliers", recompute="mlp", dropout=0.3, rows=(2, 9, 17)),
    block_case(
        "olmo2, recompute mlp", "olmo2, norms after, q/k norm over all heads", recompute="mlp", dropout=0.3, rows=(1, 9)
    ),
    block_case("olmo2, recompute block", "olmo2, norms after, q/k norm over all heads", recompute="block"),
    block_case("exaone4, recompute block", "exaone4, norms after, a layer without rotary", layer=1, recompute="block"),
    block_case(
        "phi3, dropout, recompute mlp",
        "phi3, fused, longrope, part of the features",
        recompute="mlp",
        dropout=0.3,
        rows=(2, 11),
    ),
    block_case("qwen3.5, gated attention", "qwen3.5, delta rule and gated attention", layer=1, dropout=0.3),
    block_case(
        "qwen3.5, gated attention, some rows wanted",
        "qwen3.5, delta rule and gated attention",
        layer=1,
        rows=(2, 9, 17),
        recompute="block",
    ),
    block_case(
        "qwen3.5, delta rule, some rows wanted",
        "qwen3.5, delta rule and gated attention",
        rows=(2, 9, 17),
        dropout=0.3,
        recompute="mlp",
    ),
    block_case("qwen3.5, delta rule, recompute block", "qwen3.5, delta rule and gated attention", recompute="block"),
    block_case("lfm2, attention", "lfm2, short convolutions", layer=1, dropout=0.3),
    block_case("lfm2, some rows wanted", "lfm2, short convolutions", rows=(2, 9, 17), dropout=0.3, recompute="mlp"),
    block_case("lfm2, biases, recompute block", "lfm2, biases, attention above", recompute="block", dropout=0.3),
    block_case("lfm2, documents shorter than the taps", "lfm2, biases, attention above", documents=(2, 1, 1, 3)),
    block_case(
        "mixtral, dropout, recompute mlp", "mixtral, two of five experts", dropout=0.3, recompute="mlp", rows=(1, 4, 12)
    ),
    block_case("mixtral, recompute block", "mixtral, two of five experts", recompute="block"),
    block_case("attention adapted, experts frozen", "mixtral, two of five experts", targets=("q_proj", "o_proj")),
    block_case("experts' down adapted", "qwen3-moe, shares of all, a dense layer", targets=("down_proj",)),
    block_case("experts without rows", "qwen3-moe, shares of all, a dense layer", documents=(1,), rows=(0,)),
    block_case(
        "gpt-oss, full attention, dropout, recompute mlp",
        "gpt-oss, sinks, biased experts",
        layer=1,
        dropout=0.3,
        recompute="mlp",
    ),
    block_case(
        "gpt-oss, some rows wanted, recompute block",
        "gpt-oss, sinks, biased experts",
        rows=(0, 5, 17),
        recompute="block",
    ),
    block_case("gpt-oss, experts frozen", "gpt-oss, sinks, biased experts", targets=("q_proj", "v_proj", "o_proj")),
    block_case("gpt-oss, gate and up adapted", "gpt-oss, sinks, biased experts", targets=("gate_up_proj",)),
    block_case("experts, no token", "mixtral, two of five experts", documents=(0,)),
    block_case(
        "gemma4, full attention", "gemma4, shared keys, inputs of layers", layer=1, dropout=0.3, recompute="mlp"
    ),
    block_case("gemma4, keys of another layer", "gemma4, shared keys, inputs of layers", layer=2, dropout=0.3),
    block_case(
        "gemma4, keys of another layer, some rows wanted",
        "gemma4, shared keys, inputs of layers",
        layer=5,
        rows=(1, 4, 7, 8, 9, 12, 14, 17),
        recompute="block",
    ),
    block_case("gemma4, values made of keys, sliding", "gemma4, values made of keys", layer=1, recompute="block"),
    block_case("one token", "qwen3, q/k norm", documents=(1,)),
    block_case("one-token documents", "mistral, window", documents=(1, 1, 1)),
    block_case("no tokens", "llama", documents=(0,), dropout=0.3),
)


def _redo(d_y: Tensor, inputs: BlockInputs, **changes: Any) -> BlockGrads:
    """The right backward in a changed setting."""
    return block_gradients(d_y, inputs._replace(**changes))


def _rows_turned(inputs: BlockInputs) -> Tensor | None:
    """The wanted rows in another order."""
    rows = inputs.context.wanted
    return rows if rows is None else rows.roll(1)


def _on_all_rows(d_y: Tensor, inputs: BlockInputs) -> Tensor:
    """d_y as a gradient of the whole stream: zero in the rows not wanted."""
    rows, stream = inputs.context.wanted, inputs.saved.x0
    return d_y if rows is None else torch.zeros_like(stream).index_copy_(0, rows, d_y)


def _in_context(d_y: Tensor, inputs: BlockInputs, **changes: Any) -> BlockGrads:
    return _redo(d_y, inputs, context=inputs.context._replace(**changes))


def _of_family(d_y: Tensor, inputs: BlockInputs, **changes: Any) -> BlockGrads:
    return _in_context(d_y, inputs, config=replace(inputs.context.config, **changes))


def _unscaled(inputs: BlockInputs) -> BlockAdapter:
    """The block's adapters with scaling 1."""

    def unscaled(group: GroupAdapter) -> GroupAdapter:
        members = tuple(member._replace(scaling=1.0) for member in group.group.members)
        return group._replace(group=group.group._replace(members=members))

    entering, output, gate_up, down, norms, behind = inputs.adapter
    last = behind and (unscaled(behind[0]), unscaled(behind[1]))
    return BlockAdapter(unscaled(entering), unscaled(output), unscaled(gate_up), unscaled(down), norms, last)


def _with_seed(inputs: BlockInputs, seed: int | None) -> BlockAdapter:
    return block_adapter(inputs.lora, inputs.context.config, 0, seed)


def _next_seed(inputs: BlockInputs) -> BlockAdapter:
    return _with_seed(inputs, None if inputs.dropout_seed is None else inputs.dropout_seed + 1)


def _not_turned(inputs: BlockInputs) -> RotaryTable | None:
    table = inputs.context.rotary
    return table and table._replace(cos=torch.ones_like(table.cos), sin=torch.zeros_like(table.sin))


def _one_document(inputs: BlockInputs) -> tuple[Run, ...]:
    """All documents as one, where no attention has kept what it knew of them."""
    alone = inputs.context.layer.mixer != ATTENTION
    return ((0, 1, len(inputs.saved.x0)),) if alone else inputs.context.runs


def _taps_reversed(inputs: BlockInputs) -> BlockWeights:
    conv = inputs.weights.conv
    return inputs.weights if conv is None else replace(inputs.weights, conv=conv.flip(2))


def _in_delta(inputs: BlockInputs, **changes: Callable[[Tensor], Tensor]) -> BlockWeights:
    """The weights with others in the delta rule, where there is one: by field, what becomes of the right one."""
    right = {name: getattr(inputs.weights, name) for name in changes}
    if any(tensor is None for tensor in right.values()):
        return inputs.weights
    return replace(inputs.weights, **{name: change(right[name]) for name, change in changes.items()})


def _gates_unmoved(inputs: BlockInputs) -> BlockSaved:
    """As if attention had given nothing to the gates behind it."""
    mixing = inputs.saved.mixing
    if mixing is None or inputs.context.layer.mixer != ATTENTION or mixing.own.attended is None:
        return inputs.saved
    own = mixing.own._replace(attended=torch.zeros_like(mixing.own.attended))
    return inputs.saved._replace(mixing=mixing._replace(own=own))


def _unwindowed(inputs: BlockInputs) -> LayerConfig:
    return replace(inputs.context.layer, window=None)


def _other_activation(inputs: BlockInputs) -> str:
    return "gelu_tanh" if inputs.context.config.activation == "silu" else "silu"


def _without_gains(inputs: BlockInputs) -> BlockWeights:
    """The weights with both norms' gains replaced by ones."""
    weights, offset = inputs.weights, inputs.context.config.norm_offset
    if weights.attention_norm is None:
        return weights
    ones = torch.ones_like(weights.attention_norm) - offset
    return replace(weights, attention_norm=ones, mlp_norm=ones)


def _without_qk_gains(inputs: BlockInputs) -> BlockWeights:
    weights, offset = inputs.weights, inputs.context.config.norm_offset
    if weights.q_norm is None or weights.k_norm is None:
        return weights
    ones = torch.ones_like(weights.q_norm) - offset, torch.ones_like(weights.k_norm) - offset
    return replace(weights, q_norm=ones[0], k_norm=ones[1])


def _without_router(inputs: BlockInputs) -> BlockWeights:
    """The shares as if they did not depend on what enters."""
    router = inputs.weights.router
    return inputs.weights if router is None else replace(inputs.weights, router=torch.zeros_like(router))


def _next_expert(inputs: BlockInputs) -> BlockWeights:
    """The experts' last matrices exchanged."""
    weights, mixture = inputs.weights, inputs.context.config.mixture
    if weights.router is None or mixture is None or not isinstance(weights.down, Tensor):
        return weights
    return replace(weights, down=weights.down.roll(weights.down.shape[0] // mixture.experts, 0))


def _without_expert_biases(inputs: BlockInputs) -> BlockWeights:
    """The shares as if the experts' last layers had no bias."""
    return replace(inputs.weights, down_bias=None)


def _in_mixture(d_y: Tensor, inputs: BlockInputs, **changes: Any) -> BlockGrads:
    mixture = inputs.context.config.mixture
    return _of_family(d_y, inputs, mixture=mixture and mixture._replace(**changes))


def _less_clamped(inputs: BlockInputs) -> Clamp | None:
    mixture = inputs.context.config.mixture
    clamp = None if mixture is None else mixture.clamp
    return clamp and clamp._replace(limit=2 * clamp.limit)


def _equal_shares(inputs: BlockInputs) -> BlockSaved:
    saved = inputs.saved
    if not isinstance(saved.mlp, ExpertsKept):
        return saved
    return saved._replace(mlp=saved.mlp._replace(shares=torch.ones_like(saved.mlp.shares)))


def _rank_by_rank(gradients: tuple[Tensor, ...], inputs: BlockInputs) -> tuple[Tensor, ...]:
    """The experts' lora_A as lora_B lies: the experts take turns."""
    slots = inputs.lora.slots.values()
    return tuple(
        one.unflatten(0, (slot.experts, -1)).transpose(0, 1).flatten(0, 1) if slot.experts else one
        for slot, one in zip(slots, gradients, strict=True)
    )


def _without_norms_after(inputs: BlockInputs) -> BlockSaved:
    """As if the norms after attention and MLP were not there."""
    saved = inputs.saved
    if saved.mixing is None or saved.mlp is None:
        return saved
    return saved._replace(mixing=saved.mixing._replace(projected=None), mlp=saved.mlp._replace(projected=None))


MUTANTS = (
    *standard_mutants("d_x0", "d_lora_A", "d_lora_B", "d_k", "d_v", "d_inputs"),
    Mutant("of the other of keys and values", "d_k", lambda _g, _s, right: right.d_v),
    Mutant("of the other of keys and values", "d_v", lambda _g, _s, right: right.d_k),
    *wrong("of another layer's input", "d_inputs", lambda d: d.roll(1, 1)),
    Mutant("residual path missing", "d_x0", lambda g, s, right: right.d_x0 - _on_all_rows(g, s)),
    Mutant("residual path twice", "d_x0", lambda g, s, right: right.d_x0 + _on_all_rows(g, s)),
    Mutant("branches missing", "d_x0", lambda g, s, _right: _on_all_rows(g, s).clone()),
    Mutant("scaling forgotten", "d_x0", lambda g, s, _right: _redo(g, s, adapter=_unscaled(s)).d_x0),
    Mutant("scaling forgotten", "d_lora_A", lambda g, s, _right: _redo(g, s, adapter=_unscaled(s)).d_lora_A),
    Mutant("scaling forgotten", "d_lora_B", lambda g, s, _right: _redo(g, s, adapter=_unscaled(s)).d_lora_B),
    Mutant("mask ignored", "d_x0", lambda g, s, _right: _redo(g, s, adapter=_with_seed(s, None)).d_x0),
    Mutant("mask ignored", "d_lora_A", lambda g, s, _right: _redo(g, s, adapter=_with_seed(s, None)).d_lora_A),
    Mutant("mask of another seed", "d_lora_A", lambda g, s, _right: _redo(g, s, adapter=_next_seed(s)).d_lora_A),
    Mutant("window ignored", "d_x0", lambda g, s, _right: _in_context(g, s, layer=_unwindowed(s)).d_x0),
    Mutant("window ignored", "d_lora_A", lambda g, s, _right: _in_context(g, s, layer=_unwindowed(s)).d_lora_A),
    Mutant("convolved across documents", "d_x0", lambda g, s, _right: _in_context(g, s, runs=_one_document(s)).d_x0),
    Mutant(
        "convolved across documents",
        "d_lora_A",
        lambda g, s, _right: _in_context(g, s, runs=_one_document(s)).d_lora_A,
    ),
    Mutant("taps reversed", "d_x0", lambda g, s, _right: _redo(g, s, weights=_taps_reversed(s)).d_x0),
    Mutant("taps reversed", "d_lora_B", lambda g, s, _right: _redo(g, s, weights=_taps_reversed(s)).d_lora_B),
    Mutant(
        "rates of the next head",
        "d_lora_A",
        lambda g, s, _right: _redo(g, s, weights=_in_delta(s, log_rate=lambda rate: rate.roll(1))).d_lora_A,
    ),
    Mutant(
        "bias of the decay forgotten",
        "d_x0",
        lambda g, s, _right: _redo(g, s, weights=_in_delta(s, rate_bias=torch.zeros_like)).d_x0,
    ),
    Mutant(
        "gain of the delta rule's norm ignored",
        "d_lora_B",
        lambda g, s, _right: _redo(g, s, weights=_in_delta(s, delta_norm=torch.ones_like)).d_lora_B,
    ),
    Mutant("gates have no gradient", "d_lora_B", lambda g, s, _right: _redo(g, s, saved=_gates_unmoved(s)).d_lora_B),
    Mutant("gates have no gradient", "d_x0", lambda g, s, _right: _redo(g, s, saved=_gates_unmoved(s)).d_x0),
    Mutant("rows mixed up", "d_x0", lambda g, s, _right: _in_context(g, s, wanted=_rows_turned(s)).d_x0),
    Mutant("rows mixed up", "d_lora_A", lambda g, s, _right: _in_context(g, s, wanted=_rows_turned(s)).d_lora_A),
    Mutant("queries as keys", "d_x0", lambda g, s, _right: _in_context(g, s, query_rotary=None).d_x0),
    Mutant("queries as keys", "d_lora_B", lambda g, s, _right: _in_context(g, s, query_rotary=None).d_lora_B),
    Mutant("rotation ignored", "d_x0", lambda g, s, _right: _in_context(g, s, rotary=_not_turned(s)).d_x0),
    Mutant("rotation ignored", "d_lora_B", lambda g, s, _right: _in_context(g, s, rotary=_not_turned(s)).d_lora_B),
    Mutant("1 + weight read as weight", "d_x0", lambda g, s, _right: _of_family(g, s, norm_offset=0.0).d_x0),
    Mutant(
        "attention scaling doubled",
        "d_lora_A",
        lambda g, s, _right: _of_family(g, s, attention_scaling=2 * s.context.config.attention_scaling).d_lora_A,
    ),
    Mutant("residual multiplier ignored", "d_x0", lambda g, s, _right: _of_family(g, s, residual_multiplier=1.0).d_x0),
    Mutant(
        "residual multiplier ignored",
        "d_lora_A",
        lambda g, s, _right: _of_family(g, s, residual_multiplier=1.0).d_lora_A,
    ),
    Mutant("cap of the scores ignored", "d_x0", lambda g, s, _right: _of_family(g, s, attention_cap=None).d_x0),
    Mutant("cap of the scores ignored", "d_lora_A", lambda g, s, _right: _of_family(g, s, attention_cap=None).d_lora_A),
    Mutant("the other activation", "d_x0", lambda g, s, _right: _of_family(g, s, activation=_other_activation(s)).d_x0),
    Mutant("norm gains ignored", "d_x0", lambda g, s, _right: _redo(g, s, weights=_without_gains(s)).d_x0),
    Mutant("norm gains ignored", "d_lora_A", lambda g, s, _right: _redo(g, s, weights=_without_gains(s)).d_lora_A),
    Mutant(
        "q/k norm gains ignored", "d_lora_B", lambda g, s, _right: _redo(g, s, weights=_without_qk_gains(s)).d_lora_B
    ),
    Mutant(
        "norms after the branches ignored",
        "d_lora_B",
        lambda g, s, _right: _redo(g, s, saved=_without_norms_after(s)).d_lora_B,
    ),
    Mutant(
        "router's share of the gradient missing",
        "d_x0",
        lambda g, s, _right: _redo(g, s, weights=_without_router(s)).d_x0,
    ),
    Mutant("another expert's matrix", "d_x0", lambda g, s, _right: _redo(g, s, weights=_next_expert(s)).d_x0),
    Mutant("another expert's matrix", "d_lora_A", lambda g, s, _right: _redo(g, s, weights=_next_expert(s)).d_lora_A),
    Mutant("shares forgotten", "d_x0", lambda g, s, _right: _redo(g, s, saved=_equal_shares(s)).d_x0),
    Mutant("shares forgotten", "d_lora_B", lambda g, s, _right: _redo(g, s, saved=_equal_shares(s)).d_lora_B),
    Mutant("sinks forgotten", "d_x0", lambda g, s, _right: _redo(g, s, weights=replace(s.weights, sinks=None)).d_x0),
    Mutant(
        "sinks forgotten",
        "d_lora_A",
        lambda g, s, _right: _redo(g, s, weights=replace(s.weights, sinks=None)).d_lora_A,
    ),
    Mutant(
        "experts' biases forgotten in the shares",
        "d_x0",
        lambda g, s, _right: _redo(g, s, weights=_without_expert_biases(s)).d_x0,
    ),
    Mutant("gate and up in turns unnoticed", "d_x0", lambda g, s, _right: _in_mixture(g, s, interleaved=False).d_x0),
    Mutant(
        "gate and up in turns unnoticed",
        "d_lora_B",
        lambda g, s, _right: _in_mixture(g, s, interleaved=False).d_lora_B,
    ),
    Mutant("another bound", "d_x0", lambda g, s, _right: _in_mixture(g, s, clamp=_less_clamped(s)).d_x0),
    Mutant("another bound", "d_lora_B", lambda g, s, _right: _in_mixture(g, s, clamp=_less_clamped(s)).d_lora_B),
    Mutant("experts take turns", "d_lora_A", lambda _g, s, right: _rank_by_rank(right.d_lora_A, s)),
    Mutant("gradients of the next module", "d_lora_A", lambda _g, _s, right: rotated_where_alike(right.d_lora_A)),
    Mutant("gradients of the next module", "d_lora_B", lambda _g, _s, right: rotated_where_alike(right.d_lora_B)),
)

PROOFS = (OpProof("block", block_gradients, CASES, MUTANTS, loops=True),)

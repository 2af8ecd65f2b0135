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
from backhand.nn.decoder.family import ATTENTION, Mixture
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.document_groups import Run
from backhand.ops.rotary import RotaryTable
from backhand.verify.block_case import BlockInputs, block_case, block_gradients
from backhand.verify.case import Mutant, OpProof, again, rotated_where_alike, standard_mutants, wrong
from backhand.verify.tiny_decoders import FAMILIES

CASES = (
    *(block_case(family, family) for family in FAMILIES),
    block_case("gemma3, full attention", "gemma3", layer=1),
    block_case("olmo3, full attention", "olmo3", layer=1),
    block_case("llama, dropout, recompute mlp", "llama, biases", dropout=0.3, recompute="mlp"),
    block_case("llama, dropout, recompute block", "llama", dropout=0.3, recompute="block"),
    block_case("qwen2, dropout", "qwen2", dropout=0.3),
    block_case("qwen3, dropout, recompute block", "qwen3, q/k norm", dropout=0.3, recompute="block"),
    block_case("gemma3, dropout, recompute mlp", "gemma3", dropout=0.3, recompute="mlp"),
    block_case("gemma3, dropout, recompute block", "gemma3", layer=1, dropout=0.3, recompute="block"),
    block_case("q and v adapted", "llama", targets="q_proj v_proj", dropout=0.3),
    block_case("down adapted", "gemma3", targets="down_proj"),
    block_case("some rows wanted", "llama, biases", rows=(3, 8, 9, 16), dropout=0.3),
    block_case("some rows wanted, recompute mlp", "gemma3", rows=(0, 5, 17), recompute="mlp"),
    block_case("some rows wanted, recompute block", "qwen3, q/k norm", rows=(12,), dropout=0.3, recompute="block"),
    block_case("no row wanted", "llama", rows=(), dropout=0.3),
    block_case("granite, recompute mlp", "granite, four", recompute="mlp", dropout=0.3, rows=(2, 9, 17)),
    block_case("olmo2, recompute mlp", "olmo2", recompute="mlp", dropout=0.3, rows=(1, 9)),
    block_case("olmo2, recompute block", "olmo2", recompute="block"),
    block_case("exaone4, recompute block", "exaone4", layer=1, recompute="block"),
    block_case("phi3, dropout, recompute mlp", "phi3", recompute="mlp", dropout=0.3, rows=(2, 11)),
    block_case("qwen3.5, gated attention", "qwen3.5", layer=1, dropout=0.3),
    block_case("qwen3.5, gated attention, some rows wanted", "qwen3.5", layer=1, rows=(2, 9, 17), recompute="block"),
    block_case("qwen3.5, delta rule, some rows wanted", "qwen3.5", rows=(2, 9, 17), dropout=0.3, recompute="mlp"),
    block_case("qwen3.5, delta rule, recompute block", "qwen3.5", recompute="block"),
    block_case("lfm2, attention", "lfm2, short", layer=1, dropout=0.3),
    block_case("lfm2, some rows wanted", "lfm2, short", rows=(2, 9, 17), dropout=0.3, recompute="mlp"),
    block_case("lfm2, biases, recompute block", "lfm2, biases", recompute="block", dropout=0.3),
    block_case("lfm2, documents shorter than the taps", "lfm2, biases", documents=(2, 1, 1, 3)),
    block_case("mixtral, dropout, recompute mlp", "mixtral", dropout=0.3, recompute="mlp", rows=(1, 4, 12)),
    block_case("mixtral, recompute block", "mixtral", recompute="block"),
    block_case("attention adapted, experts frozen", "mixtral", targets="q_proj o_proj"),
    block_case("experts' down adapted", "qwen3-moe", targets="down_proj"),
    block_case("experts without rows", "qwen3-moe", documents=(1,), rows=(0,)),
    block_case("gpt-oss, full attention, dropout, recompute mlp", "gpt-oss", layer=1, dropout=0.3, recompute="mlp"),
    block_case("gpt-oss, some rows wanted, recompute block", "gpt-oss", rows=(0, 5, 17), recompute="block"),
    block_case("gpt-oss, experts frozen", "gpt-oss", targets="q_proj v_proj o_proj"),
    block_case("gpt-oss, gate and up adapted", "gpt-oss", targets="gate_up_proj"),
    block_case("experts, no token", "mixtral", documents=(0,)),
    block_case("gemma4, full attention", "gemma4, shared", layer=1, dropout=0.3, recompute="mlp"),
    block_case("gemma4, keys of another layer", "gemma4, shared", layer=2, dropout=0.3),
    block_case(
        "gemma4, keys of another layer, some rows wanted",
        "gemma4, shared",
        layer=5,
        rows=(1, 4, 7, 8, 9, 12, 14, 17),
        recompute="block",
    ),
    block_case("gemma4, values made of keys, sliding", "gemma4, values", layer=1, recompute="block"),
    block_case("one token", "qwen3, q/k norm", documents=(1,)),
    block_case("one-token documents", "mistral", documents=(1, 1, 1)),
    block_case("no tokens", "llama", documents=(0,), dropout=0.3),
)


Change = Callable[[BlockInputs], Any]


def _redo(name: str, gradients: str, **changes: Any) -> tuple[Mutant, ...]:
    """The right backward of something else."""
    return again(name, gradients, block_gradients, **changes)


def _context(name: str, gradients: str, **changes: Change) -> tuple[Mutant, ...]:
    """The right backward in another context."""
    return _redo(name, gradients, context=lambda s: s.context._replace(**{key: changes[key](s) for key in changes}))


def _family(name: str, gradients: str, **changes: Any) -> tuple[Mutant, ...]:
    """The right backward as another family's; a function makes a field of the right configuration."""

    def config(s: BlockInputs) -> Any:
        right = s.context.config
        return replace(right, **{key: made(right) if callable(made) else made for key, made in changes.items()})

    return _context(name, gradients, config=config)


def _mixture(name: str, gradients: str, change: Callable[[Mixture], Mixture]) -> tuple[Mutant, ...]:
    return _family(name, gradients, mixture=lambda config: config.mixture and change(config.mixture))


def _weights(name: str, gradients: str, **changes: Callable[[Any], Any]) -> tuple[Mutant, ...]:
    """The right backward with other weights, where all of these are there: by field, what becomes of the right one."""

    def weights(s: BlockInputs) -> BlockWeights:
        right = {field: getattr(s.weights, field) for field in changes}
        if any(part is None for part in right.values()):
            return s.weights
        return replace(s.weights, **{field: change(right[field]) for field, change in changes.items()})

    return _redo(name, gradients, weights=weights)


def _gains_of_one(name: str, gradients: str, *norms: str) -> tuple[Mutant, ...]:
    """The right backward with ones for the gains of norms, where they are there."""

    def weights(s: BlockInputs) -> BlockWeights:
        right = {norm: getattr(s.weights, norm) for norm in norms}
        if any(gain is None for gain in right.values()):
            return s.weights
        offset = s.context.config.norm_offset
        return replace(s.weights, **{norm: torch.ones_like(gain) - offset for norm, gain in right.items()})

    return _redo(name, gradients, weights=weights)


def _saved(name: str, gradients: str, change: Callable[[BlockSaved, BlockInputs], BlockSaved]) -> tuple[Mutant, ...]:
    return _redo(name, gradients, saved=lambda s: change(s.saved, s))


def _on_all_rows(g: Tensor, s: BlockInputs) -> Tensor:
    """d_y as a gradient of the whole stream: zero in the rows not wanted."""
    rows, stream = s.context.wanted, s.saved.x0
    return g if rows is None else torch.zeros_like(stream).index_copy_(0, rows, g)


def _rolled(rows: Tensor | None) -> Tensor | None:
    return rows if rows is None else rows.roll(1)


def _unscaled(s: BlockInputs) -> BlockAdapter:
    """The block's adapters with scaling 1."""

    def unscaled(group: GroupAdapter) -> GroupAdapter:
        members = tuple(member._replace(scaling=1.0) for member in group.group.members)
        return group._replace(group=group.group._replace(members=members))

    entering, output, gate_up, down, norms, behind = s.adapter
    last = behind and (unscaled(behind[0]), unscaled(behind[1]))
    return BlockAdapter(unscaled(entering), unscaled(output), unscaled(gate_up), unscaled(down), norms, last)


def _with_seed(s: BlockInputs, seed: int | None) -> BlockAdapter:
    return block_adapter(s.lora, s.context.config, 0, seed)


def _not_rotated(s: BlockInputs) -> RotaryTable | None:
    table = s.context.rotary
    return table and table._replace(cos=torch.ones_like(table.cos), sin=torch.zeros_like(table.sin))


def _one_document(s: BlockInputs) -> tuple[Run, ...]:
    """All documents as one, where no attention has kept what it knew of them."""
    alone = s.context.layer.mixer != ATTENTION
    return (Run(0, 1, len(s.saved.x0)),) if alone else s.context.runs


def _gates_unmoved(saved: BlockSaved, s: BlockInputs) -> BlockSaved:
    """As if attention had given nothing to the gates behind it."""
    mixing = saved.mixing
    if mixing is None or s.context.layer.mixer != ATTENTION or mixing.own.attended is None:
        return saved
    own = mixing.own._replace(attended=torch.zeros_like(mixing.own.attended))
    return saved._replace(mixing=mixing._replace(own=own))


def _next_expert(s: BlockInputs) -> BlockWeights:
    """The experts' last matrices exchanged."""
    weights, mixture = s.weights, s.context.config.mixture
    if weights.router is None or mixture is None or not isinstance(weights.down, Tensor):
        return weights
    return replace(weights, down=weights.down.roll(weights.down.shape[0] // mixture.experts, 0))


def _equal_shares(saved: BlockSaved, _s: BlockInputs) -> BlockSaved:
    if not isinstance(saved.mlp, ExpertsKept):
        return saved
    return saved._replace(mlp=saved.mlp._replace(shares=torch.ones_like(saved.mlp.shares)))


def _rank_by_rank(s: BlockInputs, whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The experts' lora_A as lora_B lies: the experts interleaved."""
    return tuple(
        one.unflatten(0, (slot.experts, -1)).transpose(0, 1).flatten(0, 1) if slot.experts else one
        for slot, one in zip(s.lora.slots.values(), whole, strict=True)
    )


def _without_norms_after(saved: BlockSaved, _s: BlockInputs) -> BlockSaved:
    """As if the norms after attention and MLP were not there."""
    if saved.mixing is None or saved.mlp is None:
        return saved
    return saved._replace(mixing=saved.mixing._replace(projected=None), mlp=saved.mlp._replace(projected=None))


MUTANTS = (
    wrong("of the other of keys and values", "d_k", lambda right: right.d_v),
    wrong("of the other of keys and values", "d_v", lambda right: right.d_k),
    wrong("of another layer's input", "d_inputs", lambda d: d.roll(1, 1)),
    wrong("residual path missing", "d_x0", lambda g, s, d: d - _on_all_rows(g, s)),
    wrong("residual path twice", "d_x0", lambda g, s, d: d + _on_all_rows(g, s)),
    wrong("branches missing", "d_x0", lambda g, s: _on_all_rows(g, s).clone()),
    _redo("scaling forgotten", "d_x0 d_lora_A d_lora_B", adapter=lambda s: _unscaled(s)),
    _redo("mask ignored", "d_x0 d_lora_A", adapter=lambda s: _with_seed(s, None)),
    _redo("mask of another seed", "d_lora_A", adapter=lambda s: _with_seed(s, s.dropout_seed and s.dropout_seed + 1)),
    _context("window ignored", "d_x0 d_lora_A", layer=lambda s: replace(s.context.layer, window=None)),
    _context("convolved across documents", "d_x0 d_lora_A", runs=_one_document),
    _weights("taps reversed", "d_x0 d_lora_B", conv=lambda conv: conv.flip(2)),
    _weights("rates of the next head", "d_lora_A", log_rate=lambda rate: rate.roll(1)),
    _weights("bias of the decay forgotten", "d_x0", rate_bias=torch.zeros_like),
    _weights("gain of the delta rule's norm ignored", "d_lora_B", delta_norm=torch.ones_like),
    _saved("gates have no gradient", "d_lora_B d_x0", _gates_unmoved),
    _context("rows mixed up", "d_x0 d_lora_A", wanted=lambda s: _rolled(s.context.wanted)),
    _context("queries as keys", "d_x0 d_lora_B", query_rotary=lambda _s: None),
    _context("rotation ignored", "d_x0 d_lora_B", rotary=_not_rotated),
    _family("1 + weight read as weight", "d_x0", norm_offset=0.0),
    _family("attention scaling doubled", "d_lora_A", attention_scaling=lambda config: 2 * config.attention_scaling),
    _family("residual multiplier ignored", "d_x0 d_lora_A", residual_multiplier=1.0),
    _family("cap of the scores ignored", "d_x0 d_lora_A", attention_cap=None),
    _family(
        "the other activation",
        "d_x0",
        activation=lambda config: "gelu_tanh" if config.activation == "silu" else "silu",
    ),
    _gains_of_one("norm gains ignored", "d_x0 d_lora_A", "attention_norm", "mlp_norm"),
    _gains_of_one("q/k norm gains ignored", "d_lora_B", "q_norm", "k_norm"),
    _saved("norms after the branches ignored", "d_lora_B", _without_norms_after),
    # The shares as if they did not depend on what enters.
    _weights("router's share of the gradient missing", "d_x0", router=torch.zeros_like),
    _redo("another expert's matrix", "d_x0 d_lora_A", weights=lambda s: _next_expert(s)),
    _saved("shares forgotten", "d_x0 d_lora_B", _equal_shares),
    _weights("sinks forgotten", "d_x0 d_lora_A", sinks=lambda _sinks: None),
    _weights("experts' biases forgotten in the shares", "d_x0", down_bias=lambda _bias: None),
    _mixture("interleaving of gate and up unnoticed", "d_x0 d_lora_B", lambda own: own._replace(interleaved=False)),
    _mixture(
        "another bound",
        "d_x0 d_lora_B",
        lambda own: own._replace(clamp=own.clamp and own.clamp._replace(limit=2 * own.clamp.limit)),
    ),
    wrong("experts interleaved", "d_lora_A", _rank_by_rank),
    wrong("gradients of the next module", "d_lora_A d_lora_B", lambda whole: rotated_where_alike(whole)),
)

_STANDARD = standard_mutants("d_x0", "d_lora_A", "d_lora_B", "d_k", "d_v", "d_inputs")
_ALL = (*_STANDARD, *(mutant for several in MUTANTS for mutant in several))
PROOFS = (OpProof("block", block_gradients, CASES, _ALL, loops=True),)

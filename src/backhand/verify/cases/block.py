"""One decoder block of every family: d_x0 and every adapter gradient. Mutants run the backward in a wrong context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.nn.attention_half import BlockContext
from backhand.nn.batch import document_runs
from backhand.nn.block import BlockSaved, block_backward, block_forward
from backhand.nn.block_adapter import BlockAdapter, GroupAdapter, block_adapter
from backhand.nn.decoder_weights import BlockWeights
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.nn.rotary_frequencies import inverse_frequencies
from backhand.nn.scratch import Scratch
from backhand.ops.rotary import RotaryTable, rotary_table
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants
from backhand.verify.families import FAMILIES, adapter_slots, engine_weights, random_factors, random_weights
from backhand.verify.reference_decoder import ReferenceAdapter, reference_block

DOCUMENTS = (9, 4, 4, 1)
DROPOUT_SEED = 12345


class BlockInputs(NamedTuple):
    """What the backward is given besides d_y."""

    saved: BlockSaved
    weights: BlockWeights
    adapter: BlockAdapter
    context: BlockContext
    lora: LoRAParameters
    dropout_seed: int | None


class BlockGrads(NamedTuple):
    """d_x0 (tokens, hidden); d_lora_A and d_lora_B of the block's adapted modules in the order of their slots."""

    d_x0: Tensor
    d_lora_A: tuple[Tensor, ...]
    d_lora_B: tuple[Tensor, ...]


def _backward(d_y: Tensor, inputs: BlockInputs) -> BlockGrads:
    """`block_backward` with a gradient buffer of its own."""
    inputs.lora.gradients.zero_()
    d_x0 = block_backward(d_y.clone(), inputs.saved, inputs.weights, inputs.adapter, inputs.context, inputs.lora)
    assert d_x0 is not None
    names = list(inputs.lora.slots)
    return BlockGrads(
        d_x0,
        tuple(inputs.lora.d_lora_A(name).clone() for name in names),
        tuple(inputs.lora.d_lora_B(name).clone() for name in names),
    )


def rotated_where_alike(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each module's gradient put in the place of the next one of the same shape."""
    result = list(gradients)
    for shape in {gradient.shape for gradient in gradients}:
        places = [place for place, gradient in enumerate(gradients) if gradient.shape == shape]
        for place, neighbour in zip(places, places[1:] + places[:1], strict=True):
            result[place] = gradients[neighbour]
    return tuple(result)


def lora_parameters(slots: dict[str, LoRASlot], tensors: Tensors, dtype: torch.dtype) -> LoRAParameters:
    """The factors of a case in the engine's flat buffer: float32 or wider, used in the compute dtype."""
    device = next(iter(tensors.values())).device
    lora = LoRAParameters(slots.values(), device=device, dtype=torch.promote_types(dtype, torch.float32))
    for name, view in lora.named_tensors():
        view.copy_(tensors[name])
    lora.refresh_compute(dtype)
    return lora


def _case(
    name: str,
    family: str,
    *,
    layer: int = 0,
    documents: tuple[int, ...] = DOCUMENTS,
    targets: tuple[str, ...] | None = None,
    dropout: float = 0.0,
    recompute: str = "none",
    rows: tuple[int, ...] | None = None,
) -> Case:
    draw = Draw(f"block: {name}")
    config = replace(FAMILIES[family], layers=(FAMILIES[family].layers[layer],))
    slots = adapter_slots(config, targets, dropout)
    tokens = sum(documents)
    tensors = {
        "x0": draw.normal(tokens, config.hidden_size),
        "d_y": draw.normal(tokens if rows is None else len(rows), config.hidden_size),
        **random_weights(config, draw),
        **random_factors(slots, draw),
    }
    seed = DROPOUT_SEED if dropout else None

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        lora = lora_parameters(slots, t, t["x0"].dtype)
        weights = engine_weights(config, t).blocks[0]
        adapter = block_adapter(lora, 0, seed)
        table = _rotary_table(config, documents, t["x0"])
        wanted = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=t["x0"].device)
        context = BlockContext(config, config.layers[0].window, table, document_runs(documents), Scratch(), wanted)
        y, saved = block_forward(t["x0"], weights, adapter, context, recompute)
        grads = backward(t["d_y"], BlockInputs(saved, weights, adapter, context, lora, seed))
        gradients = {"x0": grads.d_x0}
        for key, d_lora_A, d_lora_B in zip(slots, grads.d_lora_A, grads.d_lora_B, strict=True):
            gradients |= {f"{key}.lora_A": d_lora_A, f"{key}.lora_B": d_lora_B}
        return ByHand(y, gradients)

    def reference(t: Tensors) -> Tensor:
        wanted = torch.zeros(tokens, dtype=torch.bool, device=t["x0"].device)
        wanted[slice(None) if rows is None else list(rows)] = True
        return reference_block(t["x0"], 0, t, config, documents, ReferenceAdapter(slots, t, seed), wanted)[wanted]

    return Case(name, tensors, by_hand, reference, pooled=True)


def _rotary_table(config: DecoderConfig, documents: tuple[int, ...], like: Tensor) -> RotaryTable:
    """The angles of the layer's rotary configuration at every token."""
    positions = torch.cat([torch.arange(length) for length in documents]).to(like.device)
    frequencies = inverse_frequencies(config.rotary[config.layers[0].rotary], config.head_dim, like.device)
    return rotary_table(positions, frequencies.to(torch.promote_types(like.dtype, torch.float32)))


CASES = (
    *(_case(family, family) for family in FAMILIES),
    _case("gemma3, full attention", "gemma3", layer=1),
    _case("llama, dropout, recompute mlp", "llama, biases everywhere", dropout=0.3, recompute="mlp"),
    _case("llama, dropout, recompute block", "llama", dropout=0.3, recompute="block"),
    _case("qwen2, dropout", "qwen2, qkv bias, tied head", dropout=0.3),
    _case("qwen3, dropout, recompute block", "qwen3, q/k norm", dropout=0.3, recompute="block"),
    _case("gemma3, dropout, recompute mlp", "gemma3", dropout=0.3, recompute="mlp"),
    _case("gemma3, dropout, recompute block", "gemma3", layer=1, dropout=0.3, recompute="block"),
    _case("q and v adapted", "llama", targets=("q_proj", "v_proj"), dropout=0.3),
    _case("down adapted", "gemma3", targets=("down_proj",)),
    _case("some rows wanted", "llama, biases everywhere", rows=(3, 8, 9, 16), dropout=0.3),
    _case("some rows wanted, recompute mlp", "gemma3", rows=(0, 5, 17), recompute="mlp"),
    _case("some rows wanted, recompute block", "qwen3, q/k norm", rows=(12,), dropout=0.3, recompute="block"),
    _case("no row wanted", "llama", rows=(), dropout=0.3),
    _case("one token", "qwen3, q/k norm", documents=(1,)),
    _case("one-token documents", "mistral, window", documents=(1, 1, 1)),
    _case("no tokens", "llama", documents=(0,), dropout=0.3),
)


def _redo(d_y: Tensor, inputs: BlockInputs, **changes: Any) -> BlockGrads:
    """The right backward in a changed setting."""
    return _backward(d_y, inputs._replace(**changes))


def _rows_turned(inputs: BlockInputs) -> Tensor | None:
    """The wanted rows in another order."""
    rows = inputs.context.rows
    return rows if rows is None else rows.roll(1)


def _on_all_rows(d_y: Tensor, inputs: BlockInputs) -> Tensor:
    """d_y as a gradient of the whole stream: zero in the rows not wanted."""
    rows, stream = inputs.context.rows, inputs.saved.x0
    return d_y if rows is None else torch.zeros_like(stream).index_copy_(0, rows, d_y)


def _in_context(d_y: Tensor, inputs: BlockInputs, **changes: Any) -> BlockGrads:
    return _redo(d_y, inputs, context=inputs.context._replace(**changes))


def _of_family(d_y: Tensor, inputs: BlockInputs, **changes: Any) -> BlockGrads:
    return _in_context(d_y, inputs, config=replace(inputs.context.config, **changes))


def _unscaled(inputs: BlockInputs) -> BlockAdapter:
    """The block's adapters with scaling 1."""

    def unscaled(group: GroupAdapter) -> GroupAdapter:
        return group._replace(factors=tuple(member and member._replace(scaling=1.0) for member in group.factors))

    qkv, output, gate_up, down, norms = inputs.adapter
    return BlockAdapter(unscaled(qkv), unscaled(output), unscaled(gate_up), unscaled(down), norms)


def _with_seed(inputs: BlockInputs, seed: int | None) -> BlockAdapter:
    return block_adapter(inputs.lora, 0, seed)


def _next_seed(inputs: BlockInputs) -> BlockAdapter:
    return _with_seed(inputs, None if inputs.dropout_seed is None else inputs.dropout_seed + 1)


def _not_turned(inputs: BlockInputs) -> RotaryTable:
    cos, sin = inputs.context.rotary
    return RotaryTable(torch.ones_like(cos), torch.zeros_like(sin))


def _other_activation(inputs: BlockInputs) -> str:
    return "gelu_tanh" if inputs.context.config.activation == "silu" else "silu"


def _without_gains(inputs: BlockInputs) -> BlockWeights:
    """The weights with both norms' gains replaced by ones."""
    ones = torch.ones_like(inputs.weights.attention_norm) - inputs.context.config.norm_offset
    return replace(inputs.weights, attention_norm=ones, mlp_norm=ones)


def _without_qk_gains(inputs: BlockInputs) -> BlockWeights:
    weights, offset = inputs.weights, inputs.context.config.norm_offset
    if weights.q_norm is None:
        return weights
    ones = torch.ones_like(weights.q_norm) - offset
    return replace(weights, q_norm=ones, k_norm=ones)


def _without_norms_after(inputs: BlockInputs) -> BlockSaved:
    """As if the norms after attention and MLP were not there."""
    saved = inputs.saved
    if saved.attention is None or saved.mlp is None:
        return saved
    return saved._replace(attention=saved.attention._replace(projected=None), mlp=saved.mlp._replace(projected=None))


MUTANTS = (
    *standard_mutants("d_x0", "d_lora_A", "d_lora_B"),
    Mutant("residual path missing", "d_x0", lambda g, s, right: right.d_x0 - _on_all_rows(g, s)),
    Mutant("residual path twice", "d_x0", lambda g, s, right: right.d_x0 + _on_all_rows(g, s)),
    Mutant("branches missing", "d_x0", lambda g, s, _right: _on_all_rows(g, s).clone()),
    Mutant("scaling forgotten", "d_x0", lambda g, s, _right: _redo(g, s, adapter=_unscaled(s)).d_x0),
    Mutant("scaling forgotten", "d_lora_A", lambda g, s, _right: _redo(g, s, adapter=_unscaled(s)).d_lora_A),
    Mutant("scaling forgotten", "d_lora_B", lambda g, s, _right: _redo(g, s, adapter=_unscaled(s)).d_lora_B),
    Mutant("mask ignored", "d_x0", lambda g, s, _right: _redo(g, s, adapter=_with_seed(s, None)).d_x0),
    Mutant("mask ignored", "d_lora_A", lambda g, s, _right: _redo(g, s, adapter=_with_seed(s, None)).d_lora_A),
    Mutant("mask of another seed", "d_lora_A", lambda g, s, _right: _redo(g, s, adapter=_next_seed(s)).d_lora_A),
    Mutant("window ignored", "d_x0", lambda g, s, _right: _in_context(g, s, window=None).d_x0),
    Mutant("window ignored", "d_lora_A", lambda g, s, _right: _in_context(g, s, window=None).d_lora_A),
    Mutant("rows mixed up", "d_x0", lambda g, s, _right: _in_context(g, s, rows=_rows_turned(s)).d_x0),
    Mutant("rows mixed up", "d_lora_A", lambda g, s, _right: _in_context(g, s, rows=_rows_turned(s)).d_lora_A),
    Mutant("rotation ignored", "d_x0", lambda g, s, _right: _in_context(g, s, rotary=_not_turned(s)).d_x0),
    Mutant("rotation ignored", "d_lora_B", lambda g, s, _right: _in_context(g, s, rotary=_not_turned(s)).d_lora_B),
    Mutant("1 + weight read as weight", "d_x0", lambda g, s, _right: _of_family(g, s, norm_offset=0.0).d_x0),
    Mutant(
        "attention scaling doubled",
        "d_lora_A",
        lambda g, s, _right: _of_family(g, s, attention_scaling=2 * s.context.config.attention_scaling).d_lora_A,
    ),
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
    Mutant("gradients of the next module", "d_lora_A", lambda _g, _s, right: rotated_where_alike(right.d_lora_A)),
    Mutant("gradients of the next module", "d_lora_B", lambda _g, _s, right: rotated_where_alike(right.d_lora_B)),
)


PROOFS = (OpProof("block", _backward, CASES, MUTANTS),)

"""One decoder block of every family: d_x0 and every adapter gradient. Mutants run the backward in a wrong context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.adapted_group import block_adapter
from backhand.nn.decoder.block import BlockSaved, block_backward, block_forward
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.experts import ExpertsSaved
from backhand.nn.decoder.forward_backward import ForwardBackward
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.weights import BlockWeights, expert_fields
from backhand.nn.families.family import ATTENTION, NO_MULTIPLIERS, DecoderConfig, Mixture, SSMSizes
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.ops.document_groups import SegmentRun
from backhand.ops.rotary import RotaryTable
from backhand.verify.decoder_op import DROPOUT_SEED, configured, with_slots, with_weights
from backhand.verify.mutants import Backward, Mutant, rotate_equal_shapes, wrong
from backhand.verify.reference_decoder import ReferenceAdapter, ReferenceCrossLayer, ReferenceLayer, reference_block
from backhand.verify.scaffold import Arguments, Op, Tensors
from backhand.verify.tiny_decoders import (
    FAMILIES,
    adapter_slots,
    engine_weights,
    family_of,
    lora_parameters,
    random_factors,
    random_weights,
)

KV_SOURCE = 7
"""Index of the layer whose keys and values a block of the cases uses, if it uses another layer's."""


class BlockInputs(NamedTuple):
    """Arguments of the backward in addition to d_y."""

    saved: BlockSaved
    weights: BlockWeights
    context: BlockContext
    lora: LoRAParameters
    dropout_seed: int | None


class BlockGrads(NamedTuple):
    """Gradients of x0 (tokens, hidden), and of the block's adapted modules in the order of their slots."""

    d_x0: Tensor
    d_lora_A: tuple[Tensor, ...]
    d_lora_B: tuple[Tensor, ...]
    d_k: tuple[Tensor, ...] = ()  # of the keys that another layer has lent, if it has
    d_v: tuple[Tensor, ...] = ()
    d_inputs: tuple[Tensor, ...] = ()  # gradient of the per-layer embeddings, if there are any


def block_gradients(d_y: Tensor, inputs: BlockInputs) -> BlockGrads:
    """Run `block_backward` with a separate gradient buffer, without changing the saved tensors."""
    saved, weights, context, lora, dropout_seed = inputs
    lora.gradients.zero_()
    # The backward of an MLP overwrites a and u with their gradients, and a mutant runs it again.
    mlp = saved.mlp.mlp if isinstance(saved.mlp, ExpertsSaved) else saved.mlp
    if mlp is not None and mlp.gate_up is not None:
        mlp = mlp._replace(gate_up=mlp.gate_up.clone())
        saved = saved._replace(mlp=saved.mlp._replace(mlp=mlp) if isinstance(saved.mlp, ExpertsSaved) else mlp)
    cross_layer = not_none(context.cross_layer)
    cross_layer.pop_grad(KV_SOURCE)
    if cross_layer.ple is not None:
        cross_layer.d_ple = torch.zeros_like(cross_layer.ple)
    adapter = block_adapter(lora, context.config, 0, dropout_seed)
    d_x0 = not_none(block_backward(d_y.clone(), saved, weights, adapter, context))
    lent = cross_layer.grad(KV_SOURCE)
    return BlockGrads(
        d_x0,
        tuple(lora.d_lora_A(name).clone() for name in lora.slots),
        tuple(lora.d_lora_B(name).clone() for name in lora.slots),
        () if lent is None else (lent.k.to(d_x0.dtype),),
        () if lent is None else (lent.v.to(d_x0.dtype),),
        () if cross_layer.d_ple is None else (cross_layer.d_ple,),
    )


@cache
def _config(family: str, layer: int) -> DecoderConfig:
    """Return the configuration of a decoder with only this layer."""
    config = family_of(family).layers[layer]
    return replace(
        family_of(family), layers=(config if config.kv_source is None else replace(config, kv_source=KV_SOURCE),)
    )


@cache
def _slots(family: str, layer: int, targets: str | None, dropout: float) -> dict[str, LoRASlot]:
    return adapter_slots(_config(family, layer), targets, dropout)


def _lent(config: DecoderConfig) -> tuple[int | None, int | None]:
    """Return the number and width of heads of another layer's keys and values, or (None, None)."""
    sized = config.at(config.layers[0])
    return (None, None) if config.layers[0].kv_source is None else (sized.num_key_value_heads, sized.head_dim)


def _loss_positions(x0: Tensor, rows: tuple[int, ...] | None) -> Tensor | None:
    return None if rows is None else torch.tensor(rows, dtype=torch.int64, device=x0.device)


def _run(t: Arguments, backward: Backward) -> tuple[Tensor, Tensors]:
    x0, config, seed = t["x0"], t["config"], t["dropout_seed"]
    lora = lora_parameters(t["slots"], t, x0)
    decoder, adapter = ForwardBackward(config, engine_weights(config, t)), block_adapter(lora, config, 0, seed)
    weights, ids = decoder.weights.blocks[0], torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    cross_layer = CrossLayer((KV_SOURCE,), t.get("inputs"))
    if "k" in t:
        cross_layer.publish(KV_SOURCE, t["k"], t["v"])
    (context,) = decoder.contexts(PackedBatch(ids, ids, t["documents"]), t["loss_positions"], cross_layer)
    y, saved = block_forward(x0, weights, adapter, context, t["recompute"])
    grads = backward(t["d_y"], BlockInputs(saved, weights, context, lora, seed))
    gradients = {"x0": grads.d_x0} | {part: d for part in ("k", "v", "inputs") for d in getattr(grads, f"d_{part}")}
    for key, d_lora_A, d_lora_B in zip(t["slots"], grads.d_lora_A, grads.d_lora_B, strict=True):
        gradients |= {f"{key}.lora_A": d_lora_A, f"{key}.lora_B": d_lora_B}
    return y, gradients


def _reference(x0: Tensor, documents: tuple[int, ...], rows: tuple[int, ...] | None, args: Arguments) -> Tensor:
    loss_positions = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
    loss_positions[slice(None) if rows is None else list(rows)] = True
    cross_layer = ReferenceCrossLayer(args.get("inputs"), {KV_SOURCE: (args["k"], args["v"])} if "k" in args else {})
    adapter = ReferenceAdapter(args["slots"], args, args["dropout_seed"])
    layer = ReferenceLayer(0, args, args["config"], documents, adapter, loss_positions, cross_layer)
    return reference_block(x0, layer)[loss_positions]


# `family`: as in `family_of`. `targets`: endings of adapted modules' names, separated by spaces, None for all modules.
# `recompute`: as in `block_forward`. `rows`: indices of the rows with loss, None for all.
OP = Op(
    "block",
    dict(x0="tokens hidden", d_y="outputs hidden", weights=lambda draw, config: random_weights(config, draw))
    | dict(factors=lambda draw, slots: random_factors(slots, draw))
    | dict(k="tokens *lent", v="tokens *lent", inputs="tokens *of_layers"),
    dict(family=..., layer=0, documents=(9, 4, 4, 1), targets=None, dropout=0.0, recompute="none", rows=None),
    derived={
        "config": _config,
        "slots": _slots,
        "tokens": lambda documents: sum(documents),
        "outputs": lambda tokens, rows: tokens if rows is None else len(rows),
        "hidden": lambda config: config.hidden_size,
        "lent": _lent,
        "of_layers": lambda config: config.per_layer[:2][::-1] if config.per_layer else (None, None),
        "loss_positions": _loss_positions,
        "dropout_seed": lambda dropout: DROPOUT_SEED if dropout else None,
    },
    runner=_run,
    backward=block_gradients,
    reference=_reference,
    compiled=True,
    pooled=True,
)

CASES = (
    *(OP.case(family, family) for family in FAMILIES),
    OP.case("gemma3, full attention", "gemma3", layer=1),
    OP.case("olmo3, full attention", "olmo3", layer=1),
    OP.case("llama, dropout, recompute mlp", "llama, biases", dropout=0.3, recompute="mlp"),
    OP.case("llama, dropout, recompute block", "llama", dropout=0.3, recompute="block"),
    OP.case("qwen2, dropout", "qwen2", dropout=0.3),
    OP.case("qwen3, dropout, recompute block", "qwen3, q/k norm", dropout=0.3, recompute="block"),
    OP.case("gemma3, dropout, recompute mlp", "gemma3", dropout=0.3, recompute="mlp"),
    OP.case("gemma3, dropout, recompute block", "gemma3", layer=1, dropout=0.3, recompute="block"),
    OP.case("q and v adapted", "llama", targets="q_proj v_proj", dropout=0.3),
    OP.case("down adapted", "gemma3", targets="down_proj"),
    OP.case("loss at some positions", "llama, biases", rows=(3, 8, 9, 16), dropout=0.3),
    OP.case("loss at some positions, recompute mlp", "gemma3", rows=(0, 5, 17), recompute="mlp"),
    OP.case("loss at some positions, recompute block", "qwen3, q/k norm", rows=(12,), dropout=0.3, recompute="block"),
    OP.case("loss at no position", "llama", rows=(), dropout=0.3),
    OP.case("granite, recompute mlp", "granite, four", recompute="mlp", dropout=0.3, rows=(2, 9, 17)),
    OP.case("olmo2, recompute mlp", "olmo2", recompute="mlp", dropout=0.3, rows=(1, 9)),
    OP.case("olmo2, recompute block", "olmo2", recompute="block"),
    OP.case("exaone4, recompute block", "exaone4", layer=1, recompute="block"),
    OP.case("phi3, dropout, recompute mlp", "phi3", recompute="mlp", dropout=0.3, rows=(2, 11)),
    OP.case("qwen3.5, gated attention", "qwen3.5", layer=1, dropout=0.3),
    OP.case("qwen3.5, gated attention, loss at some positions", "qwen3.5", layer=1, rows=(2, 9, 17), recompute="block"),
    OP.case("qwen3.5, delta rule, loss at some positions", "qwen3.5", rows=(2, 9, 17), dropout=0.3, recompute="mlp"),
    OP.case("qwen3.5, delta rule, recompute block", "qwen3.5", recompute="block"),
    OP.case("mamba, loss at some positions", "granite 4 h", rows=(2, 9, 17), dropout=0.3, recompute="mlp"),
    OP.case("mamba of several groups, recompute block", "bamba", recompute="block"),
    OP.case("falcon-h1, loss at some positions", "falcon-h1, mamba", rows=(2, 9, 17), dropout=0.3, recompute="mlp"),
    OP.case("nemotron-h, mlp, dropout, recompute mlp", "nemotron", layer=1, dropout=0.3, recompute="mlp"),
    OP.case("nemotron-h, mlp, loss at some positions", "nemotron", layer=1, rows=(2, 9, 17)),
    OP.case("nemotron-h, attention, recompute block", "nemotron", layer=2, dropout=0.3, recompute="block"),
    OP.case("nemotron-h, up adapted", "nemotron", layer=1, targets="up_proj"),
    OP.case("lfm2, attention", "lfm2, short", layer=1, dropout=0.3),
    OP.case("lfm2, loss at some positions", "lfm2, short", rows=(2, 9, 17), dropout=0.3, recompute="mlp"),
    OP.case("lfm2, biases, recompute block", "lfm2, biases", recompute="block", dropout=0.3),
    OP.case("lfm2, documents shorter than the taps", "lfm2, biases", documents=(2, 1, 1, 3)),
    OP.case("mixtral, dropout, recompute mlp", "mixtral", dropout=0.3, recompute="mlp", rows=(1, 4, 12)),
    OP.case("mixtral, recompute block", "mixtral", recompute="block"),
    OP.case("attention adapted, experts frozen", "mixtral", targets="q_proj o_proj"),
    OP.case("experts' down adapted", "qwen3-moe", targets="down_proj"),
    OP.case("experts without rows", "qwen3-moe", documents=(1,), rows=(0,)),
    OP.case("gpt-oss, full attention, dropout, recompute mlp", "gpt-oss", layer=1, dropout=0.3, recompute="mlp"),
    OP.case("gpt-oss, loss at some positions, recompute block", "gpt-oss", rows=(0, 5, 17), recompute="block"),
    OP.case("gpt-oss, experts frozen", "gpt-oss", targets="q_proj v_proj o_proj"),
    OP.case("gpt-oss, gate and up adapted", "gpt-oss", targets="gate_up_proj"),
    OP.case("experts next to an mlp, recompute mlp", "granite 4, two", dropout=0.3, recompute="mlp", rows=(1, 4, 12)),
    OP.case("experts next to an mlp, recompute block", "granite 4, two", recompute="block", layer=1),
    OP.case("experts next to an mlp, down adapted", "granite 4, two", targets="output_linear"),
    OP.case("experts next to an mlp, attention adapted", "granite 4, two", targets="q_proj"),
    OP.case("experts, no token", "mixtral", documents=(0,)),
    OP.case("gemma4, full attention", "gemma4, shared", layer=1, dropout=0.3, recompute="mlp"),
    OP.case("gemma4, keys of another layer", "gemma4, shared", layer=2, dropout=0.3),
    OP.case(
        "gemma4, keys of another layer, loss at some positions",
        "gemma4, shared",
        layer=5,
        rows=(1, 4, 7, 8, 9, 12, 14, 17),
        recompute="block",
    ),
    OP.case("gemma4, values made of keys, sliding", "gemma4, values", layer=1, recompute="block"),
    OP.case("bert, dropout, recompute mlp", "bert", dropout=0.3, recompute="mlp", rows=(2, 9, 17)),
    OP.case("bert, recompute block", "bert", recompute="block"),
    OP.case("bert, query and output adapted", "bert", targets="query output.dense", rows=(0, 9)),
    OP.case("modernbert, a norm before attention", "modernbert, biases", layer=1, dropout=0.3, rows=(2, 9, 17)),
    OP.case("modernbert, recompute block", "modernbert, biases", layer=1, recompute="block"),
    OP.case("gemma3, both directions, full attention", "gemma3, both", layer=1, recompute="mlp"),
    OP.case("one token", "qwen3, q/k norm", documents=(1,)),
    OP.case("one-token documents", "mistral", documents=(1, 1, 1)),
    OP.case("no tokens", "llama", documents=(0,), dropout=0.3),
)


Change = Callable[[BlockInputs], Any]


def _context(name: str, gradients: str, **changes: Change) -> tuple[Mutant, ...]:
    """Run the right backward in another context."""
    return OP.perturb(
        name, gradients, context=lambda s: s.context._replace(**{key: changes[key](s) for key in changes})
    )


def _family(name: str, gradients: str, **changes: Any) -> tuple[Mutant, ...]:
    """Run the right backward with another configuration, see `configured`."""
    return _context(name, gradients, config=lambda s: configured(s.context.config, changes))


def _weights(name: str, gradients: str, **changes: Callable[[Any], Any]) -> tuple[Mutant, ...]:
    """Run the right backward with other weights, see `with_weights`."""
    return OP.perturb(name, gradients, weights=lambda s: with_weights(s.weights, changes))


def _gains_of_one(name: str, gradients: str, *norms: str) -> tuple[Mutant, ...]:
    """Run the right backward with scales of 1 in these norms, if they exist."""

    def weights(s: BlockInputs) -> BlockWeights:
        return with_weights(
            s.weights, dict.fromkeys(norms, lambda gain: torch.ones_like(gain) - s.context.config.norm_offset)
        )

    return OP.perturb(name, gradients, weights=weights)


def _saved(name: str, gradients: str, change: Callable[[BlockSaved, BlockInputs], BlockSaved]) -> tuple[Mutant, ...]:
    return OP.perturb(name, gradients, saved=lambda s: change(s.saved, s))


def _on_all_rows(g: Tensor, s: BlockInputs) -> Tensor:
    """Expand d_y to a gradient of the whole stream, zero at positions without loss."""
    rows, stream = s.context.loss_positions, s.saved.x0
    return g if rows is None else torch.zeros_like(stream).index_copy_(0, rows, g)


def _rolled(s: BlockInputs) -> Tensor | None:
    return None if s.context.loss_positions is None else s.context.loss_positions.roll(1)


def _unscaled(s: BlockInputs) -> LoRAParameters:
    return with_slots(s.lora, lambda slot: replace(slot, scaling=1.0))


def _not_rotated(s: BlockInputs) -> RotaryTable | None:
    table = s.context.rotary
    return table and table._replace(cos=torch.ones_like(table.cos), sin=torch.zeros_like(table.sin))


def _one_document(s: BlockInputs) -> tuple[SegmentRun, ...]:
    """Treat all documents as one, unless the mixer is attention, which has saved their lengths."""
    alone = s.context.layer.mixer != ATTENTION
    return (SegmentRun(0, 1, len(s.saved.x0)),) if alone else s.context.segment_runs


def _gates_unmoved(saved: BlockSaved, s: BlockInputs) -> BlockSaved:
    """Set attention's output at the gates to zero."""
    mixing = saved.mixer
    if mixing is None or s.context.layer.mixer != ATTENTION or mixing.inner.attended is None:
        return saved
    inner = mixing.inner._replace(attended=torch.zeros_like(mixing.inner.attended))
    return saved._replace(mixer=mixing._replace(inner=inner))


def _next_expert(s: BlockInputs) -> BlockWeights:
    """Exchange the experts' down matrices."""
    weights, mixture = s.weights, s.context.config.mixture
    if weights.router is None or mixture is None:
        return weights
    _, field = expert_fields(s.context.config)
    stack: Tensor = getattr(weights, field)
    return replace(weights, **{field: stack.roll(stack.shape[0] // mixture.experts, 0)})


def _without_mlp(saved: BlockSaved, _s: BlockInputs) -> BlockSaved:
    """Forget the MLP next to the experts."""
    return saved._replace(mlp=saved.mlp._replace(mlp=None)) if isinstance(saved.mlp, ExpertsSaved) else saved


def _equal_shares(saved: BlockSaved, _s: BlockInputs) -> BlockSaved:
    if not isinstance(saved.mlp, ExpertsSaved):
        return saved
    return saved._replace(mlp=saved.mlp._replace(shares=torch.ones_like(saved.mlp.shares)))


def _rank_by_rank(s: BlockInputs, whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put the experts' lora_A in the order of lora_B, with experts interleaved."""
    return tuple(
        one.unflatten(0, (slot.experts, -1)).transpose(0, 1).flatten(0, 1) if slot.experts else one
        for slot, one in zip(s.lora.slots.values(), whole, strict=True)
    )


def _without_norms_after(saved: BlockSaved, _s: BlockInputs) -> BlockSaved:
    """Remove the norms after attention and MLP."""
    if saved.mixer is None or saved.mlp is None:
        return saved
    return saved._replace(mixer=saved.mixer._replace(post_norm=None), mlp=saved.mlp._replace(post_norm=None))


def _side_by_side(config: DecoderConfig) -> Mixture | None:
    return config.mixture and config.mixture._replace(interleaved=False)


def _every_time_step(config: DecoderConfig) -> SSMSizes | None:
    return config.ssm and config.ssm._replace(time_steps=None)


def _twice_the_bound(config: DecoderConfig) -> Mixture | None:
    mixture = config.mixture
    return mixture and mixture._replace(clamp=mixture.clamp and mixture.clamp._replace(limit=2 * mixture.clamp.limit))


MUTANTS = (
    wrong("of the other of keys and values", "d_k", lambda right: right.d_v),
    wrong("of the other of keys and values", "d_v", lambda right: right.d_k),
    wrong("of another layer's input", "d_inputs", lambda d: d.roll(1, 1)),
    wrong("residual path missing", "d_x0", lambda g, s, d: d - _on_all_rows(g, s)),
    wrong("residual path twice", "d_x0", lambda g, s, d: d + _on_all_rows(g, s)),
    wrong("branches missing", "d_x0", lambda g, s: _on_all_rows(g, s).clone()),
    OP.perturb("scaling forgotten", "d_x0 d_lora_A d_lora_B", lora=_unscaled),
    OP.perturb("mask ignored", "d_x0 d_lora_A", dropout_seed=None),
    OP.perturb("mask of another seed", "d_lora_A", dropout_seed=lambda s: s.dropout_seed and s.dropout_seed + 1),
    _context("window ignored", "d_x0 d_lora_A", layer=lambda s: replace(s.context.layer, window=None)),
    _context("convolved across documents", "d_x0 d_lora_A", segment_runs=_one_document),
    _weights("taps reversed", "d_x0 d_lora_B", conv=lambda conv: conv.flip(2)),
    _weights("rates of the next head", "d_lora_A", log_rate=lambda rate: rate.roll(1)),
    _weights("bias of the decay forgotten", "d_x0", rate_bias=torch.zeros_like),
    _weights("gain of the gated norm ignored", "d_lora_B", gated_norm=torch.ones_like),
    _weights("skip of the scan forgotten", "d_x0 d_lora_A", skip=torch.zeros_like),
    _family("limits of the time step ignored", "d_x0 d_lora_B", ssm=_every_time_step),
    _saved("gates have no gradient", "d_lora_B d_x0", _gates_unmoved),
    _context("rows mixed up", "d_x0 d_lora_A", loss_positions=_rolled),
    _context("queries as keys", "d_x0 d_lora_B", query_rotary=lambda _s: None),
    _context("rotation ignored", "d_x0 d_lora_B", rotary=_not_rotated),
    _family("1 + weight read as weight", "d_x0", norm_offset=0.0),
    _family("attention scaling doubled", "d_lora_A", attention_scaling=lambda config: 2 * config.attention_scaling),
    _family("residual multiplier ignored", "d_x0 d_lora_A", residual_multiplier=1.0),
    _family("multipliers of modules ignored", "d_x0 d_lora_A d_lora_B", multipliers=NO_MULTIPLIERS),
    _family("cap of the scores ignored", "d_x0 d_lora_A", attention_cap=None),
    _family(
        "the other activation", "d_x0", activation=lambda config: "gelu_tanh" if config.activation == "silu" else "silu"
    ),
    _gains_of_one("norm gains ignored", "d_x0 d_lora_A", "attention_norm", "mlp_norm"),
    _gains_of_one("q/k norm gains ignored", "d_lora_B", "q_norm", "k_norm"),
    _gains_of_one("gains of the norms after the branches ignored", "d_x0", "after_attention_norm", "after_mlp_norm"),
    _family("norms of sums read as norms of outputs", "d_x0 d_lora_A", norms_of_sums=False),
    _family("later tokens hidden in both directions", "d_x0 d_lora_A", causal=True),
    _weights("biases of the norms before ignored", "d_lora_A", mlp_norm_bias=torch.zeros_like),
    _saved("norms after the branches ignored", "d_lora_B", _without_norms_after),
    # Shares that do not depend on the input.
    _weights("router's share of the gradient missing", "d_x0", router=torch.zeros_like),
    OP.perturb("another expert's matrix", "d_x0 d_lora_A", weights=_next_expert),
    _saved("mlp next to the experts forgotten", "d_x0 d_lora_A d_lora_B", _without_mlp),
    _saved("shares forgotten", "d_x0 d_lora_B", _equal_shares),
    _weights("sinks forgotten", "d_x0 d_lora_A", sinks=lambda _sinks: None),
    _weights("experts' biases forgotten in the shares", "d_x0", down_bias=lambda _bias: None),
    _family("interleaving of gate and up unnoticed", "d_x0 d_lora_B", mixture=_side_by_side),
    _family("another bound", "d_x0 d_lora_B", mixture=_twice_the_bound),
    wrong("experts interleaved", "d_lora_A", _rank_by_rank),
    wrong("gradients of the next module", "d_lora_A d_lora_B", rotate_equal_shapes),
)

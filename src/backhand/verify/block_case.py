"""One decoder block on the tensors of a case: forward and backward by hand, and the reference, for any family."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import present
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.adapted_group import BlockAdapter, block_adapter
from backhand.nn.decoder.block import BlockSaved, block_backward, block_forward
from backhand.nn.decoder.carried import Carried
from backhand.nn.decoder.mixer import BlockContext, MLPKept
from backhand.nn.decoder.passes import Passes
from backhand.nn.decoder.weights import BlockWeights
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot, TrainedTensor
from backhand.verify.case import Backward, ByHand, Case, Draw, Tensors
from backhand.verify.reference_adapter import ReferenceAdapter
from backhand.verify.reference_decoder import ReferenceCarried, reference_block
from backhand.verify.tiny_decoders import adapter_slots, engine_weights, family_of, random_factors, random_weights

DOCUMENTS = (9, 4, 4, 1)
DROPOUT_SEED = 12345
LENDER = 7
"""Number of the layer whose keys and values a block of the cases uses, where it uses another's."""


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
    d_k: tuple[Tensor, ...] = ()  # of the keys that another layer has lent, if it has
    d_v: tuple[Tensor, ...] = ()
    d_inputs: tuple[Tensor, ...] = ()  # of the per-layer inputs, if there are any


def block_gradients(d_y: Tensor, inputs: BlockInputs) -> BlockGrads:
    """`block_backward` with a gradient buffer of its own; what was saved stays as it was."""
    inputs.lora.gradients.zero_()
    saved = inputs.saved
    if isinstance(saved.mlp, MLPKept) and saved.mlp.gate_up is not None:
        # Their gradient takes the place of a and u; a mutant runs the backward once more and needs them as they were.
        saved = saved._replace(mlp=saved.mlp._replace(gate_up=saved.mlp.gate_up.clone()))
    carried = present(inputs.context.carried)
    carried.returned(LENDER)
    if carried.inputs is not None:
        carried.d_inputs = torch.zeros_like(carried.inputs)
    d_x0 = present(block_backward(d_y.clone(), saved, inputs.weights, inputs.adapter, inputs.context))
    names = list(inputs.lora.slots)
    lent = carried.held(LENDER)
    return BlockGrads(
        d_x0,
        tuple(inputs.lora.d_lora_A(name).clone() for name in names),
        tuple(inputs.lora.d_lora_B(name).clone() for name in names),
        () if lent is None else (lent.k.to(d_x0.dtype),),
        () if lent is None else (lent.v.to(d_x0.dtype),),
        () if carried.d_inputs is None else (carried.d_inputs,),
    )


def lora_parameters(
    slots: dict[str, LoRASlot], tensors: Tensors, dtype: torch.dtype, trained: tuple[TrainedTensor, ...] = ()
) -> LoRAParameters:
    """The factors of a case in the engine's flat buffer: float32 or wider, used in the compute dtype."""
    device, wide = next(iter(tensors.values())).device, torch.promote_types(dtype, torch.float32)
    lora = LoRAParameters(slots.values(), trained=trained, device=device, dtype=wide)
    for name, view in lora.named_tensors():
        view.copy_(tensors[name])
    lora.refresh_compute(dtype)
    return lora


def block_case(
    name: str,
    family: str,
    *,
    layer: int = 0,
    documents: tuple[int, ...] = DOCUMENTS,
    targets: str | None = None,
    dropout: float = 0.0,
    recompute: str = "none",
    rows: tuple[int, ...] | None = None,
) -> Case:
    """A block of a tiny decoder on random documents, all its tensors drawn by `name`.

    Args:
        family: as in `family_of`.
        targets: ends of the adapted modules' names, apart by blanks; None for all of them.
        dropout: in front of lora_A.
        recompute: as in `block_forward`.
        rows: numbers of the rows that somebody reads, (n,), None for all.
    """
    draw = Draw(f"block: {name}")
    config = replace(family_of(family), layers=(family_of(family).layers[layer],))
    if config.layers[0].keys_of is not None:
        config = replace(config, layers=(replace(config.layers[0], keys_of=LENDER),))
    slots = adapter_slots(config, targets, dropout)
    tokens = sum(documents)
    tensors = {
        "x0": draw.normal(tokens, config.hidden_size),
        "d_y": draw.normal(tokens if rows is None else len(rows), config.hidden_size),
        **random_weights(config, draw),
        **random_factors(slots, draw),
    }
    seed = DROPOUT_SEED if dropout else None
    if config.layers[0].keys_of is not None:
        sized = config.at(config.layers[0])
        shape = tokens, sized.num_key_value_heads, sized.head_dim
        tensors |= {"k": draw.normal(*shape), "v": draw.normal(*shape)}
    if config.per_layer is not None:
        tensors["inputs"] = draw.normal(tokens, config.per_layer.layers, config.per_layer.width)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        lora = lora_parameters(slots, t, t["x0"].dtype)
        decoder, adapter = Passes(config, engine_weights(config, t)), block_adapter(lora, config, 0, seed)
        weights, ids = decoder.weights.blocks[0], torch.zeros(tokens, dtype=torch.int64, device=t["x0"].device)
        wanted = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=t["x0"].device)
        carried = Carried((LENDER,), t.get("inputs"))
        if "k" in t:
            carried.lend(LENDER, t["k"], t["v"])
        (context,) = decoder.contexts(PackedBatch(ids, ids, documents), wanted, carried)
        y, saved = block_forward(t["x0"], weights, adapter, context, recompute)
        grads = backward(t["d_y"], BlockInputs(saved, weights, adapter, context, lora, seed))
        gradients = {"x0": grads.d_x0}
        for key, d_lora_A, d_lora_B in zip(slots, grads.d_lora_A, grads.d_lora_B, strict=True):
            gradients |= {f"{key}.lora_A": d_lora_A, f"{key}.lora_B": d_lora_B}
        for name, several in (("k", grads.d_k), ("v", grads.d_v), ("inputs", grads.d_inputs)):
            if several:
                (gradients[name],) = several
        return ByHand(y, gradients)

    def reference(t: Tensors) -> Tensor:
        wanted = torch.zeros(tokens, dtype=torch.bool, device=t["x0"].device)
        wanted[slice(None) if rows is None else list(rows)] = True
        carried = ReferenceCarried(t.get("inputs"), {LENDER: (t["k"], t["v"])} if "k" in t else {})
        adapter = ReferenceAdapter(slots, t, seed)
        return reference_block(t["x0"], 0, t, config, documents, adapter, wanted, carried)[wanted]

    return Case(name, tensors, by_hand, reference, pooled=True)

"""One training step of a tiny decoder on random documents: by hand, and the reference, for any family and adapter.

DoRA's norm is held constant in the gradient while the step takes it anew from the factors, so finite differences, which
would vary it, leave lora_A and lora_B out in those cases; `dora_linear` tries them with the norm as an input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.adapted_group import EMBEDDING
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.weights import BlockWeights, DecoderWeights, module_shapes
from backhand.nn.lora_parameters import TOKENS, LoRAParameters, LoRASlot, TrainedTensor
from backhand.verify.reference_decoder import ReferenceAdapter, reference_loss
from backhand.verify.scaffold import Backward, Draw, Given, Op, Tensors
from backhand.verify.tiny_decoders import (
    adapter_slots,
    engine_weights,
    family_of,
    lora_parameters,
    random_batch,
    random_factors,
    random_weights,
)

LOSS_SCALING = 0.043
DROPOUT_SEED = 12345
BASE = "base "
"""In front of frozen tensors' names; a tensor that is trained has the name of the base's whose place it takes."""


class DecoderInputs(NamedTuple):
    """What one training step is given."""

    decoder: Decoder
    lora: LoRAParameters
    batch: PackedBatch
    loss_scaling: float
    dropout_seed: int | None


class DecoderGrads(NamedTuple):
    """The step's loss, and the gradients of each kind of trained tensor, in the order of the buffer."""

    loss: Tensor
    d_lora_A: tuple[Tensor, ...]
    d_lora_B: tuple[Tensor, ...]
    d_lora_bias: tuple[Tensor, ...]
    d_lora_magnitude: tuple[Tensor, ...]
    d_weight: tuple[Tensor, ...]
    d_bias: tuple[Tensor, ...]
    d_trainable_tokens: tuple[Tensor, ...]


KINDS = DecoderGrads._fields[1:]


def _names(lora: LoRAParameters, kind: str) -> list[str]:
    """The trained tensors of a kind, `d_lora_A` for those called lora_A."""
    return [name for name, _ in lora.named_tensors() if f"d_{name.rpartition('.')[2]}" == kind]


def decoder_step(_d_y: Tensor, inputs: DecoderInputs) -> DecoderGrads:
    """The engine's training step; the loss's gradient is the loss scaling."""
    decoder, lora, batch, loss_scaling, dropout_seed = inputs
    decoder.attach(lora)
    lora.gradients.zero_()
    loss = decoder.loss_and_gradients(batch, loss_scaling, dropout_seed)
    return DecoderGrads(loss, *(tuple(lora.gradient(name).clone() for name in _names(lora, kind)) for kind in KINDS))


def per_token(gradients: tuple[Tensor, ...], inputs: DecoderInputs) -> tuple[Tensor, ...]:
    """The gradients of the mean in place of the sum."""
    return tuple(gradient / max(inputs.batch.supervised_tokens, 1) for gradient in gradients)


@cache
def _slots(
    family: str, targets: str | None, whole: str, use_dora: bool, lora_bias: bool, dropout: float
) -> Mapping[str, LoRASlot]:
    """Those of modules that are not trained in full."""
    config = family_of(family)
    slots = {
        name: slot if slot.experts else replace(slot, use_dora=use_dora, lora_bias=lora_bias)
        for name, slot in adapter_slots(config, targets, dropout).items()
    }
    if targets is not None and EMBEDDING.endswith(tuple(targets.split())):
        sizes = config.vocab_size, config.hidden_size
        slots[EMBEDDING] = LoRASlot(EMBEDDING, *sizes, 3, 1.3, 0.0, use_dora, embedding=True)
    return {name: slot for name, slot in slots.items() if not f"{name}.weight".endswith(tuple(whole.split()))}


@cache
def _trained(family: str, whole: str, tokens: tuple[int, ...]) -> tuple[TrainedTensor, ...]:
    """The tensors trained as they are."""
    config = family_of(family)
    shapes, ends = module_shapes(config).parameters, tuple(whole.split())
    rows = TrainedTensor(f"{EMBEDDING}.{TOKENS}", (len(tokens), config.hidden_size), tokens)
    found = tuple(TrainedTensor(name, shape) for name, shape in shapes.items() if name.endswith(ends))
    return (*found, rows) if tokens else found


def _ids(draw: Draw, config: DecoderConfig, lengths: tuple[int, ...], supervised: bool) -> Tensors:
    batch = random_batch(config, lengths, draw)
    labels = batch.labels if supervised else torch.full_like(batch.labels, IGNORE_INDEX)
    return {"ids": batch.input_ids, "labels": labels}


def _batch(ids: Tensor, labels: Tensor, lengths: tuple[int, ...], parents: tuple[int, ...], shared: int) -> PackedBatch:
    return PackedBatch(ids, labels, lengths, (-1, *(0,) * (len(lengths) - 1)) if shared else parents)


def _base(draw: Draw, config: DecoderConfig) -> Tensors:
    return {f"{BASE}{name}": weight for name, weight in random_weights(config, draw).items()}


def _values(draw: Draw, trained: tuple[TrainedTensor, ...], base: Tensors) -> Tensors:
    """Tensors that are trained as they are, moved away from the base's."""
    values: Tensors = {}
    for tensor in trained:
        start = base.get(tensor.base_name, base[f"{EMBEDDING}.weight"])
        start = start if tensor.token_ids is None else start[list(tensor.token_ids)]
        values[tensor.name] = start + draw.normal(*tensor.shape, size=0.2)
    return values


def _step(t: Given, backward: Backward) -> tuple[Tensor, Tensors]:
    weights = engine_weights(t["config"], t["base"])
    lora = lora_parameters(t["slots"], t, weights.final_norm, t["trained"])
    decoder = Decoder(t["config"], weights, recompute=t["recompute"])
    grads = backward(t["d_y"], DecoderInputs(decoder, lora, t["batch"], float(t["d_y"]), t["dropout_seed"]))
    several = ((_names(lora, kind), getattr(grads, kind)) for kind in KINDS)
    return grads.loss, {name: d for names, ds in several for name, d in zip(names, ds, strict=True)}


def _reference(given: Given, base: Tensors, config: DecoderConfig, batch: PackedBatch) -> Tensor:
    trained = {tensor.name: tensor for tensor in given["trained"]}
    return reference_loss(base, config, batch, ReferenceAdapter(given["slots"], given, given["dropout_seed"], trained))


def decoder_op(
    name: str, documents: tuple[int, ...], targets: str | None = None, gradients: tuple[str, ...] = KINDS
) -> Op:
    """A step of a tiny decoder as an op.

    Its options: `family` as in `family_of`; `documents` and `parents`, the segments as in `PackedBatch`; `shared`,
    tokens of one more segment, which all of them continue; `supervised`, False to mask every label; `recompute` and
    `dropout` as in a run. What is trained: `targets`, ends of the adapted modules' names, apart by blanks, None for all
    but the head; `whole`, ends of the names of tensors that are trained as they are, likewise; `tokens`, rows of the
    embedding that are trained; `use_dora` and `lora_bias` of every adapted module but experts.

    Args:
        documents, targets: the usual ones.
    """
    return Op(
        name,
        dict(ids=_ids, base=_base, factors=lambda draw, slots: random_factors(slots, draw), values=_values)
        | dict(d_y=lambda: torch.tensor(LOSS_SCALING, dtype=torch.float64)),
        dict(family=..., documents=documents, shared=0, parents=(), recompute="none", supervised=True, targets=targets)
        | dict(whole="", tokens=(), use_dora=False, lora_bias=False, dropout=0.0),
        made={
            "config": lambda family: family_of(family),  # noqa: PLW0108 - by this name
            "lengths": lambda documents, shared: (shared, *documents) if shared else documents,
            "batch": _batch,
            "base": lambda given: {key.removeprefix(BASE): given[key] for key in given if key.startswith(BASE)},
            "slots": _slots,
            "trained": _trained,
            "dropout_seed": lambda dropout: DROPOUT_SEED if dropout else None,
        },
        way=_step,
        backward=decoder_step,
        reference=_reference,
        pooled=True,
        gradients=gradients,
    )


def another(
    right: Decoder, kind: type[Decoder] = Decoder, weights: DecoderWeights | None = None, **own: Any
) -> Decoder:
    """A decoder of another kind, weights or configuration: of that values, or functions of the right one."""
    config = right.config
    made = {key: value(config) if callable(value) else value for key, value in own.items()}
    return kind(replace(config, **made), weights or right.weights, recompute=right.recompute)


def changed(weights: BlockWeights, changes: Mapping[str, Callable[[Any], Any]]) -> BlockWeights:
    """Weights of a block with others among them, where all of these are there: what becomes of the right ones."""
    right = {field: getattr(weights, field) for field in changes}
    if any(part is None for part in right.values()):
        return weights
    return replace(weights, **{field: change(right[field]) for field, change in changes.items()})

"""A training step of a tiny decoder as an op: by hand and by the reference, for any family and adapter.

The gradient holds DoRA's norm constant, while each step computes it from the factors. Finite differences would vary it,
so they skip lora_A and lora_B in those cases. `dora_linear` checks these gradients with the norm as an input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import BlockWeights, DecoderWeights, module_shapes
from backhand.nn.families.family import (
    DecoderConfig,
)
from backhand.nn.lora_parameters import TOKENS, LoRAParameters, LoRASlot, TrainedTensor
from backhand.ops.weight_tiles import frozen_dense
from backhand.verify.mutants import Backward
from backhand.verify.reference_decoder import ReferenceAdapter, reference_loss, state_loss, state_weights
from backhand.verify.scaffold import Arguments, Draw, Op, Tensors
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
"""Prefix of frozen tensors' names in a case. A fully trained tensor has the name of the tensor that it replaces."""


class DecoderInputs(NamedTuple):
    """Inputs of one training step."""

    decoder: Decoder
    lora: LoRAParameters
    batch: PackedBatch
    loss_scaling: float
    dropout_seed: int | None


class DecoderGrads(NamedTuple):
    """Loss of a step, and the gradients of each kind of trained tensor in the order of the buffer."""

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
    """Return the names of trained tensors of a kind, `d_lora_A` for tensors named lora_A."""
    return [name for name, _ in lora.named_tensors() if f"d_{name.rpartition('.')[2]}" == kind]


def decoder_step(_d_y: Tensor, inputs: DecoderInputs) -> DecoderGrads:
    """Run the engine's training step. The upstream gradient of the loss is the loss scaling."""
    decoder, lora, batch, loss_scaling, dropout_seed = inputs
    decoder.attach(lora)
    lora.gradients.zero_()
    if decoder.config.has_head:
        loss = decoder.loss_and_gradients(batch, loss_scaling, dropout_seed)
    else:
        # The loss of an encoder is `state_loss`, whose upstream gradient is the loss scaling.
        loss = decoder.state_loss_and_gradients(
            batch,
            lambda states: (state_loss(states).double(), loss_scaling * state_weights(states)),
            batch.supervised_positions,
            dropout_seed,
        )
    return DecoderGrads(loss, *(tuple(lora.gradient(name).clone() for name in _names(lora, kind)) for kind in KINDS))


def per_token(gradients: tuple[Tensor, ...], inputs: DecoderInputs) -> tuple[Tensor, ...]:
    """Return the gradients of the mean instead of the sum."""
    return tuple(gradient / max(inputs.batch.supervised_tokens, 1) for gradient in gradients)


@cache
def _slots(
    family: str, targets: str | None, whole: str, use_dora: bool, lora_bias: bool, dropout: float
) -> Mapping[str, LoRASlot]:
    """Return the slots of adapted modules that are not fully trained."""
    config = family_of(family)
    slots = {
        name: slot if slot.experts else replace(slot, use_dora=use_dora, lora_bias=lora_bias)
        for name, slot in adapter_slots(config, targets, dropout).items()
    }
    if targets is not None and config.embedding.endswith(tuple(targets.split())):
        sizes = config.vocab_size, config.hidden_size
        slots[config.embedding] = LoRASlot(config.embedding, *sizes, 3, 1.3, 0.0, use_dora, embedding=True)
    return {name: slot for name, slot in slots.items() if not f"{name}.weight".endswith(tuple(whole.split()))}


@cache
def _trained(family: str, whole: str, tokens: tuple[int, ...]) -> tuple[TrainedTensor, ...]:
    """Return the fully trained tensors."""
    config = family_of(family)
    shapes, ends = module_shapes(config).parameters, tuple(whole.split())
    rows = TrainedTensor(f"{config.embedding}.{TOKENS}", (len(tokens), config.hidden_size), tokens)
    tensors = tuple(TrainedTensor(name, shape) for name, shape in shapes.items() if name.endswith(ends))
    return (*tensors, rows) if tokens else tensors


def _ids(draw: Draw, config: DecoderConfig, lengths: tuple[int, ...], supervised: bool) -> Tensors:
    batch = random_batch(config, lengths, draw)
    labels = batch.labels if supervised else torch.full_like(batch.labels, IGNORE_INDEX)
    return {"ids": batch.input_ids, "labels": labels}


def _batch(ids: Tensor, labels: Tensor, lengths: tuple[int, ...], parents: tuple[int, ...], shared: int) -> PackedBatch:
    return PackedBatch(ids, labels, lengths, (-1, *(0,) * (len(lengths) - 1)) if shared else parents)


def _values(draw: Draw, trained: tuple[TrainedTensor, ...], base: Tensors, config: DecoderConfig) -> Tensors:
    """Return values of fully trained tensors that differ from the base's."""
    values: Tensors = {}
    for tensor in trained:
        start = base.get(tensor.base_name, base[f"{config.embedding}.weight"])
        start = start if tensor.token_ids is None else start[list(tensor.token_ids)]
        values[tensor.name] = start + draw.normal(*tensor.shape, size=0.2)
    return values


def _step(t: Arguments, backward: Backward) -> tuple[Tensor, Tensors]:
    weights = engine_weights(t["config"], t["base"])
    lora = lora_parameters(t["slots"], t, frozen_dense(weights.embedding), t["trained"])
    decoder = Decoder(t["config"], weights, recompute=t["recompute"])
    grads = backward(t["d_y"], DecoderInputs(decoder, lora, t["batch"], float(t["d_y"]), t["dropout_seed"]))
    by_kind, loss = ((_names(lora, kind), getattr(grads, kind)) for kind in KINDS), grads.loss
    if decoder.lora is None:  # only the forward is needed, and the backward was not run
        decoder.attach(lora)
        batch, seed = t["batch"], t["dropout_seed"]
        if decoder.config.has_head:
            loss = decoder.token_losses(batch, seed).sum(dtype=torch.float64)
        else:
            loss = state_loss(decoder.final_states(batch, batch.supervised_positions, seed)).double()
    return loss, {name: d for names, ds in by_kind for name, d in zip(names, ds, strict=True)}


def _reference(args: Arguments, base: Tensors, config: DecoderConfig, batch: PackedBatch) -> Tensor:
    trained = {tensor.name: tensor for tensor in args["trained"]}
    return reference_loss(base, config, batch, ReferenceAdapter(args["slots"], args, args["dropout_seed"], trained))


def decoder_op(
    name: str, documents: tuple[int, ...], targets: str | None = None, gradients: tuple[str, ...] = KINDS
) -> Op:
    """Declare a training step of a tiny decoder as an op.

    Options of the batch and the run:

    - `family`: as in `family_of`.
    - `documents`, `parents`: lengths and parents of the segments, as in `PackedBatch`.
    - `shared`: number of tokens of one more segment that all others continue.
    - `supervised`: False to mask every label.
    - `recompute`, `dropout`: as in a run.

    Options of training:

    - `targets`: endings of the adapted modules' names, separated by spaces, None for all but the head.
    - `whole`: endings of the names of fully trained tensors, separated by spaces.
    - `tokens`: trained rows of the embedding.
    - `use_dora`, `lora_bias`: of every adapted module except experts.

    Args:
        documents: default of the option.
        targets: default of the option.
    """
    return Op(
        name,
        dict(ids=_ids, base=lambda draw, config: {f"{BASE}{n}": w for n, w in random_weights(config, draw).items()})
        | dict(factors=lambda draw, slots: random_factors(slots, draw), values=_values)
        | dict(d_y=lambda: torch.tensor(LOSS_SCALING, dtype=torch.float64)),
        dict(family=..., targets=targets, whole="", tokens=(), use_dora=False, lora_bias=False, dropout=0.0)
        | dict(documents=documents, shared=0, parents=(), recompute="none", supervised=True),
        derived={
            "config": lambda family: family_of(family),  # noqa: PLW0108 - the parameter name matters
            "lengths": lambda documents, shared: (shared, *documents) if shared else documents,
            "batch": _batch,
            "base": lambda args: {key.removeprefix(BASE): args[key] for key in args if key.startswith(BASE)},
            "slots": _slots,
            "trained": _trained,
            "dropout_seed": lambda dropout: DROPOUT_SEED if dropout else None,
        },
        runner=_step,
        backward=decoder_step,
        reference=_reference,
        pooled=True,
        gradients=gradients,
    )


def configured(right: DecoderConfig, changes: Mapping[str, Any]) -> DecoderConfig:
    """Return a configuration with changed fields. A value may be a function of the right configuration."""
    return replace(right, **{key: value(right) if callable(value) else value for key, value in changes.items()})


def rebuilt(
    right: Decoder, kind: type[Decoder] = Decoder, weights: DecoderWeights | None = None, **overrides: Any
) -> Decoder:
    """Return a decoder of another class, with other weights, or with a changed configuration, see `configured`."""
    return kind(configured(right.config, overrides), weights or right.weights, recompute=right.recompute)


def with_slots(lora: LoRAParameters, change: Callable[[LoRASlot], LoRASlot]) -> LoRAParameters:
    """Return the same factors with changed slots."""
    changed = LoRAParameters(map(change, lora.slots.values()), device=lora.values.device, dtype=lora.values.dtype)
    changed.values.copy_(lora.values)
    changed.refresh_compute(lora.compute_values.dtype)
    return changed


def with_weights(weights: BlockWeights, changes: Mapping[str, Callable[[Any], Any]]) -> BlockWeights:
    """Return a block's weights with changed fields, or unchanged if one of the fields is None.

    Args:
        changes: field → function of the right weight.
    """
    right = {field: getattr(weights, field) for field in changes}
    if any(part is None for part in right.values()):
        return weights
    return replace(weights, **{field: change(right[field]) for field, change in changes.items()})

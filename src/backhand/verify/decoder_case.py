"""One training step of a tiny decoder on random documents: by hand, and the reference, for any family and adapter.

DoRA's norm is held constant in the gradient while the step takes it anew from the factors, so finite differences, which
would vary it, leave lora_A and lora_B out in those cases; `dora_linear` tries them with the norm as an input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.adapted_group import EMBEDDING
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.lora_parameters import TOKENS, LoRAParameters, LoRASlot, TrainedTensor
from backhand.verify.block_case import DROPOUT_SEED, lora_parameters
from backhand.verify.case import Backward, ByHand, Case, Draw, Tensors
from backhand.verify.reference_adapter import ReferenceAdapter
from backhand.verify.reference_decoder import reference_loss
from backhand.verify.tiny_decoders import (
    adapter_slots,
    engine_weights,
    family_of,
    random_batch,
    random_factors,
    random_weights,
)

DOCUMENTS = (9, 5, 5, 1, 11)
LOSS_SCALING = 0.043


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
    lora.gradients.zero_()
    loss = decoder.loss_and_gradients(batch, loss_scaling, dropout_seed)
    return DecoderGrads(loss, *(tuple(lora.gradient(name).clone() for name in _names(lora, kind)) for kind in KINDS))


def step_of(inputs: DecoderInputs, decoder: Decoder, **changes: Any) -> DecoderGrads:
    """The step of another decoder, or of the same with other parameters."""
    decoder.attach(changes.get("lora", inputs.lora))
    grads = decoder_step(torch.empty(0), inputs._replace(decoder=decoder, **changes))
    inputs.decoder.attach(inputs.lora)
    return grads


def per_token(gradients: tuple[Tensor, ...], inputs: DecoderInputs) -> tuple[Tensor, ...]:
    """The gradients of the mean in place of the sum."""
    return tuple(gradient / max(inputs.batch.supervised_tokens, 1) for gradient in gradients)


@dataclass(frozen=True)
class Trained:
    """What a step trains."""

    targets: str | None = None  # ends of the adapted modules' names, apart by blanks; None for all but the head
    whole: str = ""  # ends of the names of tensors that are trained as they are, likewise
    tokens: tuple[int, ...] = ()  # rows of the embedding that are trained
    # use_dora, lora_bias: of every adapted module but experts
    use_dora: bool = False
    lora_bias: bool = False
    dropout: float = 0.0  # as in a run

    def slots(self, config: DecoderConfig) -> dict[str, LoRASlot]:
        """Those of modules that are not trained in full."""
        slots = {
            name: slot if slot.experts else replace(slot, use_dora=self.use_dora, lora_bias=self.lora_bias)
            for name, slot in adapter_slots(config, self.targets, self.dropout).items()
        }
        if self.targets is not None and EMBEDDING.endswith(tuple(self.targets.split())):
            vocab, hidden = config.vocab_size, config.hidden_size
            slots[EMBEDDING] = LoRASlot(EMBEDDING, vocab, hidden, 3, 1.3, 0.0, self.use_dora, embedding=True)
        return {name: slot for name, slot in slots.items() if not f"{name}.weight".endswith(tuple(self.whole.split()))}

    def tensors(self, config: DecoderConfig) -> tuple[TrainedTensor, ...]:
        """Those trained as they are."""
        parameters = module_shapes(config).parameters
        whole = [
            TrainedTensor(name, shape) for name, shape in parameters.items() if name.endswith(tuple(self.whole.split()))
        ]
        rows = TrainedTensor(f"{EMBEDDING}.{TOKENS}", (len(self.tokens), config.hidden_size), self.tokens)
        return (*whole, rows) if self.tokens else tuple(whole)


def _random_values(trained: tuple[TrainedTensor, ...], weights: Tensors, draw: Draw) -> Tensors:
    """Tensors that are trained as they are, moved away from the base's."""
    values: Tensors = {}
    for tensor in trained:
        base = weights.get(tensor.base_name, weights[f"{EMBEDDING}.weight"])
        start = base if tensor.token_ids is None else base[list(tensor.token_ids)]
        values[tensor.name] = start + draw.normal(*tensor.shape, size=0.2)
    return values


def decoder_case(
    seed: str,
    name: str,
    family: str,
    *,
    documents: tuple[int, ...] = DOCUMENTS,
    shared: int = 0,
    parents: tuple[int, ...] = (),
    recompute: str = "none",
    supervised: bool = True,
    **of: Any,
) -> Case:
    """A step of a tiny decoder, all its tensors drawn by `seed` and `name`.

    Args:
        family: as in `family_of`.
        documents, parents: the segments, as in `PackedBatch`.
        shared: tokens of one more segment, which all of them continue.
        recompute: as in a run.
        supervised: False masks every label.
        of: fields of `Trained`.
    """
    draw = Draw(f"{seed}: {name}")
    config, what = family_of(family), Trained(**of)
    trained, slots = what.tensors(config), what.slots(config)
    if shared:
        documents, parents = (shared, *documents), (-1, *(0,) * len(documents))
    batch = random_batch(config, documents, draw, parents)
    if not supervised:
        batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))
    weights = random_weights(config, draw)
    # A trained tensor takes the place of the base's in the decoder, so they are told apart by a prefix.
    tensors = {
        **{f"base {key}": value for key, value in weights.items()},
        **random_factors(slots, draw),
        **_random_values(trained, weights, draw),
        "d_y": torch.tensor(LOSS_SCALING, dtype=torch.float64),
    }
    dropout_seed = DROPOUT_SEED if what.dropout else None

    def base(t: Tensors) -> Tensors:
        return {key.removeprefix("base "): value for key, value in t.items() if key.startswith("base ")}

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        table = t[f"base {EMBEDDING}.weight"]
        decoder = Decoder(config, engine_weights(config, base(t)), recompute=recompute)
        lora = lora_parameters(slots, t, table.dtype, trained)
        decoder.attach(lora)
        grads = backward(t["d_y"], DecoderInputs(decoder, lora, batch.to(table.device), float(t["d_y"]), dropout_seed))
        gradients: Tensors = {}
        for kind in KINDS:
            gradients |= dict(zip(_names(lora, kind), getattr(grads, kind), strict=True))
        return ByHand(grads.loss, gradients)

    def reference(t: Tensors) -> Tensor:
        factors = {key: value for key, value in t.items() if not key.startswith("base ")}
        adapter = ReferenceAdapter(slots, factors, dropout_seed, {tensor.name: tensor for tensor in trained})
        return reference_loss(base(t), config, batch.to(t[f"base {EMBEDDING}.weight"].device), adapter)

    constant_norm = tuple(f"{key}.{part}" for key in slots for part in ("lora_A", "lora_B")) if what.use_dora else ()
    return Case(name, tensors, by_hand, reference, pooled=True, exempt=constant_norm)

"""The engine's training step in float64, by hand, with only one block's weights in float64 at a time.

A model of any size is differentiated so, block after block, with the engine's own blocks: forward keeps each block's
input x₀; at the head the loss gives ∂L/∂x; from the top block down ∂L/∂x₂ becomes ∂L/∂x₀ and the block's adapter
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.errors import present
from backhand.nn.batch import PackedBatch, TokenLoss
from backhand.nn.decoder.adapted_group import HEAD, block_adapter
from backhand.nn.decoder.block import block_backward, block_forward
from backhand.nn.decoder.carried import Carried
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.per_layer_input import BeginKept, inputs_backward, inputs_forward
from backhand.nn.decoder.weights import BlockWeights, DecoderWeights, PerLayerWeights, dense_views
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.dpo import DPORule, dpo_reference
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from backhand.ops.rms_norm import rms_norm_backward, rms_norm_forward
from backhand.ops.weight_tiles import FrozenMatrix, frozen_dense
from backhand.training.objectives.compared import PairObjective
from backhand.training.objectives.objective import token_owners
from backhand.training.objectives.options import ObjectiveOptions
from backhand.verify.case import Tensors


@dataclass(eq=False)
class BlockwiseStep:
    """One training step of a decoder with its attached adapter, in float64.

    Attributes:
        lora: the adapter's values as the decoder computes with them, and their gradients.
        carried: what the last pass carried beside the stream.
    """

    decoder: Decoder  # with an adapter of nothing but factors
    batch: PackedBatch  # the packed documents, on the decoder's device
    dropout_seed: int | None  # draws the masks; None for no dropout
    loss_scaling: float
    pair_loss: PairLoss | None = None  # the loss where documents are pairs; None for Σ nats

    def __post_init__(self) -> None:
        decoder = self.decoder
        if decoder.lora is None:
            raise ValueError("there is no adapter to prove: attach one first")
        self.carried = Carried()
        self._begun: BeginKept | None = None
        self.lora = LoRAParameters(decoder.lora.slots.values(), device=decoder.device, dtype=torch.float64)
        for name in self.lora.slots:
            self.lora.lora_A(name).copy_(decoder.lora.compute_A(name))
            self.lora.lora_B(name).copy_(decoder.lora.compute_B(name))

    @property
    def layers(self) -> range:
        """The numbers of the blocks."""
        return range(len(self.decoder.config.layers))

    def gradient(self) -> Tensor:
        """The whole gradient in the order of the flat buffer."""
        self.lora.gradients.zero_()
        inputs = self.forward(self.dropout_seed, self.batch.supervised_positions)
        d_x, _ = self.head(inputs.pop())
        for layer in reversed(self.layers):
            d_x = self.block(layer, inputs.pop(), d_x)
        self.begin()
        return self.lora.gradients

    @torch.no_grad()
    def begin(self) -> None:
        """What is adapted before the first block gets its gradients."""
        weights, d_inputs = self._per_layer_weights(), self.carried.d_inputs
        if weights is None or d_inputs is None or self._begun is None:
            return
        config = self.decoder.config
        inputs_backward(d_inputs, self._begun, weights, config, self.lora, self.dropout_seed, input_gradient=False)

    def _per_layer_weights(self) -> PerLayerWeights | None:
        """The same in float64 but for the table, of which only rows are read."""
        there = self.decoder.weights.per_layer
        return there and there._replace(projection=float64_dense(there.projection), norm=float64_dense(there.norm))

    def _carry(self, h: Tensor, dropout_seed: int | None) -> None:
        """Begin a pass from the embedded tokens: nothing is lent yet, and no gradient has come back."""
        weights, config = self._per_layer_weights(), self.decoder.config
        self.carried = Carried(config.lenders)
        if weights is None:
            return
        inputs, self._begun = inputs_forward(h, self.batch.input_ids, weights, config, self.lora, dropout_seed)
        self.carried = Carried(config.lenders, inputs)
        self.carried.d_inputs = torch.zeros_like(inputs)

    @torch.no_grad()
    def forward(self, dropout_seed: int | None, rows: Tensor | None = None) -> list[Tensor]:
        """x₀ of every block and the last block's output, or these rows of it."""
        # Whatever embedding does in the compute dtype is part of the function.
        inputs = [self.decoder.embed(self.batch.input_ids).double()]
        self._carry(inputs[0], dropout_seed)
        for layer in self.layers:
            adapter = block_adapter(self.lora, self.decoder.config, layer, dropout_seed)
            context = self.context(layer, rows)
            x, _ = block_forward(inputs[-1], self.block_weights(layer), adapter, context, "block")
            inputs.append(x)
        return inputs

    @torch.no_grad()
    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """∂L/∂x of the last block's output x, both at the supervised positions, and the loss."""
        config, weights = self.decoder.config, self.decoder.weights
        labels = self.batch.labels[self.batch.supervised_positions]
        factors = self.decoder.head_factors(self.dropout_seed)
        if factors is not None:
            factors = factors._replace(lora_A=self.lora.lora_A(HEAD), lora_B=self.lora.lora_B(HEAD))
        normed, norm = rms_norm_forward(x, weights.final_norm.double(), config.norm_eps, config.norm_offset)
        head, loss = float64_dense(weights.head), None
        times = self.batch.weights
        multiplier: float | Tensor = self.loss_scaling if times is None else self.loss_scaling * times
        if self.pair_loss is not None:
            nats = linear_cross_entropy_forward(normed, head, labels, factors, config.logits)
            loss, d_log_p = self.pair_loss.token_loss(-self.batch.of_documents(nats))
            multiplier = -self.loss_scaling * self.batch.at_positions(d_log_p)
        losses, grads = linear_cross_entropy_backward(normed, head, labels, factors, multiplier, config.logits)
        if grads.d_lora_A is not None and grads.d_lora_B is not None:
            self.lora.d_lora_A(HEAD).copy_(grads.d_lora_A)
            self.lora.d_lora_B(HEAD).copy_(grads.d_lora_B)
        loss = self.batch.of_documents(losses).sum() if loss is None else loss
        return rms_norm_backward(grads.d_x, norm, weight_gradient=False).d_x, loss

    @torch.no_grad()
    def block(self, layer: int, x0: Tensor, d_x2: Tensor) -> Tensor:
        """∂L/∂x₀ of the block; its adapter gradients are added to the buffer."""
        weights, context = self.block_weights(layer), self.context(layer, self.batch.supervised_positions)
        adapter = block_adapter(self.lora, self.decoder.config, layer, self.dropout_seed)
        _, saved = block_forward(x0, weights, adapter, context, "none")
        return present(block_backward(d_x2.clone(), saved, weights, adapter, context))

    def block_weights(self, layer: int) -> BlockWeights:
        """A copy of the block's weights in float64."""
        block = self.decoder.weights.blocks[layer]
        parts = {part.name: getattr(block, part.name) for part in fields(BlockWeights)}
        return replace(block, **{name: float64_dense(part) for name, part in parts.items() if part is not None})

    def named_weights(self, layer: int, block: BlockWeights) -> Tensors:
        """One block's tensors by their Hugging Face names."""
        config, weights = self.decoder.config, self.decoder.weights
        alone = replace(config, layers=(config.layers[layer],))
        views = dense_views(DecoderWeights(weights.embedding, [block], weights.final_norm, weights.head), alone)
        first = "model.layers.0."
        return {
            f"model.layers.{layer}.{name.removeprefix(first)}": view for name, view in views if name.startswith(first)
        }

    def context(self, layer: int, rows: Tensor | None = None) -> BlockContext:
        """The block's, of whose last one only these rows are wanted, None for all."""
        return self.decoder.contexts(self.batch, rows, self.carried, torch.float64)[layer]


def float64_dense(weight: FrozenMatrix) -> Tensor:
    """A copy in float64: of the numbers that the compute dtype has."""
    return frozen_dense(weight).to(torch.float64, copy=True)


_BETA = 0.1


@dataclass(frozen=True)
class PairLoss:
    """Σ of the losses of pairs, on both sides of the proof."""

    token_loss: TokenLoss  # by hand, see `Decoder.loss_and_gradients`
    owners: Tensor  # whose document's each supervised token is, (supervised,)
    reference: Tensor  # what the sums of log-probabilities are measured against, (documents,)

    def formula(self, nats: Tensor) -> Tensor:
        """The same loss of the tokens' nats, (supervised,), 0-d."""
        sums = nats.new_zeros(len(self.reference)).index_add(0, self.owners.to(nats.device), -nats)
        chosen, rejected = (sums - self.reference.to(sums)).view(-1, 2).unbind(1)
        return dpo_reference(chosen, rejected, DPORule(beta=_BETA)).sum()


def pair_loss(pairs: Sequence[Example]) -> PairLoss:
    """The loss of these pairs, packed together, against a reference that says something else of each side."""
    packer, rows = RowPacker(pairs, share_prefixes=False), range(len(pairs))
    of_tokens, counts = token_owners(packer, rows)
    reference = -counts - torch.arange(2 * len(pairs), dtype=torch.float64) / 3
    objective = PairObjective(packer, reference, options=ObjectiveOptions("dpo", _BETA))
    return PairLoss(objective.token_loss(0, rows), of_tokens, reference)

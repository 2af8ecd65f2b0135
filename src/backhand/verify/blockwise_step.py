"""One training step in float64 by hand, block by block, as the reference for a model's gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from backhand.data.decisions import DecisionRow
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.data.rows import RankedTexts
from backhand.errors import not_none
from backhand.loop.ranking_loss import scores_of
from backhand.loop.row_passes import token_owners
from backhand.nn.batch import PackedBatch, TokenLoss
from backhand.nn.decoder.adapted_group import HEAD, block_adapter
from backhand.nn.decoder.block import block_backward, block_forward
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.ple_inputs import PLEInputsSaved, ple_inputs_backward, ple_inputs_forward
from backhand.nn.decoder.pooled_states import read_positions
from backhand.nn.decoder.projections import norm_backward, norm_forward
from backhand.nn.decoder.weights import BlockWeights, PerLayerWeights, named_views
from backhand.nn.lora_parameters import LoRAParameters
from backhand.objectives.decisions.loss import DecideObjective
from backhand.objectives.pairs.loss import PairObjective
from backhand.objectives.rankings.loss import RankObjective
from backhand.ops.binary_cross_entropy import binary_cross_entropy_reference
from backhand.ops.decide import decide_reference
from backhand.ops.layer_norm import NormSaved
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from backhand.ops.preference import PreferenceRule, preference_reference
from backhand.ops.rms_norm import rms_norm_backward, rms_norm_forward
from backhand.ops.weight_tiles import FrozenMatrix, frozen_dense
from backhand.options.objectives import ObjectiveOptions
from backhand.verify.head_loss import HeadLoss
from backhand.verify.scaffold import Tensors

_BETA = 0.1


@dataclass(frozen=True)
class RowLoss:
    """The sum of the losses of pairs, decisions or rankings, by hand and as a formula for autograd."""

    name: str  # in statements
    token_loss: TokenLoss  # by hand, see `Decoder.loss_and_gradients`
    owners: Tensor  # (supervised,) the document of each supervised token
    documents: int  # number of documents
    of_sums: Callable[[Tensor], Tensor]  # the loss, 0-d, from the log-probability of every document, (documents,)

    def formula(self, nats: Tensor) -> Tensor:
        """Return the loss, 0-d, from the nats of the supervised tokens, (supervised,)."""
        return self.of_sums(nats.new_zeros(self.documents).index_add(0, self.owners.to(nats.device), -nats))


def row_loss(rows: Sequence[Example], options: ObjectiveOptions | None = None) -> RowLoss:
    """Return the loss of these pairs, or of these rows of decisions or rankings, packed together.

    Every document of the pairs has a different reference value.

    Args:
        options: the loss of rankings; None for the usual one.
    """
    packer, numbers = RowPacker(rows, share_prefixes=False), range(len(rows))
    owners, counts = token_owners(packer, numbers)
    if isinstance(rows[0].facts, DecisionRow):
        decide = DecideObjective(packer)
        of_sums = partial(_decision_loss, decide.decisions(numbers))
        return RowLoss("loss of decisions", decide.token_loss(0, numbers), owners, len(counts), of_sums)
    if isinstance(rows[0].facts, RankedTexts):
        rank = RankObjective(packer, options=options or ObjectiveOptions("rank"))
        formula = partial(_ranking_loss, rank.loss.texts(numbers), rank.options)
        return RowLoss("loss of rankings", rank.token_loss(0, numbers), owners, len(counts), formula)
    reference = -counts - torch.arange(2 * len(rows), dtype=torch.float64) / 3
    objective = PairObjective(packer, reference, options=ObjectiveOptions("dpo", _BETA))

    def of_pairs(sums: Tensor) -> Tensor:
        chosen, rejected = (sums - reference.to(sums)).view(-1, 2).unbind(1)
        return preference_reference(chosen, rejected, PreferenceRule(beta=_BETA)).sum()

    return RowLoss("loss of pairs (DPO)", objective.token_loss(0, numbers), owners, len(counts), of_pairs)


def _decision_loss(decisions: Sequence[DecisionRow], sums: Tensor) -> Tensor:
    losses, start = [], 0
    for row in decisions:
        of_row = []
        for asked, size in zip(row.asked, row.sizes, strict=True):
            answer = not_none(asked.targets)
            targets = sums.new_tensor([*answer, *[0.0] * (size - len(answer))])
            one = torch.zeros(size, dtype=torch.int64, device=sums.device)
            of_row.append(decide_reference(sums[start : start + size], targets, one, 1))
            start += size
        losses.append(torch.cat(of_row).mean())
    return torch.stack(losses).sum()


def _ranking_loss(texts: Sequence[RankedTexts], options: ObjectiveOptions, sums: Tensor) -> Tensor:
    losses = []
    for row, scores in zip(texts, scores_of(sums).split([len(row.documents) for row in texts]), strict=True):
        targets = scores.new_tensor(row.targets)
        if options.ranking_loss == "pointwise":
            losses.append(binary_cross_entropy_reference(scores, targets, options.positive_weight).mean())
            continue
        listed = targets.softmax(0) if options.ranking_loss == "listnet" else targets / targets.sum()
        one = torch.zeros(len(listed), dtype=torch.int64, device=sums.device)
        losses.append(decide_reference(scores, listed, one, 1).sum())
    return torch.stack(losses).sum()


@dataclass(eq=False)
class BlockwiseStep:
    """One training step of a decoder with its adapter in float64, by hand, with one block's weights at a time.

    Models of any size can be differentiated, since only one block is in float64 at a time. The forward saves each
    block's input x₀. At the head the loss gives ∂L/∂x. From the top block down, the engine's block backward turns
    ∂L/∂x₂ into ∂L/∂x₀ and the block's adapter gradients.

    Attributes:
        lora: the adapter's values in the decoder's compute dtype, converted to float64, and their gradients.
        cross_layer: the cross-layer tensors of the last pass.
    """

    decoder: Decoder  # with an adapter of nothing but factors, and the parameters of a head if there is `head_loss`
    batch: PackedBatch  # the packed documents, on the decoder's device
    dropout_seed: int | None  # draws the masks; None for no dropout
    loss_scaling: float
    row_loss: RowLoss | None = None  # the loss where documents are pairs or decisions; None for Σ nats
    head_loss: HeadLoss | None = None  # the loss of an adapter with a classification head or a score head

    def __post_init__(self) -> None:
        decoder = self.decoder
        if decoder.lora is None:
            raise ValueError("there is no adapter to prove: attach one first")
        self.cross_layer = CrossLayer()
        self._ple_saved: PLEInputsSaved | None = None
        slots, whole = decoder.lora.slots.values(), decoder.lora.full_tensors
        self.lora = LoRAParameters(slots, full_tensors=whole.values(), device=decoder.device, dtype=torch.float64)
        for name in self.lora.slots:
            self.lora.lora_A(name).copy_(decoder.lora.compute_A(name))
            self.lora.lora_B(name).copy_(decoder.lora.compute_B(name))
        for name in whole:  # the head computes in float32, whatever the compute dtype is
            self.lora.tensor(name).copy_(decoder.lora.tensor(name))
        # positions at which the last block computes its output, as in a training step
        batch = self.batch
        supervised = batch.supervised_positions if self.head_loss is None else read_positions(batch)
        self.positions = (
            torch.arange(len(batch.labels), device=batch.labels.device) if supervised is None else supervised
        )

    @property
    def layers(self) -> range:
        """Indices of the blocks."""
        return range(len(self.decoder.config.layers))

    def gradient(self) -> Tensor:
        """Return the whole gradient in the order of the flat buffer."""
        self.lora.gradients.zero_()
        inputs = self.forward(self.dropout_seed, self.positions)
        d_x, _ = self.head(inputs.pop())
        for layer in reversed(self.layers):
            d_x = self.block(layer, inputs.pop(), d_x)
        self.ple_backward()
        return self.lora.gradients

    @torch.no_grad()
    def ple_backward(self) -> None:
        """Add the gradients of the adapter before the first block, which computes per-layer embeddings."""
        weights, d_inputs = self._per_layer(), self.cross_layer.d_ple
        if weights is None or d_inputs is None or self._ple_saved is None:
            return
        config = self.decoder.config
        ple_inputs_backward(
            d_inputs, self._ple_saved, weights, config, self.lora, self.dropout_seed, input_gradient=False
        )

    def _per_layer(self) -> PerLayerWeights | None:
        """Return the per-layer weights in float64, except for the embedding table, of which only rows are read."""
        weights = self.decoder.weights.per_layer
        return weights and weights._replace(
            projection=float64_dense(weights.projection), norm=float64_dense(weights.norm)
        )

    @torch.no_grad()
    def forward(self, dropout_seed: int | None, rows: Tensor | None = None) -> list[Tensor]:
        """Return x₀ of every block and the last block's output, or the given rows of it."""
        # The embedding's rounding in the compute dtype is part of the function.
        x, config, weights = self.decoder.input_states(self.batch).double(), self.decoder.config, self._per_layer()
        self.cross_layer, inputs = CrossLayer(config.kv_sources), [x]
        if weights is not None:
            ple, self._ple_saved = ple_inputs_forward(x, self.batch.input_ids, weights, config, self.lora, dropout_seed)
            self.cross_layer = CrossLayer(config.kv_sources, ple)
            self.cross_layer.d_ple = torch.zeros_like(ple)
        for layer in self.layers:
            adapter = block_adapter(self.lora, config, layer, dropout_seed)
            x, _ = block_forward(x, self.block_weights(layer), adapter, self.context(layer, rows), "block")
            inputs.append(x)
        return inputs

    def head_parameters(self, trained: Mapping[str, Tensor] | None = None) -> Tensors:
        """Return the parameters of the classification head: those of the model and those of the adapter, in float64.

        Args:
            trained: use these values of the adapter's parameters.
        """
        base = {name: tensor.double() for name, tensor in self.decoder.weights.class_head.items()}
        return base | {name: (trained or {}).get(name, self.lora.tensor(name)) for name in self.lora.full_tensors}

    @torch.no_grad()
    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂L/∂x of the last block's output x, both at `positions`, and the loss."""
        if self.head_loss is not None:
            return self._class_head(x, self.head_loss)
        config, weights = self.decoder.config, self.decoder.weights
        labels = self.batch.labels[self.batch.supervised_positions]
        factors = self.decoder.head_factors(self.dropout_seed)
        if factors is not None:
            factors = factors._replace(lora_A=self.lora.lora_A(HEAD), lora_B=self.lora.lora_B(HEAD))
        normed, norm = rms_norm_forward(x, not_none(weights.final_norm).double(), config.norm_eps, config.norm_offset)
        head, loss = float64_dense(weights.head), None
        times = self.batch.weights
        multiplier: float | Tensor = self.loss_scaling if times is None else self.loss_scaling * times
        if self.row_loss is not None:
            nats = linear_cross_entropy_forward(normed, head, labels, factors, config.logits)
            loss, d_log_p = self.row_loss.token_loss(-self.batch.per_document(nats))
            multiplier = -self.loss_scaling * self.batch.sum_at_positions(d_log_p)
        losses, grads = linear_cross_entropy_backward(normed, head, labels, factors, multiplier, config.logits)
        if grads.d_lora_A is not None and grads.d_lora_B is not None:
            self.lora.d_lora_A(HEAD).copy_(grads.d_lora_A)
            self.lora.d_lora_B(HEAD).copy_(grads.d_lora_B)
        loss = self.batch.per_document(losses).sum() if loss is None else loss
        return rms_norm_backward(grads.d_x, norm, weight_gradient=False).d_x, loss

    def _class_head(self, x: Tensor, head_loss: HeadLoss) -> tuple[Tensor, Tensor]:
        states, norm = self.final_norm(x)
        read = torch.isin(self.positions, self.batch.supervised_positions)
        loss, d_read, d_parameters = head_loss.by_hand(states[read], self.batch, self.head_parameters())
        for name in self.lora.full_tensors:
            self.lora.gradient(name).copy_(self.loss_scaling * d_parameters[name])
        d_states = torch.zeros_like(states)
        d_states[read] = self.loss_scaling * d_read
        return d_states if norm is None else norm_backward(d_states, norm, None), loss

    @torch.no_grad()
    def block(self, layer: int, x0: Tensor, d_x2: Tensor) -> Tensor:
        """Return ∂L/∂x₀ of the block, and add its adapter gradients to the buffer."""
        weights, context = self.block_weights(layer), self.context(layer, self.positions)
        adapter = block_adapter(self.lora, self.decoder.config, layer, self.dropout_seed)
        _, saved = block_forward(x0, weights, adapter, context, "none")
        return not_none(block_backward(d_x2.clone(), saved, weights, adapter, context))

    def final_norm(self, x: Tensor) -> tuple[Tensor, NormSaved | None]:
        """Return the final states of the last block's output, and the saved tensors; None without a norm."""
        weights = self.decoder.weights
        if weights.final_norm is None:
            return x, None
        bias = weights.final_norm_bias
        return norm_forward(
            x, weights.final_norm.double(), None if bias is None else bias.double(), self.decoder.config
        )

    def block_weights(self, layer: int) -> BlockWeights:
        """Return a copy of the block's weights in float64."""
        block = self.decoder.weights.blocks[layer]
        parts = {part.name: getattr(block, part.name) for part in fields(BlockWeights)}
        return replace(block, **{name: float64_dense(part) for name, part in parts.items() if part is not None})

    def named_weights(self, layer: int) -> Tensors:
        """Return a float64 copy of the block's weights by their Hugging Face names."""
        views, path = named_views(self.decoder.weights, self.decoder.config), self.decoder.config.block_path(layer)
        return {name: float64_dense(view) for name, view in views if name.startswith(f"{path}.")}

    def context(self, layer: int, rows: Tensor | None = None) -> BlockContext:
        """The block's, of whose last one only these rows are wanted, None for all."""
        return self.decoder.contexts(self.batch, rows, self.cross_layer, torch.float64)[layer]


def float64_dense(weight: FrozenMatrix) -> Tensor:
    """Return a dense float64 copy of the values that the weight has in the compute dtype."""
    return frozen_dense(weight).to(torch.float64, copy=True)

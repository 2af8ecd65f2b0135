"""Every adapter gradient of the engine on a user's own model and rows, against autograd on the same weights.

The proof goes block by block, see `BlockwiseStep`: at the head, loss and ∂L/∂x by hand against autograd of the
reference head; from the top block down, given ∂L/∂x₂, ∂L/∂x₀ and the block's adapter gradients by hand against autograd
of the reference block on the same x₀ and ∂L/∂x₂. By the chain rule that proves the whole gradient, to about 1e-14.

Then the engine's training step itself, in the dtype that training uses, is held against this float64 gradient, beside
autograd's own error in that dtype. Rounding scatters from one input to the next, for autograd as for us, and the more
the smaller the loss; where one input is above the bound, the geometric means over several adapters of about the same
values decide, as they do for the ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.errors import not_none
from backhand.loop.objectives.compared import PairObjective
from backhand.loop.objectives.objective import token_owners
from backhand.nn.batch import IGNORE_INDEX, PackedBatch, TokenLoss
from backhand.nn.decoder.adapted_group import EMBEDDING, HEAD, block_adapter
from backhand.nn.decoder.block import block_backward, block_forward
from backhand.nn.decoder.cross_layer import CrossLayer, KeysAndValues
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import PER_LAYER_MODEL, PER_LAYER_MODEL_NORM, PER_LAYER_TABLE
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.ple_inputs import PLEInputsSaved, ple_inputs_backward, ple_inputs_forward
from backhand.nn.decoder.weights import BlockWeights, PerLayerWeights, named_views
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.dpo import DPORule, dpo_reference
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from backhand.ops.rms_norm import rms_norm_backward, rms_norm_forward
from backhand.ops.weight_tiles import FrozenMatrix, frozen_dense
from backhand.options.objectives import ObjectiveOptions
from backhand.runs.directory import ProofKind
from backhand.verify.measure import geometric_mean, relative_error
from backhand.verify.reference_decoder import (
    OfNats,
    ReferenceAdapter,
    ReferenceCrossLayer,
    ReferenceLayer,
    reference_block,
    reference_head,
    reference_inputs,
    reference_loss,
)
from backhand.verify.runner import NEIGHBOURS, TIMES_AUTOGRAD, UNITS_OF_ROUNDING
from backhand.verify.scaffold import Tensors

# What every gradient stays below in float64, and the rule for lower precision.
FLOAT64_BOUND = 1e-9
NEIGHBOURHOOD = 0.05
_BETA = 0.1
# Outputs, and the gradients that come back to them.
Graph = tuple[Sequence[Tensor], Sequence[Tensor]]
# Of an adapter among whose factors are all leaves, also those of no module.
Forward = Callable[[ReferenceAdapter], Graph]


@dataclass(frozen=True)
class ModelProof:
    """One proof about a model."""

    proof: str
    measured: float  # the relative error, or relative difference, that was found
    bound: float
    detail: str = ""  # where it is largest, or what it compares with
    kind: ProofKind = "gradients"

    @property
    def passed(self) -> bool:
        """Whether the measured value is within the bound; NaN is not."""
        return self.measured <= self.bound


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


@dataclass(eq=False)
class BlockwiseStep:
    """One training step of a decoder with its attached adapter in float64, by hand, one block's weights at a time.

    A model of any size is differentiated so, block after block, with the engine's own blocks: forward keeps each
    block's input x₀; at the head the loss gives ∂L/∂x; from the top block down ∂L/∂x₂ becomes ∂L/∂x₀ and the block's
    adapter gradients.

    Attributes:
        lora: the adapter's values as the decoder computes with them, and their gradients.
        cross_layer: the cross-layer tensors of the last pass.
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
        self.cross_layer = CrossLayer()
        self._begun: PLEInputsSaved | None = None
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
        weights, d_inputs = self._per_layer(), self.cross_layer.d_ple
        if weights is None or d_inputs is None or self._begun is None:
            return
        config = self.decoder.config
        ple_inputs_backward(d_inputs, self._begun, weights, config, self.lora, self.dropout_seed, input_gradient=False)

    def _per_layer(self) -> PerLayerWeights | None:
        """The same in float64 but for the table, of which only rows are read."""
        there = self.decoder.weights.per_layer
        return there and there._replace(projection=float64_dense(there.projection), norm=float64_dense(there.norm))

    @torch.no_grad()
    def forward(self, dropout_seed: int | None, rows: Tensor | None = None) -> list[Tensor]:
        """x₀ of every block and the last block's output, or these rows of it."""
        # Whatever embedding does in the compute dtype is part of the function.
        x, config, weights = self.decoder.embed(self.batch.input_ids).double(), self.decoder.config, self._per_layer()
        self.cross_layer, inputs = CrossLayer(config.kv_sources), [x]
        if weights is not None:
            own, self._begun = ple_inputs_forward(x, self.batch.input_ids, weights, config, self.lora, dropout_seed)
            self.cross_layer = CrossLayer(config.kv_sources, own)
            self.cross_layer.d_ple = torch.zeros_like(own)
        for layer in self.layers:
            adapter = block_adapter(self.lora, config, layer, dropout_seed)
            x, _ = block_forward(x, self.block_weights(layer), adapter, self.context(layer, rows), "block")
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
        return not_none(block_backward(d_x2.clone(), saved, weights, adapter, context))

    def block_weights(self, layer: int) -> BlockWeights:
        """A copy of the block's weights in float64."""
        block = self.decoder.weights.blocks[layer]
        parts = {part.name: getattr(block, part.name) for part in fields(BlockWeights)}
        return replace(block, **{name: float64_dense(part) for name, part in parts.items() if part is not None})

    def named_weights(self, layer: int) -> Tensors:
        """The same by their Hugging Face names."""
        views = named_views(self.decoder.weights, self.decoder.config)
        return {name: float64_dense(view) for name, view in views if name.startswith(f"model.layers.{layer}.")}

    def context(self, layer: int, rows: Tensor | None = None) -> BlockContext:
        """The block's, of whose last one only these rows are wanted, None for all."""
        return self.decoder.contexts(self.batch, rows, self.cross_layer, torch.float64)[layer]


def float64_dense(weight: FrozenMatrix) -> Tensor:
    """A copy in float64: of the numbers that the compute dtype has."""
    return frozen_dense(weight).to(torch.float64, copy=True)


class GradientProofs:
    """Proves the gradients of a decoder with its attached adapter on one batch.

    Args:
        decoder: with an adapter whose lora_B is not zero.
        batch: the packed documents, with at least one supervised position, on the decoder's device.
        dropout_seed: draws the masks, the same on both sides; None for no dropout.
        pairs: what the batch holds, where it is pairs: their loss is then proved, not that of answers.

    Attributes:
        step: the same step in float64; its gradients are filled by `by_block`.
        rounding_bound: what the compute dtype may cost, set by `training_step`.
    """

    def __init__(
        self, decoder: Decoder, batch: PackedBatch, dropout_seed: int | None, pairs: Sequence[Example] = ()
    ) -> None:
        of_pairs = pair_loss(pairs) if pairs else None
        self.step = BlockwiseStep(
            decoder, batch, dropout_seed, 1.0 / max(len(pairs) or batch.supervised_tokens, 1), of_pairs
        )
        self.rounding_bound = math.nan
        self._errors: dict[str, float] = {}

    def by_block(self) -> Iterator[ModelProof]:
        """float64: the loss, then one proof for each kind of module over all layers, and for what blocks pass down."""
        step = self.step
        step.lora.gradients.zero_()
        inputs = step.forward(step.dropout_seed, step.batch.supervised_positions)
        d_x, loss_error = self._prove_head(inputs.pop())
        what = "loss" if step.pair_loss is None else "loss of pairs (DPO)"
        yield ModelProof(f"{what} = reference, float64", loss_error, FLOAT64_BOUND)
        for layer in reversed(step.layers):
            d_x = self._prove_block(layer, inputs.pop(), d_x)
        if PER_LAYER_MODEL in step.lora:
            self._prove_begin()
        yield from self._summary()

    def training_step(self) -> ModelProof:
        """The engine's own step in the compute dtype: its whole gradient against float64, beside autograd's error."""
        dtype = self.step.decoder.dtype
        floor = UNITS_OF_ROUNDING * torch.finfo(dtype).eps
        measured, own = self._rounding_errors(self.step.lora.gradients)
        detail = "autograd's own error"
        if measured > max(TIMES_AUTOGRAD * own, floor):
            several = [(measured, own), *self._neighbours()]
            measured, own = (geometric_mean(errors) for errors in zip(*several, strict=True))
            detail = f"means of {len(several)}; autograd's own"
        self.rounding_bound = max(TIMES_AUTOGRAD * own, floor) if math.isfinite(own) else 0.0
        return ModelProof(
            f"a training step's gradient in {str(dtype).removeprefix('torch.')} = float64's",
            measured,
            self.rounding_bound,
            f"{detail}: {own:.1e}",
        )

    def _rounding_errors(self, truth: Tensor) -> tuple[float, float]:
        """How far the engine's gradient in the compute dtype is from the truth, and how far autograd's is."""
        step = self.step
        decoder, lora = step.decoder, not_none(step.decoder.lora)
        lora.gradients.zero_()
        token_loss = None if step.pair_loss is None else step.pair_loss.token_loss
        decoder.loss_and_gradients(step.batch, step.loss_scaling, step.dropout_seed, token_loss)
        return relative_error(lora.gradients, truth), relative_error(self._by_autograd(), truth)

    def _neighbours(self) -> Iterator[tuple[float, float]]:
        """The same two errors for adapters of about the same values and of the same signs."""
        step, lora = self.step, not_none(self.step.decoder.lora)
        values = lora.values.clone()
        generator = torch.Generator().manual_seed(0)
        try:
            for _ in range(NEIGHBOURS):
                drawn = torch.randn(values.shape, generator=generator).to(values.device)
                lora.values.copy_(values * torch.exp(NEIGHBOURHOOD * drawn))
                lora.refresh_compute(step.decoder.dtype)
                near = BlockwiseStep(step.decoder, step.batch, step.dropout_seed, step.loss_scaling, step.pair_loss)
                yield self._rounding_errors(near.gradient())
        finally:
            lora.values.copy_(values)
            lora.refresh_compute(step.decoder.dtype)

    def _by_autograd(self) -> Tensor:
        """The flat gradient by autograd of the reference in the compute dtype, in the order of the flat buffer."""
        step = self.step
        decoder, lora = step.decoder, not_none(step.decoder.lora)
        factors = {
            f"{name}.{part}": factor
            for name in lora.slots
            for part, factor in (("lora_A", lora.compute_A(name)), ("lora_B", lora.compute_B(name)))
        }
        views = {name: frozen_dense(view) for name, view in named_views(decoder.weights, decoder.config)}

        def forward(adapter: ReferenceAdapter) -> Graph:
            loss = reference_loss(views, decoder.config, step.batch, adapter, self._of_nats)
            return (loss,), (torch.full_like(loss, step.loss_scaling),)

        _, gradients = _differentiated(forward, factors, lora, step.dropout_seed)
        return torch.cat([gradient.double().reshape(-1) for gradient in gradients.values()])

    def _prove_head(self, x: Tensor) -> tuple[Tensor, float]:
        """∂L/∂x of the last block's output by hand, both at the supervised positions, and the loss's relative error."""
        step = self.step
        config, weights = step.decoder.config, step.decoder.weights
        d_x, by_hand = step.head(x)
        head = float64_dense(weights.head)
        named = {f"{config.final_norm}.weight": weights.final_norm.double()}
        named |= {f"{EMBEDDING}.weight": head, f"{HEAD}.weight": head}
        labels = step.batch.labels[step.batch.supervised_positions]

        def of_nats(nats: Tensor) -> Tensor:
            return self._of_nats(step.batch.of_documents(nats))

        def forward(adapter: ReferenceAdapter) -> Graph:
            loss = reference_head(adapter.factors["x"], named, config, labels, adapter, of_nats)
            return (loss,), (torch.full_like(loss, step.loss_scaling),)

        (loss,), by_autograd = self._prove([HEAD], {"x": x}, forward)
        self._compare("d_x of the head", d_x, by_autograd["x"])
        return d_x, relative_error(by_hand, loss.detach())

    @property
    def _of_nats(self) -> OfNats:
        return torch.sum if self.step.pair_loss is None else self.step.pair_loss.formula

    def _prove_block(self, layer: int, x0: Tensor, d_x2: Tensor) -> Tensor:
        """∂L/∂x₀ of the block by hand; it and the block's adapter gradients are compared."""
        step, cross_layer, config = self.step, self.step.cross_layer, self.step.decoder.config
        source, beside = config.layers[layer].kv_source, {"x": x0}
        before = None if source is None else cross_layer.grad(source)
        before = before and KeysAndValues(before.k.clone(), before.v.clone())
        from_users = cross_layer.grad(layer)
        if source is not None:
            beside |= cross_layer.shared_kv(source)._asdict()
        if cross_layer.ple is not None:
            beside["inputs"] = cross_layer.ple[:, layer]
        d_x0 = step.block(layer, x0, d_x2)
        named = step.named_weights(layer)
        wanted = step.batch.labels != IGNORE_INDEX if layer == step.layers[-1] else None

        def forward(adapter: ReferenceAdapter) -> Graph:
            leaves = adapter.factors
            inputs = leaves["inputs"][:, None].expand(-1, layer + 1, -1) if "inputs" in leaves else None
            given = ReferenceCrossLayer(inputs, {} if source is None else {source: (leaves["k"], leaves["v"])})
            at = ReferenceLayer(layer, named, config, step.batch.lengths, adapter, wanted, given)
            x2 = reference_block(leaves["x"], at)
            # Whoever uses this layer's keys and values passes their gradients down beside the stream's.
            lent = given.lent[layer] if from_users is not None else ()
            return (x2 if wanted is None else x2[wanted], *lent), (d_x2, *(from_users or ()))

        names = [name for name in step.lora.slots if name.startswith(f"model.layers.{layer}.")]
        _, by_autograd = self._prove(names, beside, forward)
        self._compare(f"d_x0 of layer {layer}", d_x0, by_autograd["x"])
        if source is not None:
            after = not_none(cross_layer.grad(source))
            for name, now, earlier in zip("kv", after, before or (None, None), strict=True):
                added = now if earlier is None else now - earlier
                self._compare(f"d_x: d_{name} of layer {source} by layer {layer}", added, by_autograd[name])
        if cross_layer.d_ple is not None:
            self._compare(f"d_x: d_inputs of layer {layer}", cross_layer.d_ple[:, layer], by_autograd["inputs"])
        return d_x0

    def _prove_begin(self) -> None:
        """The gradients of the adapter of what makes the layers' inputs, given theirs."""
        step = self.step
        config, weights, ids = step.decoder.config, not_none(step.decoder.weights.per_layer), step.batch.input_ids
        named = {
            f"{PER_LAYER_MODEL}.weight": float64_dense(weights.projection),
            f"{PER_LAYER_MODEL_NORM}.weight": float64_dense(weights.norm),
            f"{PER_LAYER_TABLE}.weight": frozen_dense(weights.embedding),
        }
        h, d_inputs = step.decoder.embed(ids).double(), not_none(step.cross_layer.d_ple)
        step.begin()

        def forward(adapter: ReferenceAdapter) -> Graph:
            return (not_none(reference_inputs(h, named, config, ids, adapter)),), (d_inputs,)

        self._prove([PER_LAYER_MODEL], {}, forward)

    def _prove(self, names: Collection[str], beside: Tensors, forward: Forward) -> tuple[Sequence[Tensor], Tensors]:
        """Outputs and gradients by autograd of the reference; those of these modules' factors are compared."""
        lora = self.step.lora
        factors = {name: factor for name, factor in lora.named_tensors() if name.rpartition(".")[0] in names}
        y, found = _differentiated(forward, factors | beside, lora, self.step.dropout_seed)
        for name in factors:
            self._compare(name, lora.gradient(name), found[name])
        return y, found

    def _compare(self, name: str, by_hand: Tensor, by_autograd: Tensor) -> None:
        self._errors[name] = relative_error(by_hand, by_autograd)

    def _summary(self) -> Iterator[ModelProof]:
        """The largest error of each kind of module, adapter gradients first."""
        kinds: dict[str, list[str]] = {}
        for name in (*self.step.lora.slots, "d_x"):
            kinds.setdefault(name.rpartition(".")[2], [])
        for name in self._errors:
            kinds["d_x" if name.startswith("d_x") else name.split(".")[-2]].append(name)
        for kind, names in kinds.items():
            worst = max(names, key=lambda name: (math.isnan(self._errors[name]), self._errors[name]))
            what = f"{len(names)} × d_x" if kind == "d_x" else f"{len(names) // 2} × {kind}: d_lora_A, d_lora_B"
            yield ModelProof(f"{what} = autograd's, float64", self._errors[worst], FLOAT64_BOUND, f"worst: {worst}")


def _differentiated(
    forward: Forward, tensors: Tensors, lora: LoRAParameters, dropout_seed: int | None
) -> tuple[Sequence[Tensor], Tensors]:
    """Its outputs, and by name the gradients for these tensors by autograd."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    slots = {name: slot for name, slot in lora.slots.items() if f"{name}.lora_A" in leaves}
    with torch.enable_grad():
        y, d_y = forward(ReferenceAdapter(slots, leaves, dropout_seed))
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), d_y), strict=True))

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
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch, Scratch
from backhand.nn.decoder.adapted_group import before_blocks_adapter, block_adapter
from backhand.nn.decoder.block import block_backward, block_forward
from backhand.nn.decoder.carried import Carried, KeysAndValues
from backhand.nn.decoder.decoder import HEAD, Decoder
from backhand.nn.decoder.family import PER_LAYER_MODEL, PER_LAYER_MODEL_NORM, PER_LAYER_TABLE
from backhand.nn.decoder.mixer import BlockContext
from backhand.nn.decoder.per_layer_input import BeginKept, inputs_backward, inputs_forward
from backhand.nn.decoder.rotary import frequencies_of
from backhand.nn.decoder.weights import BlockWeights, DecoderWeights, PerLayerWeights, dense_views, named_views
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.frozen_matrix import FrozenMatrix, frozen_dense
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward
from backhand.ops.rms_norm import rms_norm_backward, rms_norm_forward
from backhand.ops.rotary import angles, scaled_for_queries
from backhand.runs.directory import ProofKind
from backhand.verify.case import Tensors
from backhand.verify.measure import relative_error
from backhand.verify.reference_decoder import (
    ReferenceAdapter,
    ReferenceCarried,
    reference_block,
    reference_head,
    reference_inputs,
    reference_loss,
)

# What every gradient stays below in float64, and the rule for lower precision.
FLOAT64_BOUND = 1e-9
TIMES_AUTOGRAD = 2.0
UNITS_OF_ROUNDING = 4.0
NEIGHBOURS = 7
NEIGHBOURHOOD = 0.05


@dataclass(frozen=True)
class ModelProof:
    """One proof about a model.

    Attributes:
        proof: the statement.
        measured: the relative error, or relative difference, that was found.
        bound: what it may be.
        detail: where it is largest, or what it compares with.
        kind: what it is about.
    """

    proof: str
    measured: float
    bound: float
    detail: str = ""
    kind: ProofKind = "gradients"

    @property
    def passed(self) -> bool:
        """Whether the measured value is within the bound; NaN is not."""
        return self.measured <= self.bound


class GradientProofs:
    """Proves the gradients of a decoder with its attached adapter on one batch.

    Args:
        decoder: with an adapter whose lora_B is not zero.
        batch: the packed documents, with at least one supervised position, on the decoder's device.
        dropout_seed: draws the masks, the same on both sides; None for no dropout.

    Attributes:
        step: the same step in float64; its gradients are filled by `by_block`.
        rounding_bound: what the compute dtype may cost, set by `training_step`.
    """

    def __init__(self, decoder: Decoder, batch: PackedBatch, dropout_seed: int | None) -> None:
        self.step = BlockwiseStep(decoder, batch, dropout_seed, 1.0 / max(batch.supervised_tokens, 1))
        self.rounding_bound = math.nan
        self._errors: dict[str, float] = {}

    def by_block(self) -> Iterator[ModelProof]:
        """float64: the loss, then one proof for each kind of module over all layers, and for what blocks pass down."""
        step = self.step
        step.lora.gradients.zero_()
        inputs = step.forward(step.dropout_seed, step.batch.supervised_positions)
        d_x, loss_error = self._prove_head(inputs.pop())
        yield ModelProof("loss = reference, float64", loss_error, FLOAT64_BOUND)
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
            measured, own = (_typical(errors) for errors in zip(*several, strict=True))
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
        decoder, lora = step.decoder, step.decoder.lora
        assert lora is not None
        lora.gradients.zero_()
        decoder.loss_and_gradients(step.batch, step.loss_scaling, step.dropout_seed)
        return relative_error(lora.gradients, truth), relative_error(self._by_autograd(), truth)

    def _neighbours(self) -> Iterator[tuple[float, float]]:
        """The same two errors for adapters of about the same values and of the same signs."""
        step, lora = self.step, self.step.decoder.lora
        assert lora is not None
        values = lora.values.clone()
        generator = torch.Generator().manual_seed(0)
        try:
            for _ in range(NEIGHBOURS):
                drawn = torch.randn(values.shape, generator=generator).to(values.device)
                lora.values.copy_(values * torch.exp(NEIGHBOURHOOD * drawn))
                lora.refresh_compute(step.decoder.dtype)
                near = BlockwiseStep(step.decoder, step.batch, step.dropout_seed, step.loss_scaling)
                yield self._rounding_errors(near.gradient())
        finally:
            lora.values.copy_(values)
            lora.refresh_compute(step.decoder.dtype)

    def _by_autograd(self) -> Tensor:
        """The flat gradient by autograd of the reference in the compute dtype, in the order of the flat buffer."""
        step = self.step
        decoder, lora = step.decoder, step.decoder.lora
        assert lora is not None
        leaves = {}
        for name in lora.slots:
            leaves[f"{name}.lora_A"] = lora.compute_A(name).clone().requires_grad_()
            leaves[f"{name}.lora_B"] = lora.compute_B(name).clone().requires_grad_()
        views = {name: frozen_dense(view) for name, view in named_views(decoder.weights, decoder.config)}
        adapter = ReferenceAdapter(lora.slots, leaves, step.dropout_seed)
        with torch.enable_grad():
            loss = step.loss_scaling * reference_loss(views, decoder.config, step.batch, adapter)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        return torch.cat([gradient.double().reshape(-1) for gradient in gradients])

    def _prove_head(self, x: Tensor) -> tuple[Tensor, float]:
        """∂L/∂x of the last block's output by hand, both at the supervised positions, and the loss's relative error."""
        step = self.step
        config, weights = step.decoder.config, step.decoder.weights
        d_x, losses = step.head(x)
        names = [HEAD] if HEAD in step.lora else []
        leaves = self._leaves(names) | {"x": x.clone().requires_grad_()}
        head = _wide(weights.head)
        reference_weights = {
            f"{config.final_norm}.weight": weights.final_norm.double(),
            "model.embed_tokens.weight": head,
            "lm_head.weight": head,
        }
        labels = step.batch.labels[step.batch.supervised_positions]
        with torch.enable_grad():
            loss = reference_head(leaves["x"], reference_weights, config, labels, self._adapter(leaves))
        by_autograd = self._gradients((step.loss_scaling * loss,), (torch.ones_like(loss),), leaves)
        self._compare("d_x of the head", d_x, by_autograd["x"])
        self._compare_factors(names, by_autograd)
        return d_x, relative_error(losses.sum(), loss.detach())

    def _prove_block(self, layer: int, x0: Tensor, d_x2: Tensor) -> Tensor:
        """∂L/∂x₀ of the block by hand; it and the block's adapter gradients are compared."""
        step, config = self.step, self.step.decoder.config
        source, beside = config.layers[layer].keys_of, self._beside(layer)
        before = None if source is None else step.carried.held(source)
        before = before and KeysAndValues(before.k.clone(), before.v.clone())
        from_users = step.carried.held(layer)
        d_x0 = step.block(layer, x0, d_x2)
        names = [name for name in step.lora.slots if name.startswith(f"model.layers.{layer}.")]
        leaves = self._leaves(names) | {"x": x0.clone().requires_grad_()} | beside
        reference_weights = step.named_weights(layer, step.block_weights(layer))
        wanted = step.batch.labels != IGNORE_INDEX if layer == step.layers[-1] else None
        with torch.enable_grad():
            x2 = reference_block(
                leaves["x"],
                layer,
                reference_weights,
                step.decoder.config,
                step.batch.document_lengths,
                self._adapter(leaves),
                wanted,
                carried := self._reference_carried(layer, leaves),
            )
            x2 = x2 if wanted is None else x2[wanted]
            # Whoever uses this layer's keys and values passes their gradients down beside the stream's.
            lent = carried.lent[layer] if from_users is not None else ()
        by_autograd = self._gradients((x2, *lent), (d_x2, *(from_users or ())), leaves)
        self._compare(f"d_x0 of layer {layer}", d_x0, by_autograd["x"])
        if source is not None:
            after = step.carried.held(source)
            assert after is not None
            for name, now, earlier in zip("kv", after, before or (None, None), strict=True):
                added = now if earlier is None else now - earlier
                self._compare(f"d_x: d_{name} of layer {source} by layer {layer}", added, by_autograd[name])
        if "inputs" in leaves and step.carried.d_inputs is not None:
            d_inputs = step.carried.d_inputs[:, layer]
            self._compare(f"d_x: d_inputs of layer {layer}", d_inputs, by_autograd["inputs"])
        self._compare_factors(names, by_autograd)
        return d_x0

    def _beside(self, layer: int) -> Tensors:
        """Leaves of what the block has beside the stream."""
        carried, source = self.step.carried, self.step.decoder.config.layers[layer].keys_of
        leaves: Tensors = {}
        if source is not None:
            k, v = carried.lent(source)
            leaves |= {"k": k.clone().requires_grad_(), "v": v.clone().requires_grad_()}
        if carried.inputs is not None:
            leaves["inputs"] = carried.inputs[:, layer].clone().requires_grad_()
        return leaves

    def _reference_carried(self, layer: int, leaves: Tensors) -> ReferenceCarried:
        source, inputs = self.step.decoder.config.layers[layer].keys_of, None
        if "inputs" in leaves:
            inputs = leaves["inputs"].unsqueeze(1).expand(-1, layer + 1, -1)
        return ReferenceCarried(inputs, {} if source is None else {source: (leaves["k"], leaves["v"])})

    def _prove_begin(self) -> None:
        """The gradients of the adapter of what makes the layers' inputs, given theirs."""
        step, names = self.step, [PER_LAYER_MODEL]
        config, weights = step.decoder.config, step.decoder.weights.per_layer
        assert weights is not None and step.carried.d_inputs is not None
        leaves = self._leaves(names)
        reference_weights = {
            f"{PER_LAYER_MODEL}.weight": _wide(weights.projection),
            f"{PER_LAYER_MODEL_NORM}.weight": _wide(weights.norm),
            f"{PER_LAYER_TABLE}.weight": frozen_dense(weights.embedding),
        }
        ids = step.batch.input_ids
        h = step.decoder.embed(ids).double()
        with torch.enable_grad():
            inputs = reference_inputs(h, reference_weights, config, ids, self._adapter(leaves))
            assert inputs is not None
        by_autograd = self._gradients((inputs,), (step.carried.d_inputs,), leaves)
        step.begin()
        self._compare_factors(names, by_autograd)

    def _adapter(self, leaves: Tensors) -> ReferenceAdapter:
        slots = {name: slot for name, slot in self.step.lora.slots.items() if f"{name}.lora_A" in leaves}
        return ReferenceAdapter(slots, leaves, self.step.dropout_seed)

    def _leaves(self, names: list[str]) -> Tensors:
        leaves: Tensors = {}
        for name in names:
            leaves[f"{name}.lora_A"] = self.step.lora.lora_A(name).clone().requires_grad_()
            leaves[f"{name}.lora_B"] = self.step.lora.lora_B(name).clone().requires_grad_()
        return leaves

    @staticmethod
    def _gradients(y: Sequence[Tensor], d_y: Sequence[Tensor], leaves: Tensors) -> Tensors:
        found = torch.autograd.grad(y, list(leaves.values()), d_y)
        return dict(zip(leaves, found, strict=True))

    def _compare(self, name: str, by_hand: Tensor, by_autograd: Tensor) -> None:
        self._errors[name] = relative_error(by_hand, by_autograd)

    def _compare_factors(self, names: list[str], by_autograd: Mapping[str, Tensor]) -> None:
        for name in names:
            self._compare(f"{name}.lora_A", self.step.lora.d_lora_A(name), by_autograd[f"{name}.lora_A"])
            self._compare(f"{name}.lora_B", self.step.lora.d_lora_B(name), by_autograd[f"{name}.lora_B"])

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


def _typical(errors: Sequence[float]) -> float:
    """The geometric mean; NaN where one of them is."""
    if any(math.isnan(error) for error in errors):
        return math.nan
    return statistics.geometric_mean(max(error, 1e-300) for error in errors)


# ---------------------------------------------------------------------------------------------------------------------
# The engine's training step in float64, by hand, with only one block's weights in float64 at a time.
#
# A model of any size is differentiated so, block after block, with the engine's own blocks: forward keeps each block's
# input x₀; at the head the loss gives ∂L/∂x; from the top block down ∂L/∂x₂ becomes ∂L/∂x₀ and the block's adapter
# gradients.


class BlockwiseStep:
    """One training step of a decoder with its attached adapter, in float64.

    Args:
        decoder: with an adapter of nothing but factors.
        batch: the packed documents, on the decoder's device.
        dropout_seed: draws the masks; None for no dropout.
        loss_scaling: the factor of the summed loss.

    Attributes:
        lora: the adapter's values as the decoder computes with them, and their gradients.
        carried: what the last pass carried beside the stream.
    """

    def __init__(self, decoder: Decoder, batch: PackedBatch, dropout_seed: int | None, loss_scaling: float) -> None:
        if decoder.lora is None:
            raise ValueError("there is no adapter to prove: attach one first")
        self.decoder = decoder
        self.batch = batch
        self.dropout_seed = dropout_seed
        self.loss_scaling = loss_scaling
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
        adapter = before_blocks_adapter(self.lora, self.dropout_seed, weights.projection)
        config = self.decoder.config
        inputs_backward(d_inputs, self._begun, weights, config, adapter, self.lora, input_gradient=False)

    def _per_layer_weights(self) -> PerLayerWeights | None:
        """The same in float64 but for the table, of which only rows are read."""
        there = self.decoder.weights.per_layer
        return there and there._replace(projection=_wide(there.projection), norm=_wide(there.norm))

    def _carry(self, h: Tensor, dropout_seed: int | None) -> None:
        """Begin a pass from the embedded tokens: nothing is lent yet, and no gradient has come back."""
        weights, config = self._per_layer_weights(), self.decoder.config
        self.carried = Carried(config.lenders)
        if weights is None:
            return
        adapter = before_blocks_adapter(self.lora, dropout_seed, weights.projection)
        inputs, self._begun = inputs_forward(h, self.batch.input_ids, weights, config, adapter)
        self.carried = Carried(config.lenders, inputs)
        self.carried.d_inputs = torch.zeros_like(inputs)

    @torch.no_grad()
    def forward(self, dropout_seed: int | None, rows: Tensor | None = None) -> list[Tensor]:
        """x₀ of every block and the last block's output, or these rows of it."""
        # Whatever embedding does in the compute dtype is part of the function.
        inputs = [self.decoder.embed(self.batch.input_ids).double()]
        self._carry(inputs[0], dropout_seed)
        for layer in self.layers:
            adapter = block_adapter(self.lora, layer, dropout_seed, groups=self.decoder.config.layer_groups[layer])
            context = self.context(layer, rows)
            x, _ = block_forward(inputs[-1], self.block_weights(layer), adapter, context, "block")
            inputs.append(x)
        return inputs

    @torch.no_grad()
    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """∂L/∂x of the last block's output x, both at the supervised positions, and their losses."""
        config, weights = self.decoder.config, self.decoder.weights
        labels = self.batch.labels[self.batch.supervised_positions]
        factors = self.decoder.head_factors(self.dropout_seed)
        if factors is not None:
            factors = factors._replace(lora_A=self.lora.lora_A(HEAD), lora_B=self.lora.lora_B(HEAD))
        normed, norm = rms_norm_forward(x, weights.final_norm.double(), config.norm_eps, config.norm_offset)
        losses, grads = linear_cross_entropy_backward(
            normed, _wide(weights.head), labels, factors, self.loss_scaling, config.logits
        )
        if grads.d_lora_A is not None and grads.d_lora_B is not None:
            self.lora.d_lora_A(HEAD).copy_(grads.d_lora_A)
            self.lora.d_lora_B(HEAD).copy_(grads.d_lora_B)
        return rms_norm_backward(grads.d_x, norm, weight_gradient=False).d_x, losses

    @torch.no_grad()
    def block(self, layer: int, x0: Tensor, d_x2: Tensor) -> Tensor:
        """∂L/∂x₀ of the block; its adapter gradients are added to the buffer."""
        weights, context = self.block_weights(layer), self.context(layer, self.batch.supervised_positions)
        adapter = block_adapter(self.lora, layer, self.dropout_seed, groups=self.decoder.config.layer_groups[layer])
        _, saved = block_forward(x0, weights, adapter, context, "none")
        d_x0 = block_backward(d_x2.clone(), saved, weights, adapter, context, self.lora)
        assert d_x0 is not None
        return d_x0

    def block_weights(self, layer: int) -> BlockWeights:
        """A copy of the block's weights in float64."""
        block = self.decoder.weights.blocks[layer]
        parts = {part.name: getattr(block, part.name) for part in fields(BlockWeights)}
        return replace(block, **{name: _wide(part) for name, part in parts.items() if part is not None})

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
        config = self.decoder.config
        which, table, queries = config.layers[layer].rotary, None, None
        if which is not None:
            frequencies = frequencies_of(config.rotary[which], config.rotary_dims[which], self.decoder.device)
            table = angles(frequencies, self.batch.positions, torch.float64, self.batch.reach)
            if config.query_scaling is not None:
                queries = scaled_for_queries(
                    table, self.batch.positions, config.query_scaling.beta, config.query_scaling.length
                )
        wanted = rows if layer == len(config.layers) - 1 else None
        return BlockContext(
            config.at(config.layers[layer]),
            config.layers[layer],
            table,
            self.batch.runs,
            Scratch(),
            queries,
            wanted,
            self.batch.shared_prefix,
            layer,
            self.carried,
        )


def _wide(weight: FrozenMatrix) -> Tensor:
    """A copy in float64: of the numbers that the compute dtype has."""
    return frozen_dense(weight).to(torch.float64, copy=True)

"""Prove every adapter gradient of the engine on a user's model and rows, against autograd on the same weights.

The proof goes block by block, see `BlockwiseStep`:

1. At the head, loss and ∂L/∂x by hand are compared with autograd of the reference head.
2. From the top block down, ∂L/∂x₀ and the block's adapter gradients are compared with autograd of the reference block
   on the same x₀ and ∂L/∂x₂.

By the chain rule this proves the whole gradient, to about 1e-14.

Then the engine's training step, in the dtype that training uses, is compared with this float64 gradient. Its error may
be at most twice autograd's error in that dtype. Rounding errors vary between similar inputs, more so for small losses.
If the error is above the bound, the geometric means over several similar adapters decide, as for the ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.errors import not_none
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.decoder.cross_layer import KeysAndValues
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import named_views
from backhand.nn.families.family import PER_LAYER_MODEL, PER_LAYER_MODEL_NORM, PER_LAYER_TABLE
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.weight_tiles import frozen_dense
from backhand.options.objectives import ObjectiveOptions
from backhand.verify.blockwise_step import BlockwiseStep, float64_dense, row_loss
from backhand.verify.head_loss import HeadLoss
from backhand.verify.measure import geometric_mean, relative_error
from backhand.verify.reference_decoder import (
    NatsLoss,
    ReferenceAdapter,
    ReferenceCrossLayer,
    ReferenceLayer,
    StatesLoss,
    reference_block,
    reference_head,
    reference_inputs,
    reference_loss,
    reference_states,
)
from backhand.verify.report import Result, statement
from backhand.verify.runner import NEIGHBOURS, dtype_name, rounding_bound
from backhand.verify.scaffold import Tensors

# The largest relative error of any gradient in float64.
FLOAT64_BOUND = 1e-9
NEIGHBOURHOOD = 0.05
_OF_HEAD = "gradient of the head"
# Outputs, and the upstream gradients of these outputs.
Graph = tuple[Sequence[Tensor], Sequence[Tensor]]
# A function of an adapter whose factors include all leaves, also those that belong to no module.
Forward = Callable[[ReferenceAdapter], Graph]


class GradientProofs:
    """Prove the gradients of a decoder with its attached adapter on one batch.

    Args:
        decoder: a decoder whose adapter has a nonzero lora_B.
        batch: the packed documents, with at least one supervised position, on the decoder's device.
        dropout_seed: seed of the masks, the same for engine and reference; None for no dropout.
        rows: the pairs or the rows of decisions or rankings in the batch, whose loss is then proved instead of Σ nats.
        objective: the loss of rankings; None for the usual one.
        head_loss: the loss of an adapter with a head; None without one.

    Attributes:
        step: the same step in float64. `by_block` fills its gradients.
        rounding_bound: the largest allowed error in the compute dtype, set by `training_step`.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: PackedBatch,
        dropout_seed: int | None,
        rows: Sequence[Example] = (),
        objective: ObjectiveOptions | None = None,
        head_loss: HeadLoss | None = None,
    ) -> None:
        loss = row_loss(rows, objective) if rows else None
        parts = len(rows) or (batch.supervised_tokens if head_loss is None else len(batch.ends))
        self.step = BlockwiseStep(decoder, batch, dropout_seed, 1.0 / max(parts, 1), loss, head_loss)
        self.rounding_bound = math.nan
        self._errors: dict[str, float] = {}

    def by_block(self) -> Iterator[Result]:
        """Prove in float64: the loss, then each kind of module over all layers, and the gradients between blocks."""
        step = self.step
        step.lora.gradients.zero_()
        inputs = step.forward(step.dropout_seed, step.positions)
        d_x, loss_error = self._prove_head(inputs.pop())
        what = "loss" if step.row_loss is None else step.row_loss.name
        if step.head_loss is not None:
            what = f"weighted sum of {'the logits' if step.head_loss.vectors is None else 'vectors'}"
        yield statement(f"{what} = reference, float64", loss_error, FLOAT64_BOUND)
        for layer in reversed(step.layers):
            d_x = self._prove_block(layer, inputs.pop(), d_x)
        if PER_LAYER_MODEL in step.lora:
            self._prove_ple()
        yield from self._summary()

    def training_step(self) -> Result:
        """Compare the gradient of the engine's step in the compute dtype with float64, bounded by autograd's error."""
        dtype = self.step.decoder.dtype
        measured, baseline = self._rounding_errors(self.step.lora.gradients)
        detail = "autograd's own error"
        if measured > rounding_bound(baseline, dtype):
            several = [(measured, baseline), *self._neighbours()]
            measured, baseline = (geometric_mean(errors) for errors in zip(*several, strict=True))
            detail = f"means of {len(several)}; autograd's own"
        self.rounding_bound = rounding_bound(baseline, dtype)
        return statement(
            f"a training step's gradient in {dtype_name(dtype)} = float64's",
            measured,
            self.rounding_bound,
            f"{detail}: {baseline:.1e}",
        )

    def _rounding_errors(self, truth: Tensor) -> tuple[float, float]:
        """Return the relative errors of the engine's and of autograd's gradient in the compute dtype."""
        step = self.step
        decoder, lora = step.decoder, not_none(step.decoder.lora)
        lora.gradients.zero_()
        if step.head_loss is not None:
            step.head_loss.engine_gradients(decoder, step.batch, step.loss_scaling, step.dropout_seed)
        else:
            token_loss = None if step.row_loss is None else step.row_loss.token_loss
            decoder.loss_and_gradients(step.batch, step.loss_scaling, step.dropout_seed, token_loss)
        return relative_error(lora.gradients, truth), relative_error(self._by_autograd(), truth)

    def _neighbours(self) -> Iterator[tuple[float, float]]:
        """Iterate over the same two errors for adapters with similar values of equal sign."""
        step, lora = self.step, not_none(self.step.decoder.lora)
        values = lora.values.clone()
        generator = torch.Generator().manual_seed(0)
        try:
            for _ in range(NEIGHBOURS):
                drawn = torch.randn(values.shape, generator=generator).to(values.device)
                lora.values.copy_(values * torch.exp(NEIGHBOURHOOD * drawn))
                lora.refresh_compute(step.decoder.dtype)
                near = replace(step)
                yield self._rounding_errors(near.gradient())
        finally:
            lora.values.copy_(values)
            lora.refresh_compute(step.decoder.dtype)

    def _by_autograd(self) -> Tensor:
        """Return the flat gradient by autograd of the reference in the compute dtype, in the buffer's order."""
        step = self.step
        decoder, lora = step.decoder, not_none(step.decoder.lora)
        factors = {
            name: tensor if name in lora.full_tensors else lora.compute(name) for name, tensor in lora.named_tensors()
        }
        views = {name: frozen_dense(view) for name, view in named_views(decoder.weights, decoder.config)}

        def forward(adapter: ReferenceAdapter) -> Graph:
            loss = reference_loss(
                *(views, decoder.config, step.batch, adapter, self._nats_loss),
                *(self._loss_of_states(adapter.factors), step.positions),
            )
            return (loss,), (torch.full_like(loss, step.loss_scaling),)

        _, gradients = _differentiate(forward, factors, lora, step.dropout_seed)
        return torch.cat([gradient.double().reshape(-1) for gradient in gradients.values()])

    def _prove_head(self, x: Tensor) -> tuple[Tensor, float]:
        """Compare the head, and return ∂L/∂x by hand at the supervised positions and the loss's relative error."""
        step = self.step
        config, weights = step.decoder.config, step.decoder.weights
        d_x, by_hand = step.head(x)
        if step.head_loss is not None:
            return d_x, self._prove_class_head(x, d_x, by_hand)
        head = float64_dense(weights.head)
        named = {f"{config.final_norm}.weight": not_none(weights.final_norm).double()}
        named |= {f"{config.embedding}.weight": head, f"{HEAD}.weight": head}
        labels = step.batch.labels[step.batch.supervised_positions]

        def nats_loss(nats: Tensor) -> Tensor:
            return self._nats_loss(step.batch.per_document(nats))

        def forward(adapter: ReferenceAdapter) -> Graph:
            loss = reference_head(adapter.factors["x"], named, config, labels, adapter, nats_loss)
            return (loss,), (torch.full_like(loss, step.loss_scaling),)

        (loss,), by_autograd = self._prove([HEAD], {"x": x}, forward)
        self._compare("d_x of the head", d_x, by_autograd["x"])
        return d_x, relative_error(by_hand, loss.detach())

    def _prove_class_head(self, x: Tensor, d_x: Tensor, by_hand: Tensor) -> float:
        """Compare the gradients of the head's parameters and ∂L/∂x, and return the loss's relative error."""
        step = self.step
        config, read = step.decoder.config, torch.isin(step.positions, step.batch.supervised_positions)
        ends = (f"{config.final_norm}.weight", f"{config.final_norm}.bias")
        named = {name: float64_dense(view) for name, view in named_views(step.decoder.weights, config) if name in ends}

        def forward(adapter: ReferenceAdapter) -> Graph:
            states = reference_states(adapter.factors["x"], named, config)[read]
            loss = not_none(self._loss_of_states(adapter.factors))(states)
            return (loss,), (torch.full_like(loss, step.loss_scaling),)

        trained = {name: step.lora.tensor(name) for name in step.lora.full_tensors}
        (loss,), by_autograd = _differentiate(forward, {"x": x, **trained}, step.lora, step.dropout_seed)
        self._compare("d_x of the head", d_x, by_autograd["x"])
        for name in trained:
            self._compare(name, step.lora.gradient(name), by_autograd[name])
        return relative_error(by_hand, loss.detach())

    def _loss_of_states(self, trained: Mapping[str, Tensor]) -> StatesLoss | None:
        """Return the loss of a head with these values of the adapter's parameters; None without a head."""
        step = self.step
        if (head_loss := step.head_loss) is None:
            return None
        return lambda states: head_loss.reference(states, step.batch, step.head_parameters(trained))

    @property
    def _nats_loss(self) -> NatsLoss:
        return torch.sum if self.step.row_loss is None else self.step.row_loss.formula

    def _prove_block(self, layer: int, x0: Tensor, d_x2: Tensor) -> Tensor:
        """Compare ∂L/∂x₀ of the block and its adapter gradients, and return ∂L/∂x₀ by hand."""
        step, cross_layer, config = self.step, self.step.cross_layer, self.step.decoder.config
        source, extra = config.layers[layer].kv_source, {"x": x0}
        before = None if source is None else cross_layer.grad(source)
        before = before and KeysAndValues(before.k.clone(), before.v.clone())
        from_users = cross_layer.grad(layer)
        if source is not None:
            extra |= cross_layer.shared_kv(source)._asdict()
        if cross_layer.ple is not None:
            extra["inputs"] = cross_layer.ple[:, layer]
        d_x0 = step.block(layer, x0, d_x2)
        named = step.named_weights(layer)
        loss_positions = None
        if layer == step.layers[-1]:
            loss_positions = torch.zeros_like(step.batch.labels, dtype=torch.bool)
            loss_positions[step.positions] = True

        def forward(adapter: ReferenceAdapter) -> Graph:
            leaves = adapter.factors
            inputs = leaves["inputs"][:, None].expand(-1, layer + 1, -1) if "inputs" in leaves else None
            reference = ReferenceCrossLayer(inputs, {} if source is None else {source: (leaves["k"], leaves["v"])})
            reference_layer = ReferenceLayer(
                layer, named, config, step.batch.lengths, adapter, loss_positions, reference
            )
            x2 = reference_block(leaves["x"], reference_layer)
            # Layers that use this layer's keys and values return gradients of them, in addition to d_x2.
            shared = reference.shared_kv[layer] if from_users is not None else ()
            return (x2 if loss_positions is None else x2[loss_positions], *shared), (d_x2, *(from_users or ()))

        names = [name for name in step.lora.slots if name.startswith(f"{config.block_path(layer)}.")]
        _, by_autograd = self._prove(names, extra, forward)
        self._compare(f"d_x0 of layer {layer}", d_x0, by_autograd["x"])
        if source is not None:
            after = not_none(cross_layer.grad(source))
            for name, now, earlier in zip("kv", after, before or (None, None), strict=True):
                added = now if earlier is None else now - earlier
                self._compare(f"d_x: d_{name} of layer {source} by layer {layer}", added, by_autograd[name])
        if cross_layer.d_ple is not None:
            self._compare(f"d_x: d_inputs of layer {layer}", cross_layer.d_ple[:, layer], by_autograd["inputs"])
        return d_x0

    def _prove_ple(self) -> None:
        """Compare the gradients of the adapter that computes per-layer embeddings, given their upstream gradients."""
        step = self.step
        config, weights, ids = step.decoder.config, not_none(step.decoder.weights.per_layer), step.batch.input_ids
        named = {
            f"{PER_LAYER_MODEL}.weight": float64_dense(weights.projection),
            f"{PER_LAYER_MODEL_NORM}.weight": float64_dense(weights.norm),
            f"{PER_LAYER_TABLE}.weight": frozen_dense(weights.embedding),
        }
        h, d_inputs = step.decoder.embed(ids).double(), not_none(step.cross_layer.d_ple)
        step.ple_backward()

        def forward(adapter: ReferenceAdapter) -> Graph:
            return (not_none(reference_inputs(h, named, config, ids, adapter)),), (d_inputs,)

        self._prove([PER_LAYER_MODEL], {}, forward)

    def _prove(self, names: Collection[str], extra: Tensors, forward: Forward) -> tuple[Sequence[Tensor], Tensors]:
        """Compare the gradients of these modules' factors with autograd of the reference.

        Args:
            extra: further tensors to differentiate for.

        Returns:
            The outputs of the reference, and all gradients by autograd.
        """
        lora = self.step.lora
        factors = {name: factor for name, factor in lora.named_tensors() if name.rpartition(".")[0] in names}
        y, gradients = _differentiate(forward, factors | extra, lora, self.step.dropout_seed)
        for name in factors:
            self._compare(name, lora.gradient(name), gradients[name])
        return y, gradients

    def _compare(self, name: str, by_hand: Tensor, by_autograd: Tensor) -> None:
        self._errors[name] = relative_error(by_hand, by_autograd)

    def _summary(self) -> Iterator[Result]:
        """Iterate over the largest error of each kind of module, adapter gradients first."""
        kinds: dict[str, list[str]] = {}
        for name in (*self.step.lora.slots, "d_x"):
            kinds.setdefault(name.rpartition(".")[2], [])
        heads = [name for name in self._errors if name in self.step.lora.full_tensors]
        for name in self._errors.keys() - heads:
            kinds["d_x" if name.startswith("d_x") else name.split(".")[-2]].append(name)
        for kind, names in {**kinds, **({_OF_HEAD: heads} if heads else {})}.items():
            worst = max(names, key=lambda name: (math.isnan(self._errors[name]), self._errors[name]))
            what = f"{len(names)} × {kind}"
            if kind not in ("d_x", _OF_HEAD):
                what = f"{len(names) // 2} × {kind}: d_lora_A, d_lora_B"
            yield statement(f"{what} = autograd's, float64", self._errors[worst], FLOAT64_BOUND, f"worst: {worst}")


def _differentiate(
    forward: Forward, tensors: Tensors, lora: LoRAParameters, dropout_seed: int | None
) -> tuple[Sequence[Tensor], Tensors]:
    """Return the outputs of a function and the gradients of these tensors by autograd, by name."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    slots = {name: slot for name, slot in lora.slots.items() if f"{name}.lora_A" in leaves}
    with torch.enable_grad():
        y, d_y = forward(ReferenceAdapter(slots, leaves, dropout_seed))
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), d_y), strict=True))

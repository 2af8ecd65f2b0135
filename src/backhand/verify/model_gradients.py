"""Every adapter gradient of the engine on a user's own model and rows, against autograd on the same weights.

The proof goes block by block, so that only one block's weights stand in float64 at a time, however large the model:

- forward, by the engine's own blocks in float64, keeping each block's input x₀;
- at the head: loss and ∂L/∂x by hand, against autograd of the reference head;
- from the top block down: given ∂L/∂x₂, ∂L/∂x₀ and the block's adapter gradients by hand, against autograd of the
  reference block on the same x₀ and ∂L/∂x₂.

By the chain rule that proves the whole gradient, to about 1e-14. Then the engine's training step itself, in the dtype
that training uses, is held against this float64 gradient, beside autograd's own error in that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.block import BlockContext, block_backward, block_forward
from backhand.nn.block_adapter import block_adapter
from backhand.nn.decoder import HEAD, Decoder
from backhand.nn.decoder_weights import BlockWeights, DecoderWeights, named_views
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.rotary_frequencies import inverse_frequencies
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward
from backhand.ops.rms_norm import rms_norm_backward, rms_norm_forward
from backhand.ops.rotary import rotary_table
from backhand.train.proofs import ProofKind
from backhand.verify.case import Tensors
from backhand.verify.measure import relative_error
from backhand.verify.reference_decoder import ReferenceAdapter, reference_block, reference_head, reference_loss

# What every gradient stays below in float64, and the rule for lower precision.
FLOAT64_BOUND = 1e-9
TIMES_AUTOGRAD = 2.0
UNITS_OF_ROUNDING = 4.0


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
        exact: the adapter's gradient by hand in float64, filled by `by_block`.
        rounding_bound: what the compute dtype may cost, set by `training_step`.
    """

    def __init__(self, decoder: Decoder, batch: PackedBatch, dropout_seed: int | None) -> None:
        if decoder.lora is None:
            raise ValueError("there is no adapter to prove: attach one first")
        self.decoder = decoder
        self.batch = batch
        self.dropout_seed = dropout_seed
        self.lora = decoder.lora
        self.loss_scaling = 1.0 / max(batch.supervised_tokens, 1)
        self.exact = LoRAParameters(self.lora.slots.values(), device=decoder.device, dtype=torch.float64)
        for name in self.lora.slots:
            self.exact.lora_A(name).copy_(self.lora.compute_A(name))
            self.exact.lora_B(name).copy_(self.lora.compute_B(name))
        self.rounding_bound = math.nan
        self._errors: dict[str, float] = {}

    def by_block(self) -> Iterator[ModelProof]:
        """float64: the loss, then one proof for each kind of module over all layers, and for what blocks pass down."""
        self.exact.gradients.zero_()
        inputs = self.forward(self.dropout_seed, self.batch.supervised_positions)
        d_x, loss_error = self._prove_head(inputs.pop())
        yield ModelProof("loss = reference, float64", loss_error, FLOAT64_BOUND)
        for layer in reversed(range(len(self.decoder.config.layers))):
            d_x = self._prove_block(layer, inputs.pop(), d_x)
        yield from self._summary()

    def training_step(self) -> ModelProof:
        """The engine's own step in the compute dtype: its whole gradient against float64, beside autograd's error."""
        lora, dtype = self.lora, self.decoder.dtype
        lora.gradients.zero_()
        self.decoder.loss_and_gradients(self.batch, self.loss_scaling, self.dropout_seed)
        truth = self.exact.gradients
        own = relative_error(self._by_autograd(), truth)
        self.rounding_bound = max(TIMES_AUTOGRAD * own, UNITS_OF_ROUNDING * torch.finfo(dtype).eps)
        return ModelProof(
            f"a training step's gradient in {str(dtype).removeprefix('torch.')} = float64's",
            relative_error(lora.gradients, truth),
            self.rounding_bound,
            f"autograd's own error: {own:.1e}",
        )

    def _by_autograd(self) -> Tensor:
        """The flat gradient by autograd of the reference in the compute dtype, in the order of the flat buffer."""
        leaves = {}
        for name in self.lora.slots:
            leaves[f"{name}.lora_A"] = self.lora.compute_A(name).clone().requires_grad_()
            leaves[f"{name}.lora_B"] = self.lora.compute_B(name).clone().requires_grad_()
        views = dict(named_views(self.decoder.weights, self.decoder.config))
        adapter = ReferenceAdapter(self.lora.slots, leaves, self.dropout_seed)
        with torch.enable_grad():
            loss = self.loss_scaling * reference_loss(views, self.decoder.config, self.batch, adapter)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        return torch.cat([gradient.double().reshape(-1) for gradient in gradients])

    @torch.no_grad()
    def forward(self, dropout_seed: int | None, rows: Tensor | None = None) -> list[Tensor]:
        """x₀ of every block and the last block's output, or these rows of it, float64."""
        # Whatever embedding does in the compute dtype is part of the function.
        inputs = [self.decoder.embed(self.batch.input_ids).double()]
        for layer in range(len(self.decoder.config.layers)):
            adapter = block_adapter(self.exact, layer, dropout_seed)
            context = self.context(layer, rows)
            x, _ = block_forward(inputs[-1], self.block_weights(layer), adapter, context, "block")
            inputs.append(x)
        return inputs

    def _prove_head(self, x: Tensor) -> tuple[Tensor, float]:
        """∂L/∂x of the last block's output by hand, both at the supervised positions, and the loss's relative error."""
        config, weights = self.decoder.config, self.decoder.weights
        labels = self.batch.labels[self.batch.supervised_positions]
        norm_weight, head = weights.final_norm.double(), weights.head.double()
        factors = self.decoder.head_factors(self.dropout_seed)
        if factors is not None:
            factors = factors._replace(lora_A=self.exact.lora_A(HEAD), lora_B=self.exact.lora_B(HEAD))
        with torch.no_grad():
            normed, norm = rms_norm_forward(x, norm_weight, config.norm_eps, config.norm_offset)
            losses, grads = linear_cross_entropy_backward(normed, head, labels, factors, self.loss_scaling)
            d_x = rms_norm_backward(grads.d_x, norm, weight_gradient=False).d_x
        leaves = self._leaves([HEAD] if HEAD in self.exact else []) | {"x": x.clone().requires_grad_()}
        reference_weights = {
            "model.norm.weight": norm_weight,
            "model.embed_tokens.weight": head,
            "lm_head.weight": head,
        }
        with torch.enable_grad():
            loss = reference_head(leaves["x"], reference_weights, config, labels, self._adapter(leaves))
        by_autograd = self._gradients(self.loss_scaling * loss, torch.ones_like(loss), leaves)
        self._compare("d_x of the head", d_x, by_autograd["x"])
        if grads.d_lora_A is not None and grads.d_lora_B is not None:
            self.exact.d_lora_A(HEAD).copy_(grads.d_lora_A)
            self.exact.d_lora_B(HEAD).copy_(grads.d_lora_B)
        self._compare_factors([HEAD] if HEAD in self.exact else [], by_autograd)
        return d_x, relative_error(losses.sum(), loss.detach())

    def _prove_block(self, layer: int, x0: Tensor, d_x2: Tensor) -> Tensor:
        """∂L/∂x₀ of the block by hand; it and the block's adapter gradients are compared."""
        weights, context = self.block_weights(layer), self.context(layer, self.batch.supervised_positions)
        adapter = block_adapter(self.exact, layer, self.dropout_seed)
        with torch.no_grad():
            _, saved = block_forward(x0, weights, adapter, context, "none")
            d_x0 = block_backward(d_x2.clone(), saved, weights, adapter, context, self.exact)
        assert d_x0 is not None
        del saved
        names = [name for name in self.exact.slots if name.startswith(f"model.layers.{layer}.")]
        leaves = self._leaves(names) | {"x": x0.clone().requires_grad_()}
        reference_weights = self.named_weights(layer, weights)
        wanted = None if context.rows is None else self.batch.labels != IGNORE_INDEX
        with torch.enable_grad():
            x2 = reference_block(
                leaves["x"],
                layer,
                reference_weights,
                self.decoder.config,
                self.batch.document_lengths,
                self._adapter(leaves),
                wanted,
            )
            x2 = x2 if wanted is None else x2[wanted]
        by_autograd = self._gradients(x2, d_x2, leaves)
        self._compare(f"d_x0 of layer {layer}", d_x0, by_autograd["x"])
        self._compare_factors(names, by_autograd)
        return d_x0

    def _adapter(self, leaves: Tensors) -> ReferenceAdapter:
        slots = {name: slot for name, slot in self.exact.slots.items() if f"{name}.lora_A" in leaves}
        return ReferenceAdapter(slots, leaves, self.dropout_seed)

    def _leaves(self, names: list[str]) -> Tensors:
        leaves: Tensors = {}
        for name in names:
            leaves[f"{name}.lora_A"] = self.exact.lora_A(name).clone().requires_grad_()
            leaves[f"{name}.lora_B"] = self.exact.lora_B(name).clone().requires_grad_()
        return leaves

    @staticmethod
    def _gradients(y: Tensor, d_y: Tensor, leaves: Tensors) -> Tensors:
        found = torch.autograd.grad(y, list(leaves.values()), d_y)
        return dict(zip(leaves, found, strict=True))

    def _compare(self, name: str, by_hand: Tensor, by_autograd: Tensor) -> None:
        self._errors[name] = relative_error(by_hand, by_autograd)

    def _compare_factors(self, names: list[str], by_autograd: Mapping[str, Tensor]) -> None:
        for name in names:
            self._compare(f"{name}.lora_A", self.exact.d_lora_A(name), by_autograd[f"{name}.lora_A"])
            self._compare(f"{name}.lora_B", self.exact.d_lora_B(name), by_autograd[f"{name}.lora_B"])

    def _summary(self) -> Iterator[ModelProof]:
        """The largest error of each kind of module, adapter gradients first."""
        kinds: dict[str, list[str]] = {}
        for name in (*self.exact.slots, "d_x"):
            kinds.setdefault(name.rpartition(".")[2], [])
        for name in self._errors:
            kinds["d_x" if name.startswith("d_x") else name.split(".")[-2]].append(name)
        for kind, names in kinds.items():
            worst = max(names, key=lambda name: (math.isnan(self._errors[name]), self._errors[name]))
            what = f"{len(names)} × d_x" if kind == "d_x" else f"{len(names) // 2} × {kind}: d_lora_A, d_lora_B"
            yield ModelProof(f"{what} = autograd's, float64", self._errors[worst], FLOAT64_BOUND, f"worst: {worst}")

    def block_weights(self, layer: int) -> BlockWeights:
        """A copy of the block's weights in float64."""
        block = self.decoder.weights.blocks[layer]
        parts = {part.name: getattr(block, part.name) for part in fields(BlockWeights)}
        return replace(
            block, **{name: part.to(torch.float64, copy=True) for name, part in parts.items() if part is not None}
        )

    def named_weights(self, layer: int, block: BlockWeights) -> Tensors:
        """One block's tensors by their Hugging Face names."""
        config, weights = self.decoder.config, self.decoder.weights
        alone = replace(config, layers=(config.layers[layer],))
        views = named_views(DecoderWeights(weights.embedding, [block], weights.final_norm, weights.head), alone)
        first = "model.layers.0."
        return {
            f"model.layers.{layer}.{name.removeprefix(first)}": view for name, view in views if name.startswith(first)
        }

    def context(self, layer: int, rows: Tensor | None = None) -> BlockContext:
        """The block's, of whose last one only these rows are wanted, None for all."""
        config = self.decoder.config
        rotary = config.rotary[config.layers[layer].rotary]
        frequencies = inverse_frequencies(rotary, config.head_dim, self.decoder.device).double()
        table = rotary_table(self.batch.positions, frequencies)
        wanted = rows if layer == len(config.layers) - 1 else None
        return BlockContext(config, config.layers[layer].window, table, self.batch.runs, wanted)

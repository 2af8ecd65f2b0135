"""The engine's training step in float64, by hand, with only one block's weights in float64 at a time.

A model of any size is differentiated so, block after block, with the engine's own blocks: forward keeps each block's
input x₀; at the head the loss gives ∂L/∂x; from the top block down ∂L/∂x₂ becomes ∂L/∂x₀ and the block's adapter
gradients.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from backhand.nn.attention_half import BlockContext
from backhand.nn.batch import PackedBatch
from backhand.nn.block import block_backward, block_forward
from backhand.nn.block_adapter import block_adapter
from backhand.nn.decoder import HEAD, Decoder
from backhand.nn.decoder_weights import BlockWeights, DecoderWeights, named_views
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.rotary_frequencies import inverse_frequencies
from backhand.nn.scratch import Scratch
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward
from backhand.ops.rms_norm import rms_norm_backward, rms_norm_forward
from backhand.ops.rotary import rotary_table
from backhand.verify.case import Tensors


class BlockwiseStep:
    """One training step of a decoder with its attached adapter, in float64.

    Args:
        decoder: with an adapter of nothing but factors.
        batch: the packed documents, on the decoder's device.
        dropout_seed: draws the masks; None for no dropout.
        loss_scaling: the factor of the summed loss.

    Attributes:
        lora: the adapter's values as the decoder computes with them, and their gradients.
    """

    def __init__(self, decoder: Decoder, batch: PackedBatch, dropout_seed: int | None, loss_scaling: float) -> None:
        if decoder.lora is None:
            raise ValueError("there is no adapter to prove: attach one first")
        self.decoder = decoder
        self.batch = batch
        self.dropout_seed = dropout_seed
        self.loss_scaling = loss_scaling
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
        return self.lora.gradients

    @torch.no_grad()
    def forward(self, dropout_seed: int | None, rows: Tensor | None = None) -> list[Tensor]:
        """x₀ of every block and the last block's output, or these rows of it."""
        # Whatever embedding does in the compute dtype is part of the function.
        inputs = [self.decoder.embed(self.batch.input_ids).double()]
        for layer in self.layers:
            adapter = block_adapter(self.lora, layer, dropout_seed)
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
        losses, grads = linear_cross_entropy_backward(normed, weights.head.double(), labels, factors, self.loss_scaling)
        if grads.d_lora_A is not None and grads.d_lora_B is not None:
            self.lora.d_lora_A(HEAD).copy_(grads.d_lora_A)
            self.lora.d_lora_B(HEAD).copy_(grads.d_lora_B)
        return rms_norm_backward(grads.d_x, norm, weight_gradient=False).d_x, losses

    @torch.no_grad()
    def block(self, layer: int, x0: Tensor, d_x2: Tensor) -> Tensor:
        """∂L/∂x₀ of the block; its adapter gradients are added to the buffer."""
        weights, context = self.block_weights(layer), self.context(layer, self.batch.supervised_positions)
        adapter = block_adapter(self.lora, layer, self.dropout_seed)
        _, saved = block_forward(x0, weights, adapter, context, "none")
        d_x0 = block_backward(d_x2.clone(), saved, weights, adapter, context, self.lora)
        assert d_x0 is not None
        return d_x0

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
        return BlockContext(
            config,
            config.layers[layer].window,
            table,
            self.batch.runs,
            Scratch(),
            wanted,
            self.batch.shared_prefix,
        )

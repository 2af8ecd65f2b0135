"""The decoder's frozen weights, stacked for few large products, and their Hugging Face names.

Projections that share an input are stacked in one matrix: q, k and v (q + 2k, hidden), and gate and up (2f, hidden).
`DecoderConfig.mixers` lists the parts of each mixer. The function `named_views` returns every tensor under its Hugging
Face name as a view into the stacks. Loading, digests and merging use it. Matrices are dense or quantized
(`ops.frozen_matrix`). Norms and biases are always tensors in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.nn.decoder.adapted_group import HEAD
from backhand.nn.decoder.class_head_weights import load_class_head
from backhand.nn.decoder.encoder_inputs import InputWeights
from backhand.nn.families.family import (
    EXPERT_GROUPS,
    LAYER_SCALAR,
    PER_LAYER_GROUPS,
    PER_LAYER_MODEL,
    PER_LAYER_MODEL_NORM,
    PER_LAYER_NORM,
    PER_LAYER_TABLE,
    DecoderConfig,
    LayerConfig,
)
from backhand.nn.loading.expert_tensors import expert_slices
from backhand.nn.loading.source import ModelSource, check_shapes, fill
from backhand.nn.module_shapes import ModuleShapes
from backhand.ops.weight_tiles import FrozenMatrix, frozen_split


@dataclass
class BlockWeights:
    """Weights of one decoder block. A tensor is None if the family or the layer's mixer does not have it.

    With q = heads · head_dim, k = key/value heads · head_dim and f = intermediate size, the shapes are:

    - input (Σ sizes, hidden), which is (q + 2k, hidden) for attention
    - output (hidden, width), which is (hidden, q) for attention; second_output (hidden, width) next to it
    - gate_up (2f, hidden) and down (hidden, f); None in blocks without an MLP sublayer
    - norms and their biases (hidden,); q_norm and k_norm (head_dim,), or (q,) and (k,) for norms over all heads
    - sinks (heads,) of attention with sinks
    - conv (hidden, 1, taps) and conv_bias (hidden,) of a short convolution
    - conv (channels, 1, taps), log_rate and rate_bias (value heads,), gated_norm (value width,) of a gated delta rule
    - conv (channels, 1, taps), conv_bias (channels,), log_rate, rate_bias and skip (heads,), gated_norm (width,) of a
      state-space mixer
    - router (experts, hidden) and router_bias (experts,) of a layer of experts, whose matrices are stacked in gate_up
      (experts · 2f, hidden) and down (experts · hidden, f), and their biases likewise. If the layer also has an MLP,
      they are in experts_gate_up and experts_down
    - per_layer_gate (p, hidden), per_layer_projection (hidden, p) and per_layer_norm (hidden,) of per-layer embeddings
      with p features
    - layer_scalar (1,)
    """

    input: FrozenMatrix
    output: FrozenMatrix
    gate_up: FrozenMatrix | None = None
    down: FrozenMatrix | None = None
    second_output: FrozenMatrix | None = None
    attention_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    input_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    after_attention_norm: Tensor | None = None
    after_mlp_norm: Tensor | None = None
    attention_norm_bias: Tensor | None = None
    mlp_norm_bias: Tensor | None = None
    after_attention_norm_bias: Tensor | None = None
    after_mlp_norm_bias: Tensor | None = None
    conv: Tensor | None = None
    conv_bias: Tensor | None = None
    log_rate: Tensor | None = None
    rate_bias: Tensor | None = None
    gated_norm: Tensor | None = None
    skip: Tensor | None = None
    router: Tensor | None = None
    router_bias: Tensor | None = None
    experts_gate_up: FrozenMatrix | None = None
    experts_down: FrozenMatrix | None = None
    sinks: Tensor | None = None
    per_layer_gate: FrozenMatrix | None = None
    per_layer_projection: FrozenMatrix | None = None
    per_layer_norm: Tensor | None = None
    layer_scalar: Tensor | None = None


class PerLayerWeights(NamedTuple):
    """Weights of per-layer embeddings: embedding (vocab, L p), projection (L p, hidden), norm (p,)."""

    embedding: FrozenMatrix
    projection: FrozenMatrix
    norm: Tensor


@dataclass
class DecoderWeights:
    """All frozen weights: embedding (vocab, hidden), blocks, final_norm (hidden,), head (vocab, hidden).

    A tied head is the embedding itself, and so is the unused head of an encoder. Parts that a family does not have are
    None. inputs belongs to encoders. class_head contains what the files have of a head for classification.
    """

    embedding: FrozenMatrix
    blocks: list[BlockWeights]
    final_norm: Tensor | None
    head: FrozenMatrix
    per_layer: PerLayerWeights | None = None
    final_norm_bias: Tensor | None = None
    inputs: InputWeights | None = None
    class_head: Mapping[str, Tensor] = field(default_factory=dict)


class Part(NamedTuple):
    """A field of `BlockWeights` and the tensors that are stacked in it."""

    field: str
    names: tuple[str, ...]  # their Hugging Face names inside the block, such as `self_attn.q_proj.weight`
    rows: Sequence[int]  # rows of each tensor
    columns: tuple[int, ...]  # their other axes
    multiplies: bool = False  # weight of linear modules, which may be quantized
    trainable: bool = True  # an adapter can train its tensors in full


def block_parts(config: DecoderConfig, layer: LayerConfig) -> list[Part]:
    """Return the parts of a block."""
    sized, per_layer, hidden = config.at(layer), config.per_layer, config.hidden_size
    mixer, mixture = sized.mixers[layer.mixer], config.mixture if layer.experts else None
    parts: list[Part] = []

    def group(field: str, modules: Sequence[str], outputs: Sequence[int], inputs: int, bias: bool = False) -> None:
        trainable = mixture is None or field not in expert_fields(config)
        parts.append(Part(field, tuple(f"{one}.weight" for one in modules), outputs, (inputs,), True, trainable))
        if bias:
            names = tuple(f"{one}.bias" for one in modules)
            parts.append(Part(f"{field}_bias", names, outputs, (), trainable=trainable))

    def alone(field: str, name: str, *shape: int, trainable: bool = True) -> None:
        parts.append(Part(field, (name,), shape[:1], shape[1:], trainable=trainable))

    group("input", mixer.groups[0], mixer.sizes, hidden, mixer.biases[0])
    group("output", mixer.groups[1], [hidden], mixer.width - mixer.second_width, mixer.biases[1])
    if mixer.second:
        group("second_output", mixer.second, [hidden], mixer.second_width)
    if config.has_mlp and config.has_mlp_in(layer):
        group("gate_up", config.groups[2], sized.gate_up_sizes, hidden, config.mlp_bias)
        group("down", config.groups[3], [hidden], sized.intermediate_size, config.mlp_bias)
    if mixture is not None:
        (gate_up,), (down,) = EXPERT_GROUPS
        for field, parameter, rows, inputs in zip(
            expert_fields(config),
            (gate_up, down),
            (2 * mixture.width, hidden),
            (hidden, mixture.width),
            strict=True,
        ):
            modules = dict(expert_slices(parameter, mixture.experts, rows))
            outputs = [piece.rows.stop - piece.rows.start for piece in modules.values()]
            group(field, tuple(modules), outputs, inputs, mixture.bias)
    if per_layer is not None:
        gate, projection = PER_LAYER_GROUPS
        group("per_layer_gate", gate, [per_layer.width], hidden)
        group("per_layer_projection", projection, [hidden], per_layer.width)
    for field, (name, shape) in mixer.norms.items():
        alone(field, name, *shape)
    for field, (name, shape) in mixer.frozen.items():
        alone(field, name, *shape, trainable=False)
    places = "attention_norm", "after_attention_norm", "mlp_norm", "after_mlp_norm"
    for field, norm in zip(places, config.norms, strict=True):
        if norm is not None and (layer.input_norm or field != "attention_norm"):
            alone(field, f"{norm}.weight", hidden, trainable=config.norm == "rms")
            if config.norm_bias:
                alone(f"{field}_bias", f"{norm}.bias", hidden, trainable=False)
    if mixture is not None:
        alone("router", f"{mixture.router}.weight", mixture.experts, hidden, trainable=False)
        if mixture.bias:
            alone("router_bias", f"{mixture.router}.bias", mixture.experts, trainable=False)
    if per_layer is not None:
        alone("per_layer_norm", f"{PER_LAYER_NORM}.weight", hidden)
    if config.layer_scalar:
        alone("layer_scalar", LAYER_SCALAR, 1, trainable=False)
    return parts


def expert_fields(config: DecoderConfig) -> tuple[str, str]:
    """Return the fields of `BlockWeights` with the matrices of the experts."""
    apart = config.mixture is not None and config.mixture.with_mlp
    return ("experts_gate_up", "experts_down") if apart else ("gate_up", "down")


def empty_weights(
    config: DecoderConfig, dtype: torch.dtype, device: torch.device | str = "cpu", stored: ModelSource | None = None
) -> DecoderWeights:
    """Allocate uninitialized weights. With `stored`, matrices are those of the source, without a copy."""
    hidden, ple = config.hidden_size, config.per_layer

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def matrix(names: Sequence[str], *shape: int) -> FrozenMatrix:
        if stored is None:
            return new(*shape)
        parts = [part for name in names for part in stored.stored_parts(f"{name}.weight")]
        return QuantizedMatrix(parts, dtype, device)

    def block(index: int, layer: LayerConfig) -> BlockWeights:
        tensors: dict[str, Any] = {}
        for part in block_parts(config, layer):
            shape = (sum(part.rows), *part.columns)
            modules = [f"{config.block_path(index)}.{name.removesuffix('.weight')}" for name in part.names]
            tensors[part.field] = matrix(modules, *shape) if part.multiplies else new(*shape)
        return BlockWeights(**tensors)

    embedding = matrix([config.embedding], config.vocab_size, hidden)
    has_own_head = config.has_head and not config.tied_head
    head = matrix([HEAD], config.vocab_size, hidden) if has_own_head else embedding
    per_layer = None
    if ple is not None:
        features = ple.layers * ple.width
        table = matrix([PER_LAYER_TABLE], ple.vocab_size, features)
        per_layer = PerLayerWeights(table, matrix([PER_LAYER_MODEL], features, hidden), new(ple.width))
    blocks = [block(index, layer) for index, layer in enumerate(config.layers)]
    final_norm = None if config.final_norm is None else new(hidden)
    bias = new(hidden) if config.norm_bias and final_norm is not None else None
    inputs = None
    if (names := config.inputs) is not None:
        inputs = InputWeights(
            new(hidden),
            new(hidden) if config.norm_bias else None,
            None if names.positions is None else new(config.max_position_embeddings, hidden),
            None if names.token_types is None else new(names.types, hidden),
        )
    return DecoderWeights(embedding, blocks, final_norm, head, per_layer, bias, inputs)


def named_views(weights: DecoderWeights, config: DecoderConfig) -> Iterator[tuple[str, FrozenMatrix]]:
    """Yield (Hugging Face name, view or quantized matrix) of all weights. A tied head appears once, as embedding."""
    yield f"{config.embedding}.weight", weights.embedding
    yield from _input_views(weights, config)
    for index, block in enumerate(weights.blocks):
        for part in block_parts(config, config.layers[index]):
            for name, view in part_views(block, part):
                yield f"{config.block_path(index)}.{name}", view
    if weights.final_norm is not None:
        yield f"{config.final_norm}.weight", weights.final_norm
    if weights.final_norm_bias is not None:
        yield f"{config.final_norm}.bias", weights.final_norm_bias
    if weights.per_layer is not None:
        for name, view in zip(_PER_LAYER_NAMES, weights.per_layer, strict=True):
            yield f"{name}.weight", view
    if config.has_head and not config.tied_head:
        yield f"{HEAD}.weight", weights.head


def _input_views(weights: DecoderWeights, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of what an encoder has before its first block. These tensors stay frozen."""
    names, tensors = config.inputs, weights.inputs
    if names is None or tensors is None:
        return
    for name, tensor in (
        (f"{names.norm}.weight", tensors.norm),
        (f"{names.norm}.bias", tensors.norm_bias),
        (f"{names.positions}.weight", tensors.positions),
        (f"{names.token_types}.weight", tensors.token_types),
    ):
        if tensor is not None:
            yield name, tensor


def part_views(block: BlockWeights, part: Part) -> Iterator[tuple[str, FrozenMatrix]]:
    """Return the tensors of a part by name, as views into the stack."""
    stack: FrozenMatrix = getattr(block, part.field)
    views = (stack,) if len(part.names) == 1 else frozen_split(stack, part.rows)
    return zip(part.names, views, strict=True)


_PER_LAYER_NAMES = (PER_LAYER_TABLE, PER_LAYER_MODEL, PER_LAYER_MODEL_NORM)


def dense_views(weights: DecoderWeights, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Return the items of `named_views` that are tensors. Of a quantized decoder these are the norms and biases."""
    return ((name, view) for name, view in named_views(weights, config) if isinstance(view, Tensor))


def load_weights(
    source: ModelSource,
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    quantized: bool = False,
    examine: Callable[[Sequence[str]], None] | None = None,
) -> DecoderWeights:
    """Read every tensor of the source once, directly into its stack in the compute dtype.

    Args:
        quantized: keep the matrices as stored, and memory-mapped if the source maps them. Norms and biases are read.
        examine: see `fill`.

    Raises:
        ArtifactError: lists every tensor that is missing or has another shape.
    """
    # Checked before memory is allocated, so that a corrupted size gives an error about a tensor.
    expected = named_views(empty_weights(config, dtype, "meta"), config)
    check_shapes(source, {name: tuple(view.shape) for name, view in expected})
    weights = empty_weights(config, dtype, device, source if quantized else None)
    fill(source, dense_views(weights, config), examine)
    return replace(weights, class_head=load_class_head(source, config, dtype, device))


def linear_parts(block: BlockWeights, config: DecoderConfig, layer: int) -> dict[str, FrozenMatrix]:
    """Return the weight of each linear module of a block, (out, in), keyed by its name inside the block.

    Such a name is `self_attn.q_proj`. A parameter of experts, such as `mlp.experts.down_proj`, is the stack of their
    matrices, (experts · out, in).
    """
    parts = {
        name.removesuffix(".weight"): view
        for part in block_parts(config, config.layers[layer])
        if part.multiplies
        for name, view in part_views(block, part)
    }
    if not config.has_mlp_in(config.layers[layer]):
        (gate_up,), (down,) = EXPERT_GROUPS
        parts |= {gate_up: mlp_matrix(block.gate_up), down: mlp_matrix(block.down)}
    return parts


def mlp_matrix(stack: FrozenMatrix | None) -> FrozenMatrix:
    """Return a matrix of the MLP sublayer of a block that has one."""
    if stack is None:
        raise ValueError("the block has no MLP sublayer")
    return stack


def module_shapes(config: DecoderConfig, labels: int = 0) -> ModuleShapes:
    """Return (out, in) of every linear module by dotted path, in forward order, and the other trainable tensors.

    If some layers have experts, the MLPs of the others are left out. PEFT would take their module names for the
    experts', and could not read an adapter of both. Routers stay frozen.

    Args:
        labels: number of outputs of a classification head, whose parameters are then trainable; 0 for no head.
    """
    hidden, mixture, per_layer = config.hidden_size, config.mixture, config.per_layer
    shapes: dict[str, tuple[int, int]] = {}
    experts: dict[str, tuple[int, int, int]] = {}
    weights = empty_weights(config, torch.float32, "meta")
    fixed = [] if per_layer is None else [f"{name}.weight" for name in _PER_LAYER_NAMES]
    fixed += [name for name, _ in _input_views(weights, config)]
    fixed += [f"{config.final_norm}.{part}" for part in ("weight", "bias") if config.norm != "rms"]
    if per_layer is not None:
        shapes[PER_LAYER_MODEL] = (per_layer.layers * per_layer.width, hidden)
    for index, layer in enumerate(config.layers):
        prefix = f"{config.block_path(index)}."
        for part in block_parts(config, layer):
            of_experts = mixture is not None and part.field in expert_fields(config)
            if part.multiplies and not of_experts:
                for name, size in zip(part.names, part.rows, strict=True):
                    shapes[prefix + name.removesuffix(".weight")] = (size, part.columns[0])
            fixed += [] if part.trainable else [prefix + name for name in part.names]
        if mixture is not None and not config.has_mlp_in(layer):
            (gate_up,), (down,) = EXPERT_GROUPS
            experts[prefix + gate_up] = (mixture.experts, 2 * mixture.width, hidden)
            experts[prefix + down] = (mixture.experts, hidden, mixture.width)
    views, held = named_views(weights, config), set(fixed)
    parameters = {name: tuple(view.shape) for name, view in views if name not in held}
    if config.has_head:
        shapes[HEAD] = (config.vocab_size, hidden)
        parameters.setdefault(f"{HEAD}.weight", shapes[HEAD])
    parameters |= config.class_head.shapes(hidden, labels) if labels else {}
    return ModuleShapes(
        shapes,
        embeddings={config.embedding: (config.vocab_size, hidden)},
        parameters=parameters,
        tied={f"{HEAD}.weight": f"{config.embedding}.weight"} if config.has_head and config.tied_head else {},
        frozen=fixed,
        experts=experts,
        interleaved=[name for name in experts if mixture and mixture.interleaved and name.endswith(EXPERT_GROUPS[0])],
        outside=config.outside,
        class_head=(config.class_head, hidden),
    )

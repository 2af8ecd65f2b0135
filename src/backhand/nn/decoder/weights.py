"""The decoder's frozen weights, stacked for few large products, and their Hugging Face names.

Projections that share an input lie in one matrix: with attention q, k and v (q + 2k, hidden), and gate_up (2f, hidden).
What a layer's mixer consists of says `DecoderConfig.mixers`. `named_views` gives
every tensor its Hugging Face name as a view into these, for loading, digests and merging alike. Matrices are dense or
quantized (`ops.frozen_matrix`); norms and biases are always tensors in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.nn.decoder.adapted_group import EMBEDDING
from backhand.nn.decoder.family import (
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
from backhand.nn.loading.expert_tensors import expert_of, matrices_of
from backhand.nn.loading.source import ModelSource, check_shapes, fill
from backhand.nn.lora_parameters import TOKENS, LoRAParameters
from backhand.nn.module_shapes import ModuleShapes
from backhand.ops.weight_tiles import FrozenMatrix, frozen_dense, frozen_split


@dataclass
class BlockWeights:
    """One decoder block; biases and norms are None where the family has none, and other mixers' tensors.

    Shapes: input (Σ sizes, hidden), with attention (q + 2k, hidden), output (hidden, width), with attention
    (hidden, q), gate_up (2f, hidden), down (hidden, f); norms (hidden,), q_norm and k_norm (head_dim,), or (q,) and
    (k,) where they go over all heads; q = heads · head_dim, k = key/value heads · head_dim, f = intermediate size.
    Of a short convolution: conv (hidden, 1, taps), conv_bias (hidden,). Of a gated delta rule: conv
    (channels, 1, taps), log_rate and rate_bias (value heads,), delta_norm (value width,). Of a layer of experts: router
    (experts, hidden), router_bias (experts,), and all of their matrices below one another in gate_up
    (experts · 2f, hidden), down (experts · hidden, f), their biases likewise. Of attention with sinks: sinks (heads,).
    Of a per-layer input of p features: per_layer_gate (p, hidden), per_layer_projection (hidden, p), per_layer_norm
    (hidden,); layer_scalar (1,).
    """

    input: FrozenMatrix
    output: FrozenMatrix
    gate_up: FrozenMatrix
    down: FrozenMatrix
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
    conv: Tensor | None = None
    conv_bias: Tensor | None = None
    log_rate: Tensor | None = None
    rate_bias: Tensor | None = None
    delta_norm: Tensor | None = None
    router: Tensor | None = None
    router_bias: Tensor | None = None
    sinks: Tensor | None = None
    per_layer_gate: FrozenMatrix | None = None
    per_layer_projection: FrozenMatrix | None = None
    per_layer_norm: Tensor | None = None
    layer_scalar: Tensor | None = None


class PerLayerWeights(NamedTuple):
    """Of the inputs of L layers, p features each: embedding (vocab, L p), projection (L p, hidden), norm (p,)."""

    embedding: FrozenMatrix
    projection: FrozenMatrix
    norm: Tensor


@dataclass
class DecoderWeights:
    """All frozen weights: embedding (vocab, hidden), blocks, final_norm (hidden,), head (vocab, hidden).

    A tied head is the embedding itself. per_layer is there in families whose layers have inputs of their own.
    """

    embedding: FrozenMatrix
    blocks: list[BlockWeights]
    final_norm: Tensor
    head: FrozenMatrix
    per_layer: PerLayerWeights | None = None


def empty_weights(config: DecoderConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> DecoderWeights:
    """Unfilled buffers of the right shapes."""
    hidden, norms, own = config.hidden_size, config.norms, config.per_layer

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def block(layer: LayerConfig) -> BlockWeights:
        mixer = config.at(layer).mixers[layer.mixer]
        inputs, (input_bias, output_bias) = sum(mixer.sizes), mixer.biases
        (_, _, gate_up), (_, _, down) = _mlp_stacks(config, layer)
        mixture = config.mixture if layer.experts else None
        mlp_bias = config.mlp_bias if mixture is None else mixture.bias
        return BlockWeights(
            input=new(inputs, hidden),
            output=new(hidden, mixer.width),
            gate_up=new(sum(gate_up), hidden),
            down=new(sum(down), _mlp_width(config, layer)),
            attention_norm=new(hidden) if norms.before_attention else None,
            mlp_norm=new(hidden) if norms.before_mlp else None,
            input_bias=new(inputs) if input_bias else None,
            output_bias=new(hidden) if output_bias else None,
            gate_up_bias=new(sum(gate_up)) if mlp_bias else None,
            down_bias=new(sum(down)) if mlp_bias else None,
            after_attention_norm=new(hidden) if norms.after_attention else None,
            after_mlp_norm=new(hidden) if norms.after_mlp else None,
            router=new(mixture.experts, hidden) if mixture else None,
            router_bias=new(mixture.experts) if mixture and mixture.bias else None,
            per_layer_gate=new(own.width, hidden) if own else None,
            per_layer_projection=new(hidden, own.width) if own else None,
            per_layer_norm=new(hidden) if own else None,
            layer_scalar=new(1) if config.layer_scalar else None,
            **{field: new(*shape) for field, (_, shape) in (mixer.norms | mixer.frozen).items()},
        )

    embedding = new(config.vocab_size, hidden)
    head = embedding if config.tied_head else new(config.vocab_size, hidden)
    per_layer = None
    if own is not None:
        features = own.layers * own.width
        per_layer = PerLayerWeights(new(own.vocab_size, features), new(features, hidden), new(own.width))
    return DecoderWeights(embedding, [block(layer) for layer in config.layers], new(hidden), head, per_layer)


def named_views(weights: DecoderWeights, config: DecoderConfig) -> Iterator[tuple[str, FrozenMatrix]]:
    """(Hugging Face name, view or quantized matrix) of all weights; a tied head appears once, as the embedding."""
    yield "model.embed_tokens.weight", weights.embedding
    for index, block in enumerate(weights.blocks):
        prefix = f"model.layers.{index}."
        layer = config.layers[index]
        for field, parts, sizes in _stacks(config, layer):
            for kind, suffix in _KINDS:
                stack = getattr(block, f"{field}{suffix}", None)
                if stack is not None:
                    for part, view in zip(parts, _members(stack, sizes), strict=True):
                        yield f"{prefix}{part}.{kind}", view
        for name, place in _singles(config, layer).items():
            yield prefix + name, getattr(block, place)
    yield f"{config.final_norm}.weight", weights.final_norm
    if weights.per_layer is not None:
        for name, view in zip(_PER_LAYER_NAMES, weights.per_layer, strict=True):
            yield f"{name}.weight", view
    if not config.tied_head:
        yield "lm_head.weight", weights.head


def _members(stack: FrozenMatrix, sizes: Sequence[int]) -> tuple[FrozenMatrix, ...]:
    """The parts of a stack; of one, itself."""
    return (stack,) if len(sizes) == 1 else frozen_split(stack, sizes)


_KINDS = (("weight", ""), ("bias", "_bias"))
_PER_LAYER_NAMES = (PER_LAYER_TABLE, PER_LAYER_MODEL, PER_LAYER_MODEL_NORM)


def _stacks(config: DecoderConfig, layer: LayerConfig) -> list[tuple[str, tuple[str, ...], list[int]]]:
    """Of each group: the field of `BlockWeights` that holds its matrices stacked, its modules, and their outputs."""
    mixer, hidden, own = config.at(layer).mixers[layer.mixer], [config.hidden_size], config.per_layer
    first, last = mixer.groups
    stacks = [("input", first, list(mixer.sizes)), ("output", last, hidden), *_mlp_stacks(config, layer)]
    if own is not None:
        gate, projection = PER_LAYER_GROUPS
        stacks += [("per_layer_gate", gate, [own.width]), ("per_layer_projection", projection, hidden)]
    return stacks


def _mlp_stacks(config: DecoderConfig, layer: LayerConfig) -> list[tuple[str, tuple[str, ...], list[int]]]:
    """The same of the MLP's groups, or of the experts: the linear modules of each, one expert's behind another's."""
    hidden, mixture = config.hidden_size, config.mixture
    if not layer.experts or mixture is None:
        sizes = list(config.at(layer).gate_up_sizes)
        return [("gate_up", config.groups[2], sizes), ("down", config.groups[3], [hidden])]
    (gate_up,), (down,) = EXPERT_GROUPS
    stacks = []
    for field, parameter, rows in (("gate_up", gate_up, 2 * mixture.width), ("down", down, hidden)):
        modules = dict(matrices_of(parameter, mixture.experts, rows))
        sizes = [piece.rows.stop - piece.rows.start for piece in modules.values()]
        stacks.append((field, tuple(modules), sizes))
    return stacks


def _mlp_width(config: DecoderConfig, layer: LayerConfig) -> int:
    """What gate and up make of the hidden size, each."""
    return config.mixture.width if layer.experts and config.mixture else config.at(layer).intermediate_size


def _singles(config: DecoderConfig, layer: LayerConfig, *, trained: bool = False) -> dict[str, str]:
    """The field of `BlockWeights` of each tensor that is in no stack, by its name; or of those that can be trained."""
    mixer = config.at(layer).mixers[layer.mixer]
    fields = ("attention_norm", "after_attention_norm", "mlp_norm", "after_mlp_norm")
    inside = mixer.norms if trained else mixer.norms | mixer.frozen
    behind: dict[str, str] = {}
    if layer.experts and config.mixture is not None and not trained:
        router = config.mixture.router
        behind = {f"{router}.weight": "router"} | ({f"{router}.bias": "router_bias"} if config.mixture.bias else {})
    behind |= {f"{PER_LAYER_NORM}.weight": "per_layer_norm"} if config.per_layer is not None else {}
    behind |= {LAYER_SCALAR: "layer_scalar"} if config.layer_scalar and not trained else {}
    return (
        {name: field for field, (name, _) in inside.items()}
        | {f"{name}.weight": field for name, field in zip(config.norms, fields, strict=True) if name is not None}
        | behind
    )


def dense_views(weights: DecoderWeights, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Those of `named_views` that are tensors: all of a dense decoder, norms and biases of a quantized one."""
    return ((name, view) for name, view in named_views(weights, config) if isinstance(view, Tensor))


def load_weights(
    source: ModelSource,
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    quantized: bool = False,
) -> DecoderWeights:
    """Read every tensor of the source once, straight into its place in the compute dtype.

    Args:
        quantized: leave the matrices as they are stored, mapped where the source maps them; norms and biases are read.

    Raises:
        ArtifactError: listing every tensor that is missing or of another shape.
    """
    # Before memory is asked for: a garbled size should be an error about a tensor, not about memory.
    wanted = named_views(empty_weights(config, dtype, "meta"), config)
    check_shapes(source, {name: tuple(view.shape) for name, view in wanted})
    weights = _stored_weights(source, config, dtype, device) if quantized else empty_weights(config, dtype, device)
    fill(source, dense_views(weights, config))
    return weights


def _stored_weights(
    source: ModelSource, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str
) -> DecoderWeights:
    """The matrices as they are stored, and unfilled norms and biases."""

    def matrix(prefix: str, *parts: str) -> QuantizedMatrix:
        return QuantizedMatrix([source.stored_rows(f"{prefix}{part}.weight") for part in parts], dtype, device)

    def vector(tensor: Tensor) -> Tensor:
        # empty_like of a meta tensor imports torch's Python references first: two seconds.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    empty = empty_weights(config, dtype, "meta")
    blocks = []
    for index, block in enumerate(empty.blocks):
        prefix = f"model.layers.{index}."
        there = {field.name: getattr(block, field.name) for field in fields(block)}
        stacks = _stacks(config, config.layers[index])
        matrices: dict[str, Any] = {field: matrix(prefix, *parts) for field, parts, _ in stacks}
        vectors: dict[str, Any] = {
            name: vector(tensor) for name, tensor in there.items() if tensor is not None and name not in matrices
        }
        blocks.append(replace(block, **vectors, **matrices))
    embedding = matrix("", EMBEDDING)
    head = embedding if config.tied_head else matrix("", "lm_head")
    per_layer = None
    if empty.per_layer is not None:
        table, projection = (matrix("", name) for name in (PER_LAYER_TABLE, PER_LAYER_MODEL))
        per_layer = PerLayerWeights(table, projection, vector(empty.per_layer.norm))
    return DecoderWeights(embedding, blocks, vector(empty.final_norm), head, per_layer)


def linear_parts(block: BlockWeights, config: DecoderConfig, layer: int) -> dict[str, FrozenMatrix]:
    """(out, in) of a block's linear modules by the ends of their names, such as `self_attn.q_proj`.

    A parameter of experts, `mlp.experts.down_proj`, is the stack of their matrices, (experts · out, in).
    """
    parts = {
        part: view
        for field, parts, sizes in _stacks(config, config.layers[layer])
        for part, view in zip(parts, _members(getattr(block, field), sizes), strict=True)
    }
    if config.layers[layer].experts:
        (gate_up,), (down,) = EXPERT_GROUPS
        parts |= {gate_up: block.gate_up, down: block.down}
    return parts


def module_shapes(config: DecoderConfig) -> ModuleShapes:
    """(out, in) of every linear module by dotted path, in forward order, and what else an adapter can train.

    Where some layers have experts, the MLPs of the others are left out: PEFT takes the names of an MLP's modules for
    the experts' there, so that it could not read an adapter of both. Routers stay frozen.
    """
    hidden, mixture = config.hidden_size, config.mixture
    shapes: dict[str, tuple[int, int]] = {}
    experts: dict[str, tuple[int, int, int]] = {}
    own = config.per_layer
    if own is not None:
        shapes[PER_LAYER_MODEL] = (own.layers * own.width, hidden)
    for index, layer in enumerate(config.layers):
        sized = config.at(layer)
        inputs = {"output": sized.mixers[layer.mixer].width, "down": sized.intermediate_size}
        inputs |= {} if own is None else {"per_layer_projection": own.width}
        for field, parts, sizes in _stacks(config, layer):
            if mixture is not None and field in ("gate_up", "down"):
                continue
            for part, size in zip(parts, sizes, strict=True):
                shapes[f"model.layers.{index}.{part}"] = (size, inputs.get(field, hidden))
        if mixture is not None and layer.experts:
            (gate_up,), (down,) = EXPERT_GROUPS
            experts[f"model.layers.{index}.{gate_up}"] = (mixture.experts, 2 * mixture.width, hidden)
            experts[f"model.layers.{index}.{down}"] = (mixture.experts, hidden, mixture.width)
    shapes["lm_head"] = (config.vocab_size, hidden)
    views = named_views(empty_weights(config, torch.float32, "meta"), config)
    fixed = [
        f"model.layers.{index}.{name}"
        for index, layer in enumerate(config.layers)
        for name in (
            *(name for name, _ in config.mixers[layer.mixer].frozen.values()),
            *((LAYER_SCALAR,) if config.layer_scalar else ()),
        )
    ]
    fixed += [f"{name}.weight" for name in _PER_LAYER_NAMES] if own is not None else []
    parameters = {name: tuple(view.shape) for name, view in views}
    routers = () if mixture is None else tuple(f".{mixture.router}.{kind}" for kind in ("weight", "bias"))
    fixed += [name for name in parameters if expert_of(name) is not None or name.endswith(routers)]
    held = set(fixed)
    parameters = {name: shape for name, shape in parameters.items() if name not in held}
    parameters.setdefault("lm_head.weight", shapes["lm_head"])
    return ModuleShapes(
        shapes,
        embeddings={"model.embed_tokens": (config.vocab_size, hidden)},
        parameters=parameters,
        tied={"lm_head.weight": "model.embed_tokens.weight"} if config.tied_head else {},
        frozen=fixed,
        experts=experts,
        interleaved=[name for name in experts if mixture and mixture.interleaved and name.endswith(EXPERT_GROUPS[0])],
    )


# ---------------------------------------------------------------------------------------------------------------------
# The decoder's weights as an adapter has them: whole tensors it trains, and trained rows of the embedding, in place.
#
# A tensor that stands alone (a norm, the head, the embedding) is the adapter's own in the compute dtype, without a
# copy; one that lies in a stack with others (q, k, v; gate, up) is put into a new stack. Rows of the embedding are
# written into one copy of the table, which is the output head too where that is tied. A tied head stays the base's own
# where the embedding is trained in full, and the other way round, as in PEFT.


@dataclass(eq=False)
class TrainedWeights:
    """Keeps the weights of one decoder up to date with the tensors that one adapter trains as they are."""

    _base: DecoderWeights
    _config: DecoderConfig
    _lora: LoRAParameters
    _table: Tensor | None = None

    def current(self) -> DecoderWeights:
        """The weights with the adapter's values as of the last `refresh_compute`."""
        lora, base = self._lora, self._base
        if not lora.trained:
            return base
        blocks = [self.block(layer, block) for layer, block in enumerate(base.blocks)]

        def own(name: str, weight: FrozenMatrix) -> FrozenMatrix:
            return lora.compute(name) if name in lora.trained else weight

        embedding, head = own(f"{EMBEDDING}.weight", base.embedding), own("lm_head.weight", base.head)
        norm = f"{self._config.final_norm}.weight"
        final_norm = lora.compute(norm) if norm in lora.trained else base.final_norm
        if f"{EMBEDDING}.{TOKENS}" in lora.trained:
            embedding = self._with_rows()
            head = embedding if self._config.tied_head else head
        return DecoderWeights(embedding, blocks, final_norm, head, base.per_layer)

    def block(self, layer: int, block: BlockWeights) -> BlockWeights:
        """One block's weights with the adapter's own in their place; `block` itself where it trains none of them."""
        prefix = f"model.layers.{layer}."
        own = [name for name in self._lora.trained if name.startswith(prefix)]
        if not own:
            return block
        trained = {name.removeprefix(prefix): self._lora.compute(name) for name in own}
        return self._block(self._config.layers[layer], block, trained)

    def _block(self, layer: LayerConfig, block: BlockWeights, trained: Mapping[str, Tensor]) -> BlockWeights:
        alone = _singles(self._config, layer, trained=True)
        changes = {alone[part]: tensor for part, tensor in trained.items() if part in alone}
        for field, parts, sizes in _stacks(self._config, layer):
            for kind, suffix in _KINDS:
                stack, names = getattr(block, f"{field}{suffix}", None), [f"{part}.{kind}" for part in parts]
                if stack is None or not any(name in trained for name in names):
                    continue
                if len(names) == 1:
                    changes[f"{field}{suffix}"] = trained[names[0]]
                    continue
                views = zip(names, _members(stack, sizes), strict=True)
                changes[f"{field}{suffix}"] = torch.cat(
                    [trained[name] if name in trained else frozen_dense(view) for name, view in views]
                )
        return replace(block, **changes)

    def _with_rows(self) -> Tensor:
        """The embedding table with the trained rows in it; one copy, kept."""
        name = f"{EMBEDDING}.{TOKENS}"
        rows = self._lora.compute(name)
        if self._table is None:
            table = frozen_dense(self._base.embedding)
            self._table = table.clone() if table is self._base.embedding else table
        self._table[self._lora.token_ids(name)] = rows
        return self._table

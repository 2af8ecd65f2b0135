"""A model family as data: what the one decoder forward needs to know, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from backhand.ops.clamped_glu import Clamp
from backhand.ops.logits_rule import PLAIN, LogitsRule

ATTENTION, SHORT_CONV, GATED_DELTA = "attention", "short_conv", "gated_delta"
VALUE_NORMED, KEYS_AS_VALUES, SHARED_KEYS = "value_normed", "keys_as_values", "shared_keys"
"""What may mix the tokens of a document: see `MixerShape`."""


@dataclass(frozen=True)
class RotaryConfig:
    """One set of rotary angles."""

    theta: float  # the rotary base
    # None, or the parameters of a scaling rule with its `rope_type` (`linear`, `llama3`, `longrope`, `proportional`,
    # `yarn`); the rules are in `nn.decoder.rotary`
    scaling: tuple[tuple[str, float | int | str | tuple[float, ...]], ...] | None = None
    attention_factor: float = 1.0  # by how much rotated queries and keys are longer, each
    features: int | None = None  # how many of a head's features turn, the first ones; None for all
    interleaved: bool = False  # the rotated pairs are neighbours (GLM), not half the rotated features apart

    @property
    def longest_short(self) -> int | None:
        """Tokens of the longest document for which the first of longrope's two lists holds; None without two."""
        scaling = dict(self.scaling or ())
        limit = scaling.get("original_max_position_embeddings") if "long_factor" in scaling else None
        return limit if isinstance(limit, int) else None


class LayerSizes(NamedTuple):
    """Sizes that may differ from layer to layer (Gemma 4), by the names that `DecoderConfig` has for them."""

    head_dim: int
    num_key_value_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer."""

    # sliding-window size in tokens (a query sees itself and window - 1 tokens before it), None for full attention
    window: int | None = None
    # index into `DecoderConfig.rotary`; None where queries and keys stay as they are (SmolLM3, EXAONE 4)
    rotary: int | None = 0
    experts: bool = False  # whether the layer's MLP is a mixture of experts
    # what mixes the tokens of a document, a key of `DecoderConfig.mixers`; window and rotary are attention's
    mixer: str = ATTENTION
    sizes: LayerSizes | None = None  # where they are not those of `DecoderConfig`; see `DecoderConfig.at`
    # number of the layer below whose keys and values this one uses; None where it has its own
    kv_source: int | None = None


class QueryScaling(NamedTuple):
    """Queries at position p are multiplied by 1 + beta ln(1 + ⌊p / length⌋): the farther, the sharper."""

    beta: float
    length: int


GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Projections of a block that share an input form a group; a block runs its groups in this order.

The first two belong to its mixer, which stands between them; these are attention's."""

FUSED_QKV, FUSED_GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
"""The first and the third group as one module each: a matrix of its own, with one pair of factors for all of it."""

LFM2_GROUPS = (GROUPS[0], ("self_attn.out_proj",), ("feed_forward.w1", "feed_forward.w3"), ("feed_forward.w2",))
"""By LFM2's names."""

GRANITE4_GROUPS = (*GROUPS[:2], ("shared_mlp.input_linear",), ("shared_mlp.output_linear",))
"""By Granite 4's names: gate and up in one module."""

SHORT_CONV_GROUPS: tuple[tuple[str, ...], ...] = (("conv.in_proj",), ("conv.out_proj",))
"""The two groups of the gated short convolution; the first is [B | C | x] in one module."""

PER_LAYER_GROUPS: tuple[tuple[str, ...], ...] = (("per_layer_input_gate",), ("per_layer_projection",))
"""Gemma 4's groups behind the MLP, in this order."""

PER_LAYER_NORM, LAYER_SCALAR = "post_per_layer_input_norm", "layer_scalar"
PER_LAYER_TABLE, PER_LAYER_MODEL = "model.embed_tokens_per_layer", "model.per_layer_model_projection"
PER_LAYER_MODEL_NORM = "model.per_layer_projection_norm"
"""What stands beside them, in the block and before all blocks."""


class PerLayerInput(NamedTuple):
    """Per-layer inputs: features that each layer is given, layers, and rows of the table they come from."""

    width: int
    layers: int
    vocab_size: int


GATED_DELTA_GROUPS: tuple[tuple[str, ...], ...] = (
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    ("linear_attn.out_proj",),
)
"""The two groups of the gated delta rule: [q k v | z | b | a], and what takes its output."""


class MixerShape(NamedTuple):
    """What the first half of a block consists of: two groups of linear modules, and a mixer between them."""

    # names of the modules of the group that makes the mixer's input, and of the one that takes its output
    groups: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]  # outputs of each module of the first group
    width: int  # of the mixer's output, which the second group takes
    biases: tuple[bool, bool]  # whether the modules of each of the groups have one
    # norms inside, by field of `BlockWeights`: names of their tensors and shapes
    norms: dict[str, tuple[str, tuple[int, ...]]]
    frozen: dict[str, tuple[str, tuple[int, ...]]]  # what else is inside and is never trained, likewise


class ShortConv(NamedTuple):
    """Gated short convolutions: how many taps, and whether they and their projections have biases."""

    taps: int
    bias: bool = False


class DeltaSizes(NamedTuple):
    """The gated delta rule's heads, the features of each, and the taps of the convolution before it."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    taps: int

    @property
    def channels(self) -> int:
        """Of [q k v], which are convolved."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width

    @property
    def inputs(self) -> tuple[int, int, int, int]:
        """Of [q k v | z | b | a]: outputs of each of these modules."""
        return self.channels, self.value_heads * self.value_width, self.value_heads, self.value_heads


ROUTER, GPT_OSS_ROUTER = "mlp.gate", "mlp.router"
GPT_OSS_CLAMP = Clamp(gain=1.702, limit=7.0)
"""Of the models that there are."""


class Mixture(NamedTuple):
    """What layers of experts have."""

    experts: int  # in a layer
    chosen: int  # of them, for each token
    width: int  # of an expert: what gate and up make of the hidden size, each
    of_all: bool = False  # whether a chosen expert's weight is its share among all experts, else among the chosen
    router: str = ROUTER  # what the router is called
    bias: bool = False  # whether the router and all of the experts' matrices have one (gpt-oss)
    clamp: Clamp | None = None  # of the experts' gated unit (gpt-oss); None where it is that of an MLP
    # in the parameter that holds them, gate's and up's outputs are interleaved (gpt-oss), and so are the rows of its
    # lora_B. Here gate's rows lie before up's
    interleaved: bool = False


SINKS = "self_attn.sinks"

EXPERT_GROUPS: tuple[tuple[str, ...], ...] = (("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",))
"""The third and the fourth group of a layer of experts: parameters that hold the matrices of all of them."""

GROUP_OF = {
    part: index
    for first, groups in (
        *((0, each) for each in (GROUPS, LFM2_GROUPS, SHORT_CONV_GROUPS, GRANITE4_GROUPS, GATED_DELTA_GROUPS)),
        *((0, ((FUSED_QKV,), (), (FUSED_GATE_UP,))), (2, EXPERT_GROUPS), (4, PER_LAYER_GROUPS)),
    )
    for index, parts in enumerate(groups, first)
    for part in parts
}
"""The number of the group that a linear module belongs to, by the end of its name."""


class NormNames(NamedTuple):
    """What a block's norms are called; None where the family has none in that place.

    Attributes:
        before_attention, before_mlp: of what enters a half; without one the stream itself enters.
        after_attention, after_mlp: of what a half adds to the stream.
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


NORMS_BEFORE = NormNames("input_layernorm", None, "post_attention_layernorm", None)
"""Llama and most others."""

_NORMS_AFTER = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_SANDWICH_NORMS = NormNames(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_GLM4_NORMS = NormNames("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
_GLM_GROUPS = (*GROUPS[:2], (FUSED_GATE_UP,), GROUPS[3])
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "norms": _SANDWICH_NORMS, "activation": "gelu_tanh"}
_OLMO: dict[str, Any] = {"norms": _NORMS_AFTER, "qk_norm": "width"}
_QK_NORM: dict[str, Any] = {"qk_norm": "head"}

TRAITS: dict[str, dict[str, Any]] = {
    "exaone4": {"norms": _NORMS_AFTER, "qk_norm": "head"},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | _QK_NORM,
    "gemma4_text": _GEMMA
    | _QK_NORM
    | {"norm_offset": 0.0, "attention_scaling": 1.0, "value_norm": True, "layer_scalar": True},
    "glm": {"groups": _GLM_GROUPS},
    "glm4": {"groups": _GLM_GROUPS, "norms": _GLM4_NORMS},
    "gpt_oss": {"sinks": True},
    "granitemoehybrid": {"groups": GRANITE4_GROUPS},
    "lfm2": {
        "groups": LFM2_GROUPS,
        "norms": NormNames("operator_norm", None, "ffn_norm", None),
        "final_norm": "model.embedding_norm",
        "qk_norm": "head",
        "qk_norms": ("self_attn.q_layernorm", "self_attn.k_layernorm"),
    },
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi3": {"groups": ((FUSED_QKV,), GROUPS[1], (FUSED_GATE_UP,), GROUPS[3])},
    "qwen2": {"qkv_bias": True},
    "qwen3": _QK_NORM,
    "qwen3_5_text": {"norm_offset": 1.0, "qk_norm": "head", "attention_gate": True},
    "qwen3_moe": _QK_NORM,
}
"""By model_type: in what every model of a family differs from Llama, by fields of `DecoderConfig`."""


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides what the decoder computes; no family has a forward of its own."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    rotary: tuple[RotaryConfig, ...]
    attention_scaling: float  # multiplier of query-key products
    tied_head: bool  # the head's weight is the embedding's
    max_position_embeddings: int
    norm_offset: float = 0.0  # 1.0 where the norm multiplies by 1 + weight (Gemma), else 0.0
    # the linear modules of a block with attention, `GROUPS` or with fused ones in their place (Phi-3, GLM)
    groups: tuple[tuple[str, ...], ...] = GROUPS
    norms: NormNames = NORMS_BEFORE  # the block's norms, by the names they have in its files
    final_norm: str = "model.norm"  # the name of the norm before the head
    # what one RMSNorm of queries and of keys goes over before the rotation: `head`, each head on its own (Qwen3, Gemma
    # 3, EXAONE 4), or `width`, all heads together (OLMo 2); None without
    qk_norm: str | None = None
    # names of the norms of queries and of keys, where there are any
    qk_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    activation: str = "silu"  # of the gate: `silu` or `gelu_tanh`
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    embedding_scaling: float = 1.0  # multiplier of the embedding's output (Gemma: √hidden), 1.0 else
    residual_multiplier: float = 1.0  # of what attention and MLP add to the stream (Granite), 1.0 else
    # by how much queries grow with their position (Ministral 3); None where they do not
    query_scaling: QueryScaling | None = None
    attention_cap: float | None = None  # what no score exceeds, softly (Gemma 2); None where scores are as they come
    sinks: bool = False  # whether the softmax of each head has one more term, of no key (gpt-oss)
    # beside each head's query q_proj makes a gate, whose sigmoid attention's output is multiplied by (Qwen3.5); q and k
    # then have norms over each head
    attention_gate: bool = False
    delta: DeltaSizes | None = None  # of layers whose mixer is the gated delta rule (Qwen3.5); None without any
    mixture: Mixture | None = None  # of layers of experts (Mixtral, Qwen3-MoE, gpt-oss); None without any
    short_conv: ShortConv | None = None  # of layers with this mixer (LFM2); None without any
    value_norm: bool = False  # a norm without weight on values, and layers that may share keys (Gemma 4)
    # what each layer is given beside the stream (Gemma 4), see `nn.decoder.ple_inputs`; None without
    per_layer: PerLayerInput | None = None
    layer_scalar: bool = False  # whether a block's output is multiplied by a number of its own (Gemma 4)
    logits: LogitsRule = PLAIN  # the logits' multiplier and cap
    eos_token_ids: tuple[int, ...] = ()
    # the token whose embedding row torch, and so PEFT, never trains; None where there is none
    padding_id: int | None = None
    # what the config says without effect on what is computed, for people
    notes: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def mixers(self) -> dict[str, MixerShape]:
        """What each of the family's mixers consists of, by its name in `LayerConfig.mixer`."""
        d, q, k = self.hidden_size, self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        with_gate = 2 * q if self.attention_gate else q
        normed = {None: (), "head": (self.head_dim, self.head_dim), "width": (q, k)}[self.qk_norm]
        mixers = {
            ATTENTION: MixerShape(
                self.groups[:2],
                (with_gate, k, k) if len(self.groups[0]) == 3 else (with_gate + 2 * k,),
                q,
                (self.qkv_bias, self.output_bias),
                {
                    field: (f"{name}.weight", (size,))
                    for field, name, size in zip(("q_norm", "k_norm"), self.qk_norms, normed, strict=False)
                },
                {"sinks": (SINKS, (self.num_heads,))} if self.sinks else {},
            )
        }
        if self.short_conv is not None:
            taps, bias = self.short_conv
            frozen: dict[str, tuple[str, tuple[int, ...]]] = {"conv": ("conv.conv.weight", (d, 1, taps))}
            frozen |= {"conv_bias": ("conv.conv.bias", (d,))} if bias else {}
            mixers[SHORT_CONV] = MixerShape(SHORT_CONV_GROUPS, (3 * d,), d, (bias, bias), {}, frozen)
        if self.value_norm:
            queries, keys, _ = self.groups[0]
            plain = mixers[ATTENTION]
            q_alone = {field: norm for field, norm in plain.norms.items() if field == "q_norm"}
            as_values, lent = (((queries, keys), self.groups[1]), ((queries,), self.groups[1]))
            mixers[VALUE_NORMED] = plain
            mixers[KEYS_AS_VALUES] = plain._replace(groups=as_values, sizes=(q, k))
            mixers[SHARED_KEYS] = plain._replace(groups=lent, sizes=(q,), norms=q_alone)
        if self.delta is not None:
            heads, width = self.delta.value_heads, self.delta.value_width
            mixers[GATED_DELTA] = MixerShape(
                GATED_DELTA_GROUPS,
                self.delta.inputs,
                heads * width,
                (False, False),
                {"delta_norm": ("linear_attn.norm.weight", (width,))},
                {
                    "conv": ("linear_attn.conv1d.weight", (self.delta.channels, 1, self.delta.taps)),
                    "log_rate": ("linear_attn.A_log", (heads,)),
                    "rate_bias": ("linear_attn.dt_bias", (heads,)),
                },
            )
        return mixers

    def at(self, layer: LayerConfig) -> DecoderConfig:
        """The same with this layer's sizes; itself where the layer has none of its own."""
        return self if layer.sizes is None else self._sized[layer.sizes]

    @cached_property
    def _sized(self) -> dict[LayerSizes, DecoderConfig]:
        every = {layer.sizes for layer in self.layers if layer.sizes is not None}
        return {sizes: replace(self, **sizes._asdict()) for sizes in every}

    @cached_property
    def rotary_dims(self) -> tuple[int, ...]:
        """Features of the heads that each of the `rotary` configurations turns."""
        dims = {layer.rotary: self.at(layer).head_dim for layer in self.layers}
        return tuple(dims.get(index, self.head_dim) for index in range(len(self.rotary)))

    @cached_property
    def kv_sources(self) -> frozenset[int]:
        """Numbers of the layers whose keys and values others use."""
        return frozenset(layer.kv_source for layer in self.layers if layer.kv_source is not None)

    def start_layer(self, layer: int) -> int:
        """The highest layer, at most this one, at which a pass may begin: below are none whose keys are used above."""
        while True:
            below = [above.kv_source for above in self.layers[layer:] if above.kv_source is not None]
            lowest = min([layer, *below])
            if lowest == layer:
                return layer
            layer = lowest

    @cached_property
    def layer_groups(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Of each layer the linear modules of its block, by group; where it has experts, their parameters."""
        behind = PER_LAYER_GROUPS if self.per_layer is not None else ()
        return tuple(
            (*self.mixers[layer.mixer].groups, *(EXPERT_GROUPS if layer.experts else self.groups[2:]), *behind)
            for layer in self.layers
        )

    @cached_property
    def gate_up_sizes(self) -> tuple[int, ...]:
        """Outputs of each module of the third group."""
        f = self.intermediate_size
        return (f, f) if len(self.groups[2]) == 2 else (2 * f,)

    @cached_property
    def length_limits(self) -> tuple[int, ...]:
        """Lengths of document beyond which other rotary angles hold; where there are any, none can share a prefix."""
        limits = (rotary.longest_short for rotary in self.rotary)
        return tuple(limit for limit in limits if limit is not None)

"""Model families as data: everything that the one decoder needs to know of a model, read from a Hugging Face config.

Encoders such as BERT are configurations of the same blocks: norms of the residual sums, biases, an MLP without a gate,
and attention in both directions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from backhand.nn.families.class_heads import BERT_CLASS_HEAD, DECODER_CLASS_HEAD, ClassHead
from backhand.ops.clamped_glu import Clamp
from backhand.ops.logits_rule import PLAIN, LogitsRule

ATTENTION, SHORT_CONV, GATED_DELTA, SSM = "attention", "short_conv", "gated_delta", "ssm"
ATTENTION_AND_SSM, MLP = "attention_and_ssm", "mlp"
VALUE_NORMED, KEYS_AS_VALUES, SHARED_KEYS = "value_normed", "keys_as_values", "shared_keys"
"""Names of mixers, see `MixerShape`."""


@dataclass(frozen=True)
class RotaryConfig:
    """One set of rotary angles."""

    theta: float  # the rotary base
    # None, or the parameters of a scaling rule with its `rope_type` (`linear`, `llama3`, `longrope`, `proportional`,
    # `yarn`); the rules are in `nn.families.rotary_frequencies`
    scaling: tuple[tuple[str, float | int | str | tuple[float, ...]], ...] | None = None
    attention_factor: float = 1.0  # multiplier of rotated queries and of rotated keys
    features: int | None = None  # number of leading features of a head that are rotated; None for all
    interleaved: bool = False  # rotated pairs are adjacent (GLM) rather than half the rotated features apart

    @property
    def longest_short(self) -> int | None:
        """Return the longest document, in tokens, that uses longrope's first list of factors.

        None without a second list.
        """
        scaling = dict(self.scaling or ())
        limit = scaling.get("original_max_position_embeddings") if "long_factor" in scaling else None
        return limit if isinstance(limit, int) else None


class LayerSizes(NamedTuple):
    """Sizes that may differ between layers (Gemma 4), named as in `DecoderConfig`."""

    head_dim: int
    num_key_value_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class LayerConfig:
    """Settings that may differ between layers."""

    # sliding-window size in tokens: a query sees itself and the window - 1 tokens before it, in encoders also as many
    # tokens after it. None for full attention
    window: int | None = None
    # index into `DecoderConfig.rotary`; None if queries and keys are not rotated (SmolLM3, EXAONE 4)
    rotary: int | None = 0
    experts: bool = False  # the MLP is a mixture of experts
    # the mixer, a key of `DecoderConfig.mixers`; window and rotary apply to attention only
    mixer: str = ATTENTION
    sizes: LayerSizes | None = None  # None if they are those of `DecoderConfig`; see `DecoderConfig.at`
    # number of the lower layer whose keys and values this layer uses; None if it computes its own
    kv_source: int | None = None
    # False if attention reads the stream itself, without the norm before it (the first layer of ModernBERT)
    input_norm: bool = True


class QueryScaling(NamedTuple):
    """Multiplier of queries at position p: 1 + beta ln(1 + ⌊p / length⌋). Attention becomes sharper with distance."""

    beta: float
    length: int


GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Groups of a block's linear modules that share an input, in the order of the forward pass.

The first two belong to the mixer, which is computed between them. These are the groups of attention.
"""

FUSED_QKV, FUSED_GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
"""The first and the third group as one module each, with one matrix and one pair of factors."""

LFM2_GROUPS = (GROUPS[0], ("self_attn.out_proj",), ("feed_forward.w1", "feed_forward.w3"), ("feed_forward.w2",))
"""Groups by LFM2's names."""

GRANITE4_GROUPS = (*GROUPS[:2], ("shared_mlp.input_linear",), ("shared_mlp.output_linear",))
"""Groups by Granite 4's names: gate and up are one module."""

BAMBA_GROUPS = (*GROUPS[:2], ("feed_forward.gate_proj", "feed_forward.up_proj"), ("feed_forward.down_proj",))
"""Groups by Bamba's names."""

NEMOTRON_GROUPS = (("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), ("mixer.o_proj",))
"""Groups of attention by Nemotron-H's names. Its blocks have no MLP sublayer."""

MLP_GROUPS: tuple[tuple[str, ...], ...] = (("mixer.up_proj",), ("mixer.down_proj",))
"""Groups of an MLP that is the mixer of its block (Nemotron-H)."""

SHORT_CONV_GROUPS: tuple[tuple[str, ...], ...] = (("conv.in_proj",), ("conv.out_proj",))
"""Groups of the gated short convolution. The first computes [B | C | x] in one module."""

BERT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
)
"""Groups by BERT's names. Its MLP has no gate."""

MODERNBERT_GROUPS: tuple[tuple[str, ...], ...] = (("attn.Wqkv",), ("attn.Wo",), ("mlp.Wi",), ("mlp.Wo",))
"""Groups by ModernBERT's names: q, k and v are one module, and so are gate and up."""

PER_LAYER_GROUPS: tuple[tuple[str, ...], ...] = (("per_layer_input_gate",), ("per_layer_projection",))
"""Gemma 4's groups after the MLP, in the order of the forward pass."""

PER_LAYER_NORM, LAYER_SCALAR = "post_per_layer_input_norm", "layer_scalar"
PER_LAYER_TABLE, PER_LAYER_MODEL = "model.embed_tokens_per_layer", "model.per_layer_model_projection"
PER_LAYER_MODEL_NORM = "model.per_layer_projection_norm"
"""Other tensors of the per-layer embeddings, in the block and before all blocks."""


class PerLayerInput(NamedTuple):
    """Sizes of the per-layer embeddings: features per layer, number of layers, and rows of their table."""

    width: int
    layers: int
    vocab_size: int


GATED_DELTA_GROUPS: tuple[tuple[str, ...], ...] = (
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    ("linear_attn.out_proj",),
)
"""Groups of the gated delta rule: [q k v | z | b | a], and the output projection."""

_SSM_PATHS = ("mamba", "mixer")


def ssm_groups(path: str) -> tuple[tuple[str, ...], ...]:
    """Return the groups of Mamba-2's mixer at this path. The first computes [z | x b c | a] in one module."""
    return (f"{path}.in_proj",), (f"{path}.out_proj",)


class MixerShape(NamedTuple):
    """Parts of a mixer sublayer: two groups of linear modules and a mixer between them."""

    # module names of the group before the mixer and of the group after it
    groups: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]  # output features of each module of the first group
    width: int  # features of the mixer's output, the input of the second group
    biases: tuple[bool, bool]  # the modules of the first and of the second group have biases
    # norms inside the mixer: names and shapes of their tensors, by field of `BlockWeights`
    norms: dict[str, tuple[str, tuple[int, ...]]]
    frozen: dict[str, tuple[str, tuple[int, ...]]]  # tensors inside the mixer that are never trained, in the same form
    # module of a second group after the mixer, whose output is added to that of the first, and its input: the last
    # features of the mixer's output. Empty and 0 in most mixers
    second: tuple[str, ...] = ()
    second_width: int = 0


class ShortConv(NamedTuple):
    """Gated short convolutions: number of taps, and True if they and their projections have biases."""

    taps: int
    bias: bool = False


class DeltaSizes(NamedTuple):
    """Heads of the gated delta rule, features per head, and taps of the convolution before it."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    taps: int

    @property
    def channels(self) -> int:
        """Number of features of [q k v], which the convolution reads."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width

    @property
    def inputs(self) -> tuple[int, int, int, int]:
        """Output features of the modules in [q k v | z | b | a]."""
        return self.channels, self.value_heads * self.value_width, self.value_heads, self.value_heads


class SSMSizes(NamedTuple):
    """Mamba-2's heads, groups of heads with the same b and c, features of each, and taps of the convolution before."""

    heads: int
    head_width: int
    groups: int
    state_width: int  # features of b and of c
    taps: int
    conv_bias: bool = True
    bias: bool = False  # the projections around the mixer have biases
    time_steps: tuple[float, float] | None = None  # limits of the time step, if any
    # place of the norm of the output: `after_gate`, `before_gate`, or None for no norm
    norm: str | None = "after_gate"

    @property
    def width(self) -> int:
        """Number of features of x, of the gate z and of the output."""
        return self.heads * self.head_width

    @property
    def channels(self) -> int:
        """Number of features of [x b c], which the convolution reads."""
        return self.width + 2 * self.groups * self.state_width

    @property
    def inputs(self) -> tuple[int, int, int]:
        """Number of features of z, of [x b c] and of a."""
        return self.width, self.channels, self.heads

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """Number of features of z, x, b, c and a."""
        shared = self.groups * self.state_width
        return self.width, self.width, shared, shared, self.heads


class Multipliers(NamedTuple):
    """Multipliers of the outputs of modules (Falcon-H1)."""

    output: float = 1.0  # of the projection after the mixer
    second_output: float = 1.0  # of the second one, after Mamba-2
    gate: float = 1.0  # of the MLP's gate, before the activation
    down: float = 1.0
    ssm: tuple[float, ...] = ()  # of z, x, b, c and a of Mamba-2; empty if all are 1


NO_MULTIPLIERS = Multipliers()
"""Multipliers of 1."""


ROUTER, GPT_OSS_ROUTER = "mlp.gate", "mlp.router"
GPT_OSS_CLAMP = Clamp(gain=1.702, limit=7.0)
"""Values of the published models."""


class Mixture(NamedTuple):
    """Settings of layers with a mixture of experts."""

    experts: int  # experts per layer
    chosen: int  # experts per token
    width: int  # output features of an expert's gate and of its up
    of_all: bool = False  # a chosen expert's weight is its share among all experts, else among the chosen ones
    router: str = ROUTER  # name of the router
    bias: bool = False  # the router and the experts' matrices have biases (gpt-oss)
    clamp: Clamp | None = None  # clamp of the experts' gated unit (gpt-oss); None for the gated unit of an MLP
    # the parameter of gate and up interleaves their outputs (gpt-oss), and so does its lora_B. Here gate's rows come
    # before up's
    interleaved: bool = False
    # the block also has an MLP, whose output is added to that of the experts, and whose modules are adapted instead of
    # the experts (Granite 4 H)
    with_mlp: bool = False


SINKS = "self_attn.sinks"

EXPERT_GROUPS: tuple[tuple[str, ...], ...] = (("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",))
"""The third and the fourth group of a layer of experts: parameters that contain the matrices of all experts."""

GROUP_OF = {
    part: index
    for first, groups in (
        *((0, each) for each in (GROUPS, LFM2_GROUPS, GRANITE4_GROUPS, BAMBA_GROUPS, BERT_GROUPS, MODERNBERT_GROUPS)),
        *((0, each) for each in (NEMOTRON_GROUPS, MLP_GROUPS, SHORT_CONV_GROUPS, GATED_DELTA_GROUPS)),
        *((0, ssm_groups(path)) for path in _SSM_PATHS),
        *((0, ((FUSED_QKV,), (), (FUSED_GATE_UP,))), (2, EXPERT_GROUPS), (4, PER_LAYER_GROUPS)),
    )
    for index, parts in enumerate(groups, first)
    for part in parts
}
"""Group number of each linear module, keyed by its name inside the block."""


_IN_BLOCK = re.compile(r"[a-z_.]+\.(\d+)\.(.+)")


def split_layer(name: str) -> tuple[int, str] | None:
    """Split the path of a module or tensor into layer number and name inside the block; None if it is in no block.

    `model.layers.3.self_attn.q_proj` → (3, `self_attn.q_proj`).
    """
    match = _IN_BLOCK.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


class EncoderInputs(NamedTuple):
    """Names of what an encoder computes between its embedding and its first block (`nn.decoder.encoder_inputs`).

    Attributes:
        norm: the norm of the sum of the embeddings.
        positions: the learned embedding of positions, or None.
        token_types: the embedding of token types, or None.
        types: number of token types.
    """

    norm: str
    positions: str | None = None
    token_types: str | None = None
    types: int = 0


class NormNames(NamedTuple):
    """Names of a block's norms. None if the family has no norm at that place.

    Attributes:
        before_attention, before_mlp: norms of a sublayer's input. Without one, the sublayer reads the stream itself.
        after_attention, after_mlp: norms of a sublayer's output before the residual sum, or of the sum
            (`DecoderConfig.norms_of_sums`).
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


NORMS_BEFORE = NormNames("input_layernorm", None, "post_attention_layernorm", None)
"""Norms of Llama and most other families."""

_NORMS_AFTER = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_SANDWICH_NORMS = NormNames(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_GLM4_NORMS = NormNames("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
_GLM_GROUPS = (*GROUPS[:2], (FUSED_GATE_UP,), GROUPS[3])
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "norms": _SANDWICH_NORMS, "activation": "gelu_tanh"}
_BAMBA: dict[str, Any] = {
    "groups": BAMBA_GROUPS,
    "norms": NormNames("input_layernorm", None, "pre_ff_layernorm", None),
    "final_norm": "model.final_layernorm",
}
_OLMO: dict[str, Any] = {"norms": _NORMS_AFTER, "qk_norm": "width"}
_QK_NORM: dict[str, Any] = {"qk_norm": "head"}

_ENCODER: dict[str, Any] = {"causal": False, "has_head": False, "norm": "layer"}

TRAITS: dict[str, dict[str, Any]] = {
    "bamba": _BAMBA,
    "falcon_h1": _BAMBA,
    "bert": _ENCODER
    | {
        "groups": BERT_GROUPS,
        "embedding": "embeddings.word_embeddings",
        "layers_path": "encoder.layer",
        "norms": NormNames(None, "attention.output.LayerNorm", None, "output.LayerNorm"),
        "norms_of_sums": True,
        "norm_bias": True,
        "outside": ("pooler.dense",),
        "class_head": BERT_CLASS_HEAD,
        "final_norm": None,
        "gated_mlp": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "inputs": EncoderInputs(
            "embeddings.LayerNorm", "embeddings.position_embeddings", "embeddings.token_type_embeddings", 2
        ),
    },
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
    "modernbert": _ENCODER
    | {
        "groups": MODERNBERT_GROUPS,
        "embedding": "embeddings.tok_embeddings",
        "layers_path": "layers",
        "norms": NormNames("attn_norm", None, "mlp_norm", None),
        "final_norm": "final_norm",
        "inputs": EncoderInputs("embeddings.norm"),
    },
    "nemotron_h": {
        "groups": NEMOTRON_GROUPS,
        "norms": NormNames("norm", None, None, None),
        "final_norm": "model.norm_f",
        "embedding": "model.embeddings",
        "ssm_path": "mixer",
        "gated_mlp": False,
        "activation": "relu2",
    },
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi3": {"groups": ((FUSED_QKV,), GROUPS[1], (FUSED_GATE_UP,), GROUPS[3])},
    "qwen2": {"qkv_bias": True},
    "qwen3": _QK_NORM,
    "qwen3_5_text": {"norm_offset": 1.0, "qk_norm": "head", "attention_gate": True},
    "qwen3_moe": _QK_NORM,
}
"""Differences of each family from Llama, by model_type and field of `DecoderConfig`."""


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that determines the result of a decoder. No family has its own forward."""

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
    norm_offset: float = 0.0  # 1.0 if the norm multiplies by 1 + weight (Gemma), else 0.0
    # linear modules of a block with attention: `GROUPS`, or fused modules (Phi-3, GLM). Only the first two in families
    # whose blocks are a mixer sublayer alone (Nemotron-H)
    groups: tuple[tuple[str, ...], ...] = GROUPS
    norms: NormNames = NORMS_BEFORE  # names of the block's norms in its files
    final_norm: str | None = "model.norm"  # name of the norm before the head; None in families without it
    embedding: str = "model.embed_tokens"  # name of the token embedding
    layers_path: str = "model.layers"  # path of the list of blocks
    # False for encoders, whose result are hidden states, and for files without a head. `DecoderWeights.head` is then
    # the embedding and is not used
    has_head: bool = True
    causal: bool = True  # attention is causal; False for both directions
    norm: str = "rms"  # kind of the norms of blocks and of the final norm: `rms` or `layer`
    norm_bias: bool = False  # these norms have biases
    norms_of_sums: bool = False  # the norms after the sublayers are those of the residual sums (BERT)
    gated_mlp: bool = True  # the MLP has a gate; False for φ(x W_upᵀ) W_downᵀ (BERT, Nemotron-H)
    # linear modules of transformers' class that are not computed: BERT's pooler, which a text's embedding does not need
    outside: tuple[str, ...] = ()
    inputs: EncoderInputs | None = None  # embeddings and norm before the first block of encoders, or None
    class_head: ClassHead = DECODER_CLASS_HEAD  # the head of transformers' class for sequence classification
    # extent of the RMSNorm of queries and keys before the rotation: `head`, each head separately (Qwen3, Gemma 3,
    # EXAONE 4), or `width`, all heads together (OLMo 2); None without such norms
    qk_norm: str | None = None
    # names of the norms of queries and keys
    qk_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    # activation of the gate, or of the MLP without a gate: `silu`, `gelu`, `gelu_tanh` or `relu2`
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    embedding_scaling: float = 1.0  # multiplier of the embedding's output (Gemma: √hidden), else 1.0
    residual_multiplier: float = 1.0  # multiplier of the sublayers' outputs (Granite), else 1.0
    # scaling of queries by their position (Ministral 3), or None
    query_scaling: QueryScaling | None = None
    attention_cap: float | None = None  # soft cap of attention scores (Gemma 2), or None
    sinks: bool = False  # each head's softmax has one more term without a key (gpt-oss)
    # q_proj computes a gate after each head's query, whose sigmoid multiplies the output of attention (Qwen3.5). Such
    # families have norms of q and k over each head
    attention_gate: bool = False
    delta: DeltaSizes | None = None  # sizes of layers with the gated delta rule (Qwen3.5), or None
    ssm: SSMSizes | None = None  # sizes of Mamba-2 (Granite 4 H, Bamba, Falcon-H1, Nemotron-H), or None
    ssm_path: str = "mamba"  # path of Mamba-2 inside the block
    multipliers: Multipliers = NO_MULTIPLIERS
    mixture: Mixture | None = None  # settings of layers of experts (Mixtral, Qwen3-MoE, gpt-oss, Granite 4 H), or None
    short_conv: ShortConv | None = None  # settings of layers with a short convolution (LFM2), or None
    value_norm: bool = False  # values have a norm without weight, and layers may share keys and values (Gemma 4)
    # sizes of the per-layer embeddings (Gemma 4), see `nn.decoder.ple_block`; or None
    per_layer: PerLayerInput | None = None
    layer_scalar: bool = False  # each block's output is multiplied by a scalar (Gemma 4)
    logits: LogitsRule = PLAIN  # multiplier and cap of the logits
    eos_token_ids: tuple[int, ...] = ()
    # the token whose embedding row torch and PEFT never train, or None
    padding_id: int | None = None
    # messages about config fields without effect on the result
    notes: tuple[str, ...] = field(default=(), compare=False)

    def block_path(self, layer: int) -> str:
        """Return the path of a block, such as `model.layers.3`."""
        return f"{self.layers_path}.{layer}"

    @property
    def output_name(self) -> str:
        """Return the name of the model's result, `logits` or, without a head, `final states`."""
        return "logits" if self.has_head else "final states"

    @property
    def has_mlp(self) -> bool:
        """True if blocks have an MLP sublayer after the mixer's. Otherwise a block is a mixer sublayer alone."""
        return len(self.groups) > 2

    def has_mlp_in(self, layer: LayerConfig) -> bool:
        """Return True if the linear modules of the layer's MLP sublayer are not those of experts."""
        return not layer.experts or (self.mixture is not None and self.mixture.with_mlp)

    @property
    def shares_prefixes(self) -> bool:
        """True if documents may share a prefix: its hidden states depend neither on later tokens nor on the length."""
        return self.causal and not self.length_limits

    @cached_property
    def mixers(self) -> dict[str, MixerShape]:
        """Parts of each of the family's mixers, by its name in `LayerConfig.mixer`."""
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
        frozen: dict[str, tuple[str, tuple[int, ...]]]
        if self.short_conv is not None:
            taps, bias = self.short_conv
            frozen = {"conv": ("conv.conv.weight", (d, 1, taps))}
            frozen |= {"conv_bias": ("conv.conv.bias", (d,))} if bias else {}
            mixers[SHORT_CONV] = MixerShape(SHORT_CONV_GROUPS, (3 * d,), d, (bias, bias), {}, frozen)
        if self.value_norm:
            queries, keys, _ = self.groups[0]
            plain = mixers[ATTENTION]
            q_alone = {field: norm for field, norm in plain.norms.items() if field == "q_norm"}
            as_values, shared = (((queries, keys), self.groups[1]), ((queries,), self.groups[1]))
            mixers[VALUE_NORMED] = plain
            mixers[KEYS_AS_VALUES] = plain._replace(groups=as_values, sizes=(q, k))
            mixers[SHARED_KEYS] = plain._replace(groups=shared, sizes=(q,), norms=q_alone)
        if self.delta is not None:
            heads, width = self.delta.value_heads, self.delta.value_width
            mixers[GATED_DELTA] = MixerShape(
                GATED_DELTA_GROUPS,
                self.delta.inputs,
                heads * width,
                (False, False),
                {"gated_norm": ("linear_attn.norm.weight", (width,))},
                {
                    "conv": ("linear_attn.conv1d.weight", (self.delta.channels, 1, self.delta.taps)),
                    "log_rate": ("linear_attn.A_log", (heads,)),
                    "rate_bias": ("linear_attn.dt_bias", (heads,)),
                },
            )
        if self.ssm is not None:
            path = self.ssm_path
            frozen = {"conv": (f"{path}.conv1d.weight", (self.ssm.channels, 1, self.ssm.taps))}
            frozen |= {"conv_bias": (f"{path}.conv1d.bias", (self.ssm.channels,))} if self.ssm.conv_bias else {}
            by_head = {"log_rate": "A_log", "rate_bias": "dt_bias", "skip": "D"}
            mixers[SSM] = MixerShape(
                ssm_groups(path),
                (sum(self.ssm.inputs),),
                self.ssm.width,
                (self.ssm.bias, self.ssm.bias),
                {"gated_norm": (f"{path}.norm.weight", (self.ssm.width,))} if self.ssm.norm else {},
                frozen | {field: (f"{path}.{name}", (self.ssm.heads,)) for field, name in by_head.items()},
            )
            attention, ssm = mixers[ATTENTION], mixers[SSM]
            mixers[ATTENTION_AND_SSM] = MixerShape(
                ((*attention.groups[0], *ssm.groups[0]), attention.groups[1]),
                (*attention.sizes, *ssm.sizes),
                attention.width + ssm.width,
                attention.biases,
                attention.norms | ssm.norms,
                attention.frozen | ssm.frozen,
                ssm.groups[1],
                ssm.width,
            )
        if not self.has_mlp:
            f, bias = self.intermediate_size, self.mlp_bias
            mixers[MLP] = MixerShape(MLP_GROUPS, (f,), f, (bias, bias), {}, {})
        return mixers

    def at(self, layer: LayerConfig) -> DecoderConfig:
        """Return this config with the sizes of a layer, or the config itself if the layer has no sizes of its own."""
        return self if layer.sizes is None else self._sized[layer.sizes]

    @cached_property
    def _sized(self) -> dict[LayerSizes, DecoderConfig]:
        every = {layer.sizes for layer in self.layers if layer.sizes is not None}
        return {sizes: replace(self, **sizes._asdict()) for sizes in every}

    @cached_property
    def rotary_dims(self) -> tuple[int, ...]:
        """Features of the heads that each of the `rotary` configurations rotates."""
        dims = {layer.rotary: self.at(layer).head_dim for layer in self.layers}
        return tuple(dims.get(index, self.head_dim) for index in range(len(self.rotary)))

    @cached_property
    def kv_sources(self) -> frozenset[int]:
        """Numbers of the layers whose keys and values other layers use."""
        return frozenset(layer.kv_source for layer in self.layers if layer.kv_source is not None)

    def start_layer(self, layer: int) -> int:
        """Return the highest layer, at most `layer`, at which a pass may start.

        No layer below the result may have keys and values that a layer from the result on uses.
        """
        while True:
            sources = [above.kv_source for above in self.layers[layer:] if above.kv_source is not None]
            lowest = min([layer, *sources])
            if lowest == layer:
                return layer
            layer = lowest

    @cached_property
    def layer_groups(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Linear modules of each layer's block, by group. For layers of experts, the parameters of the experts."""
        per_layer = PER_LAYER_GROUPS if self.per_layer is not None else ()
        of_mlp = (self.groups[2:] if self.has_mlp_in(layer) else EXPERT_GROUPS for layer in self.layers)
        return tuple(
            (*self.mixers[layer.mixer].groups, *groups, *per_layer)
            for layer, groups in zip(self.layers, of_mlp, strict=True)
        )

    @cached_property
    def gate_up_sizes(self) -> tuple[int, ...]:
        """Output features of each module of the third group."""
        f = self.intermediate_size
        if not self.gated_mlp:
            return (f,)
        return (f, f) if len(self.groups[2]) == 2 else (2 * f,)

    @cached_property
    def length_limits(self) -> tuple[int, ...]:
        """Document lengths beyond which other rotary angles apply.

        If there are any, documents cannot share a prefix.
        """
        limits = (rotary.longest_short for rotary in self.rotary)
        return tuple(limit for limit in limits if limit is not None)

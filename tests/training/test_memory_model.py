"""The formulas of a step's memory against what torch allocates: every buffer of a step, at its fullest moment."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter, resolve_slots
from backhand.kernels.library import loops_are_there, torch_form
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.kv_cache import KVCache
from backhand.nn.decoder.weights import dense_views, empty_weights, module_shapes
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops import gated_delta_rule
from backhand.ops.delta_chunks import HeadSizes
from backhand.ops.low_rank import Member, low_rank_backward
from backhand.training.memory.decoder_size import decoder_size
from backhand.training.memory.model import (
    ModelSize,
    block_bytes,
    delta_rule_bytes,
    head_bytes,
    kept_bytes,
    parts_of,
    second_model_bytes,
)
from backhand.training.memory.shapes import USUAL, Rows, StepShape, expert_kernel_bytes, kernel_bytes, largest_shapes
from support.allocations import held_at_most, resident_growth
from support.tiny_models import EXPERT_PARAMETERS, tiny_config

SIZES = {
    "wide-mlp": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2},
    "wide-head": {"hidden_size": 1536, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "many-heads": {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 12, "num_key_value_heads": 12},
}
# rows of equal length, tokens of each, supervised tokens in all, vocabulary
SHAPES = {
    "short-rows": (8, 64, 200, 500),
    "long-row": (1, 768, 700, 500),
    "head": (4, 128, 300, 20_000),
    "chunks": (4, 160, 600, 9_000),
}


def allocated_peak(
    config: DecoderConfig,
    batch: PackedBatch,
    dtype: torch.dtype,
    recompute: str,
    adapter: LoRAConfig = LoRAConfig(rank=8),  # noqa: B008 - frozen
) -> int:
    """Most bytes that torch held at once during a step, above what it held before."""
    weights = empty_weights(config, dtype)
    for _, tensor in dense_views(weights, config):
        tensor.normal_(std=0.02)
    decoder = Decoder(config, weights, recompute=recompute)
    lora = LoRAParameters(resolve_slots(adapter, module_shapes(config)))
    lora.initialise(torch.Generator().manual_seed(0))
    decoder.attach(lora)
    decoder.loss_and_gradients(batch, 1.0)
    return held_at_most(lambda: decoder.loss_and_gradients(batch, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize(
    ("model", "shape"),
    [("wide-mlp", "short-rows"), ("wide-mlp", "head"), ("many-heads", "long-row"), ("wide-head", "chunks")],
)
def test_a_step_holds_what_the_formula_says(model: str, shape: str, recompute: str, dtype: torch.dtype) -> None:
    rows, length, supervised, vocabulary = SHAPES[shape]
    stated = tiny_config("llama-tied", head_dim=32, vocab_size=vocabulary, **SIZES[model]).to_dict()
    config = decoder_config(stated)
    labels = torch.full((rows * length,), IGNORE_INDEX)
    labels[torch.randperm(rows * length)[:supervised]] = 7
    batch = PackedBatch(torch.randint(vocabulary, labels.shape), labels, (length,) * rows)
    size = decoder_size(config, resolve_adapter(LoRAConfig(rank=8), module_shapes(config)), dtype.itemsize)
    same = Rows([length] * rows, [supervised // rows] * rows)
    (counted,) = largest_shapes([range(rows)], same, [rows], torch.empty(0, dtype=dtype)).values()
    assert counted.tokens == rows * length
    kept = kept_bytes(size, counted, recompute)
    at_work = max(head_bytes(size, counted), block_bytes(size, counted, recompute))
    predicted = kept + counted.tokens * size.stream_bytes + at_work
    assert predicted == pytest.approx(allocated_peak(config, batch, dtype, recompute), rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_nothing_is_kept_below_the_lowest_adapted_layer(recompute: str) -> None:
    rows, length, supervised, vocabulary = SHAPES["short-rows"]
    stated = tiny_config("llama-tied", head_dim=32, vocab_size=vocabulary, num_hidden_layers=6, **SIZES["wide-mlp"])
    config = decoder_config(stated.to_dict())
    labels = torch.full((rows * length,), IGNORE_INDEX)
    labels[torch.randperm(rows * length)[:supervised]] = 7
    batch = PackedBatch(torch.randint(vocabulary, labels.shape), labels, (length,) * rows)
    adapter = LoRAConfig(rank=8, layers="last:2")
    size = decoder_size(config, resolve_adapter(adapter, module_shapes(config)), 4)
    same = Rows([length] * rows, [supervised // rows] * rows)
    (counted,) = largest_shapes([range(rows)], same, [rows], torch.empty(0)).values()
    at_work = max(head_bytes(size, counted), block_bytes(size, counted, recompute))
    predicted = kept_bytes(size, counted, recompute) + counted.tokens * size.stream_bytes + at_work
    assert predicted == pytest.approx(allocated_peak(config, batch, torch.float32, recompute, adapter), rel=0.1)
    everywhere = decoder_size(config, resolve_adapter(LoRAConfig(rank=8), module_shapes(config)), 4)
    assert kept_bytes(size, counted, recompute) < 0.4 * kept_bytes(everywhere, counted, recompute)


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_multipliers_take_no_memory(recompute: str) -> None:
    rows, length, supervised, vocabulary = SHAPES["short-rows"]
    labels = torch.full((rows * length,), IGNORE_INDEX)
    labels[torch.randperm(rows * length)[:supervised]] = 7
    batch = PackedBatch(torch.randint(vocabulary, labels.shape), labels, (length,) * rows)
    peaks, sizes = [], []
    for variant in ("llama-tied", "granite"):
        stated = tiny_config(variant, head_dim=32, vocab_size=vocabulary, **SIZES["wide-mlp"]).to_dict()
        config = decoder_config(stated)
        sizes.append(decoder_size(config, resolve_adapter(LoRAConfig(rank=8), module_shapes(config)), 4))
        peaks.append(allocated_peak(config, batch, torch.float32, recompute))
    assert sizes[0] == sizes[1]
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize(
    ("model", "shape"), [("wide-mlp", "short-rows"), ("wide-mlp", "head"), ("many-heads", "long-row")]
)
@pytest.mark.parametrize(
    "variant", ["gemma2", "olmo2", "phi3", "glm4", "lfm2", "qwen3_5_text", "gemma4_text", "gemma4-keys"]
)
def test_other_families_hold_what_the_formula_says(variant: str, model: str, shape: str, recompute: str) -> None:
    """Capped scores, logits; norms behind the halves alone, over all of q and k; fused; neighbours; other mixers."""
    rows, length, supervised, vocabulary = SHAPES[shape]
    more: dict[str, Any] = {"sliding_window": 1024} if variant == "gemma2" else {}
    if variant == "gemma4_text":
        more = {"vocab_size_per_layer_input": vocabulary, "global_head_dim": 48, "sliding_window": 1024}
    if variant == "gemma4-keys":
        more = {"num_global_key_value_heads": 2, "sliding_window": 1024}
    if variant == "lfm2":
        more = {"block_auto_adjust_ff_dim": False}
    if variant in ("glm4", "qwen3_5_text"):
        more = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    stated = tiny_config(variant, head_dim=32, vocab_size=vocabulary, **more, **SIZES[model]).to_dict()
    config = decoder_config(stated)
    labels = torch.full((rows * length,), IGNORE_INDEX)
    labels[torch.randperm(rows * length)[:supervised]] = 7
    batch = PackedBatch(torch.randint(vocabulary, labels.shape), labels, (length,) * rows)
    size = decoder_size(config, resolve_adapter(LoRAConfig(rank=8), module_shapes(config)), 4)
    same = Rows([length] * rows, [supervised // rows] * rows)
    (counted,) = largest_shapes([range(rows)], same, [rows], torch.empty(0, dtype=torch.float32)).values()
    at_work = max(head_bytes(size, counted), block_bytes(size, counted, recompute))
    predicted = kept_bytes(size, counted, recompute) + counted.tokens * size.stream_bytes + at_work
    # What a block computes again is counted by its largest kind, and the delta rule may be at work in another one.
    rel = 0.12 if variant == "qwen3_5_text" and recompute == "block" else 0.1
    assert predicted == pytest.approx(allocated_peak(config, batch, torch.float32, recompute), rel=rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize(
    ("variant", "shape"),
    [("qwen3_moe", "short-rows"), ("qwen3_moe", "head"), ("mixtral", "long-row"), ("gpt_oss", "short-rows")],
)
@pytest.mark.parametrize("adapted", ["experts too", "attention alone"])
def test_experts_hold_what_the_formula_says(
    adapted: str, variant: str, shape: str, recompute: str, dtype: torch.dtype
) -> None:
    """Narrow experts, many of them chosen, one layer without; and few wide ones."""
    rows, length, supervised, vocabulary = SHAPES[shape]
    more: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96}
    if variant in ("mixtral", "gpt_oss"):
        more = {"num_local_experts": 4, "num_experts_per_tok": 2}
    stated = tiny_config(variant, head_dim=32, vocab_size=vocabulary, **more, **SIZES["wide-mlp"]).to_dict()
    config = decoder_config(stated)
    labels = torch.full((rows * length,), IGNORE_INDEX)
    labels[torch.randperm(rows * length)[:supervised]] = 7
    batch = PackedBatch(torch.randint(vocabulary, labels.shape), labels, (length,) * rows)
    adapter = LoRAConfig(rank=8, target_parameters=EXPERT_PARAMETERS if adapted == "experts too" else ())
    size = decoder_size(config, resolve_adapter(adapter, module_shapes(config)), dtype.itemsize)
    same = Rows([length] * rows, [supervised // rows] * rows)
    (counted,) = largest_shapes([range(rows)], same, [rows], torch.empty(0, dtype=dtype)).values()
    at_work = max(head_bytes(size, counted), block_bytes(size, counted, recompute))
    predicted = kept_bytes(size, counted, recompute) + counted.tokens * size.stream_bytes + at_work
    assert predicted == pytest.approx(allocated_peak(config, batch, dtype, recompute, adapter), rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_sinks_take_no_memory_of_their_own_in_torchs_form(recompute: str) -> None:
    """Attention of a long row by blocks of queries, whose matrices are the most that a block holds."""
    rows, length, supervised, vocabulary = SHAPES["long-row"]
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 16}
    stated = tiny_config("gpt_oss", vocab_size=vocabulary, sliding_window=1024, **sizes, **more).to_dict()
    config = decoder_config(stated)
    labels = torch.full((rows * length,), IGNORE_INDEX)
    labels[torch.randperm(rows * length)[:supervised]] = 7
    batch = PackedBatch(torch.randint(vocabulary, labels.shape), labels, (length,) * rows)
    same = Rows([length] * rows, [supervised // rows] * rows)
    with torch_form():
        size = decoder_size(config, resolve_adapter(LoRAConfig(rank=8), module_shapes(config)), 4)
        (counted,) = largest_shapes([range(rows)], same, [rows], torch.empty(0)).values()
        at_work = block_bytes(size, counted, recompute)
        predicted = kept_bytes(size, counted, recompute) + counted.tokens * size.stream_bytes + at_work
        assert predicted == pytest.approx(allocated_peak(config, batch, torch.float32, recompute), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama", "lfm2", "qwen3_5_text", "gemma4_text"])
def test_a_conversation_holds_keys_values_and_states(variant: str, dtype: torch.dtype) -> None:
    """Of each token, and of a row as a whole; a model that answers beside the run holds them."""
    config = decoder_config(tiny_config(variant).to_dict())
    size = decoder_size(config, resolve_adapter(LoRAConfig(rank=8), module_shapes(config)), dtype.itemsize)
    cache = KVCache(config, 1, 37, dtype=dtype)
    states = sum(state.nbytes for layer in cache.states for state in layer)
    held = sum(part.nbytes for part in (*cache.keys, *cache.values)) + states
    assert 37 * size.cache_bytes + size.mixer_state_bytes == held
    assert size.mixer_state_bytes == states and (states > 0) == (variant in ("lfm2", "qwen3_5_text"))
    without = replace(size, mixer_state_bytes=0)
    assert second_model_bytes(size, 1000, 37) - second_model_bytes(without, 1000, 37) == states


@pytest.mark.parametrize(
    ("variant", "counted"),
    [("llama", 32), ("lfm2", 41), ("qwen3_moe", 25), ("gemma4-keys", 45), ("gemma4_text", 78)],
)
def test_kernels_are_those_of_all_kinds_of_layers(variant: str, counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what oneDNN said that it compiled for one number of tokens, experts left aside; by torch's products."""
    monkeypatch.setattr("backhand.training.memory.shapes.loops_are_there", lambda: False)
    config = decoder_config(tiny_config(variant).to_dict())
    shapes, usual = module_shapes(config), USUAL.kernels(torch.bfloat16)[0]
    size = decoder_size(config, resolve_adapter(LoRAConfig(rank=16), shapes), 2)
    assert usual + size.more_kernels[0] == pytest.approx(counted, rel=0.02)
    one = decoder_size(config, resolve_adapter(LoRAConfig(rank=16, target_modules=("q_proj",)), shapes), 2)
    assert all(few < all_of for few, all_of in zip(one.more_kernels, size.more_kernels, strict=True))
    shape = StepShape(100, 10, kernels=usual * 3, kernel_sizes=(3, 2, 1, 0))
    more = 3 * size.more_kernels[0] + 2 * size.more_kernels[1] + size.more_kernels[2]
    found = parts_of(size, shape, "none", 0)["compiled kernels"]
    assert found == (usual * 3 + more) * kernel_bytes()
    monkeypatch.setattr("backhand.training.memory.shapes.loops_are_there", lambda: True)
    monkeypatch.setattr("backhand.training.memory.shapes.is_taken", lambda dtype: dtype == torch.bfloat16)
    none = decoder_size(config, resolve_adapter(LoRAConfig(rank=16), shapes), 2)
    assert parts_of(none, replace(shape, kernels=0), "none", 0)["compiled kernels"] == 0, "by loops with tiles"
    assert none.more_kernels == (0, 0, 0, 0)


def test_kernels_of_experts_are_those_of_the_numbers_of_tokens_that_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few draws all differ, of many most numbers come up; and what is compiled in another's place leaves something."""
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
    monkeypatch.setattr("backhand.training.memory.decoder_kernels.is_taken", lambda dtype: False)
    config = decoder_config(tiny_config("mixtral").to_dict())
    experts, layers = 5, len(config.layers)
    shapes = module_shapes(config)
    size = decoder_size(config, resolve_adapter(LoRAConfig(rank=16), shapes), 2)
    size = replace(size, more_kernels=(0, 0, 0, 0))
    assert (size.expert_products, size.expert_choices) == (4, experts * layers)

    def of_experts(tokens: int, micro_batches: int, size: ModelSize = size) -> int:
        shape = StepShape(tokens, 10, kernels=1, micro_batches=micro_batches)
        return parts_of(size, shape, "none", 0)["compiled kernels"] - kernel_bytes()

    one = expert_kernel_bytes(1, 1)
    assert of_experts(100_000, 1) == pytest.approx(4 * experts * layers * one, rel=0.01)
    assert of_experts(10, 1000) == pytest.approx(4 * 8 * one), "two of five experts: up to four fifths of the tokens"
    most, one_more = (of_experts(100_000, count) for count in (1_000, 10_000))
    assert 511 * one < most == one_more < 1000 * one
    adapted = LoRAConfig(rank=16, target_modules=(), target_parameters=EXPERT_PARAMETERS)
    more = replace(decoder_size(config, resolve_adapter(adapted, shapes), 2), more_kernels=(0, 0, 0, 0))
    assert more.expert_products == (8 if loops_are_there() else 16)
    assert of_experts(100, 1, more) > 1.9 * of_experts(100, 1)
    monkeypatch.setattr("backhand.training.memory.decoder_kernels.is_taken", lambda dtype: True)
    by_tiles = decoder_size(config, resolve_adapter(adapted, shapes), 2)
    assert by_tiles.expert_products == more.expert_products - 4, "what goes by tiles compiles none"
    alone = StepShape(100, 10, kernel_sizes=(1, 0, 0, 0), micro_batches=1)
    assert parts_of(by_tiles, alone, "none", 0)["compiled kernels"] > 0, "where nothing else does"


@pytest.mark.skipif(not loops_are_there(), reason="of compiled loops")
@pytest.mark.parametrize(
    ("targets", "numbers"),
    [
        (("v_proj",), 512 * 128),
        (("gate_proj", "up_proj"), 2 * 512 * 384),
        (("gate_proj", "down_proj"), 2 * 512 * 384),
        (("gate_proj", "up_proj", "down_proj"), 3 * 512 * 384),
    ],
)
def test_parts_of_rows_have_sums_of_their_own(targets: tuple[str, ...], numbers: int) -> None:
    config = decoder_config(tiny_config("llama", **SIZES["wide-mlp"]).to_dict())
    adapter = LoRAConfig(rank=500, target_modules=targets)
    size = decoder_size(config, resolve_adapter(adapter, module_shapes(config)), 4)
    assert size.part_sums_bytes == numbers * 4
    # Without a head and checkpoints it is the block at work for which most is held.
    size = replace(size, head_row_bytes=0, head_chunk_bytes=0, softmax_row_bytes=0, checkpoint_bytes=0)
    for tokens, parts in ((1, 1), (256, 1), (257, 2), (1024, 4), (9000, 8)):
        held = parts_of(size, StepShape(tokens, 1), "none", 0)["workspace"]
        without = parts_of(replace(size, part_sums_bytes=0), StepShape(tokens, 1), "none", 0)
        assert held - without["workspace"] == parts * numbers * 4


@pytest.mark.skipif(not loops_are_there() or sys.platform != "linux", reason="of compiled loops, measured on Linux")
def test_a_large_rank_is_added_up_in_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """gate and up, of which each 128 columns have sums of their own for every token."""
    for module in ("backhand.training.memory.decoder_size", "backhand.ops.low_rank"):
        monkeypatch.setattr(f"{module}.by_parts_of_rows", lambda dtype: False)
    config = decoder_config(tiny_config("llama", **SIZES["wide-mlp"]).to_dict())
    f, tokens, rank, columns = 384, 8192, 500, 3 + 3

    def at_work(*targets: str) -> int:
        adapter = LoRAConfig(rank=rank, target_modules=targets)
        return decoder_size(config, resolve_adapter(adapter, module_shapes(config)), 4).block_bytes

    assert at_work("gate_proj", "up_proj") - at_work("v_proj") == columns * 512 * 4
    g, h = torch.zeros(tokens, 2 * f), torch.zeros(tokens, 2 * rank)
    factors = [torch.zeros(f, rank) for _ in range(2)]
    members = [Member(place * f, factor, 1.0, factor) for place, factor in enumerate(factors)]
    taken = resident_growth(lambda: low_rank_backward(g, h, members)) - h.nbytes
    assert taken == pytest.approx(tokens * columns * 512 * 4, rel=0.1)


@pytest.mark.skipif(not loops_are_there(), reason="torch's form keeps other things")
@pytest.mark.parametrize(("shared", "own"), [(0, 300), (100, 200), (128, 30), (190, 0)])
def test_the_delta_rule_works_in_what_is_counted(shared: int, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a shared prefix one state more, and a chunk that is not full on each side."""
    found: list[int] = []
    real = gated_delta_rule._problem

    def noting(*arguments: Any, **options: Any) -> Any:
        problem = real(*arguments, **options)
        found.append(problem.memory.nbytes)
        return problem

    monkeypatch.setattr(gated_delta_rule, "_problem", noting)
    tokens, heads, group = shared + 2 * own, 3, 2
    q, k = torch.randn(tokens, heads, 24), torch.randn(tokens, heads, 24)
    v = torch.randn(tokens, heads * group, 40)
    rates = torch.rand(tokens, heads * group)
    saved = gated_delta_rule.GatedDeltaRuleSaved(q, k, v, -rates, rates, ((shared, 2, own),), shared)
    gated_delta_rule.gated_delta_rule_backward(torch.randn_like(v), saved)
    heads_of = HeadSizes(heads, group, 24, 40)
    with monkeypatch.context() as one_thread:
        one_thread.setattr(torch, "get_num_threads", lambda: 1)
        gated_delta_rule.gated_delta_rule_backward(torch.randn_like(v), saved)
        counted = gated_delta_rule.bytes_in_loops(heads_of, shared + own, torch.float32, shared=shared)
    assert found[1] == counted
    shape = StepShape(tokens, 10, longest_tokens=shared + own, shared_tokens=shared)
    size = decoder_size(decoder_config(tiny_config("qwen3_5_text").to_dict()), _LAYOUT, 4)
    planned = delta_rule_bytes(replace(size, delta_heads=heads_of), shape)
    assert planned == counted * torch.get_num_threads() >= found[0]


_LAYOUT = resolve_adapter(LoRAConfig(rank=8), module_shapes(decoder_config(tiny_config("qwen3_5_text").to_dict())))

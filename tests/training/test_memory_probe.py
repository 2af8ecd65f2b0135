"""What few blocks say of a pass of the whole model, against every tensor that it holds at its fullest moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.engines.engine import ShortModel
from backhand.engines.memory.parts import (
    GAPS,
    WIDE_GAPS,
    decoder_size,
    estimated_step,
    parts_of,
    second_model_bytes,
    transformers_size,
)
from backhand.engines.memory.shapes import StepShape
from backhand.engines.memory_probe import (
    PROBED_TOKENS,
    MeasuredMemory,
    ProcessBytes,
    TensorBytes,
    peak_of,
    step_bytes,
)
from backhand.engines.short_decoder import short_decoder
from backhand.loop.process_memory import settled_rss_bytes
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.kv_cache import PAGE, KVCache
from backhand.nn.decoder.weights import dense_views, empty_weights, module_shapes
from backhand.nn.families.family import DecoderConfig
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.weight_tiles import drop_scratch
from backhand.options.config import Recompute
from tests.support.allocations import held_at_most
from tests.support.tiny_models import EXPERT_PARAMETERS, tiny_config

SHAPES = {
    "short-rows": StepShape(160, 60, (40,) * 4),
    "long-row": StepShape(192, 180, (192,)),
    "long-row-and-token": StepShape(193, 180, (192, 1)),
    "unlike": StepShape(176, 30, (16, 60, 100)),
    "shared": StepShape(144, 40, (48, 32, 16, 30, 18), (-1, 0, 0, -1, 3)),
}
PLAIN = LoRAConfig(rank=8)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 7},
    "gemma2": {"num_hidden_layers": 6},
    "olmo2": {},
    "lfm2": {},
    "qwen3_5_text": {},
    "bamba": {"num_hidden_layers": 5},
    "falcon_h1": {"num_hidden_layers": 5},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"] * 2},
    "gemma4_text": {},
    "gpt_oss": {"num_hidden_layers": 5},
}


def config_of(family: str, **more: Any) -> DecoderConfig:
    return decoder_config(tiny_config(family, **more).to_dict())


def peaks(
    config: DecoderConfig, shape: StepShape, dtype: torch.dtype, recompute: Recompute, adapter: LoRAConfig, limit: int
) -> tuple[int, int, int]:
    """Of a pass of the whole model: as few blocks say, as it is, and as the headers say."""
    layout = resolve_adapter(adapter, module_shapes(config))
    weights = empty_weights(config, dtype)
    for _, tensor in dense_views(weights, config):
        tensor.normal_(std=0.02)
    decoder = Decoder(config, weights, recompute=recompute)
    lora = LoRAParameters(layout.slots, full_tensors=layout.full_tensors)
    lora.initialise(torch.Generator().manual_seed(0))
    decoder.attach(lora)
    decoder.start_values(lora)
    lora.refresh_compute(dtype)
    size = decoder_size(config, layout, dtype)
    short = short_decoder(config, layout, dtype, torch.device("cpu"), recompute)
    drop_scratch()  # each makes its own, whatever was measured before
    step = step_bytes(short, shape, config.vocab_size, size.head_row_bytes, limit)
    drop_scratch()
    held = peak_of(decoder, [shape], config.vocab_size)
    return sum(step[:2]), held, sum(estimated_step(size, shape, recompute))


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize(
    ("family", "dtype", "shape"),
    [
        ("llama", torch.float32, "short-rows"),
        ("llama", torch.bfloat16, "long-row"),
        ("gemma2", torch.float32, "unlike"),
        ("olmo2", torch.float32, "short-rows"),
        ("lfm2", torch.float32, "long-row"),
        ("qwen3_5_text", torch.float32, "shared"),
        ("bamba", torch.float32, "shared"),
        ("falcon_h1", torch.float32, "unlike"),
        ("nemotron_h", torch.float32, "unlike"),
        ("gemma4_text", torch.float32, "short-rows"),
        ("gpt_oss", torch.float32, "unlike"),
    ],
)
def test_few_blocks_say_what_all_of_them_hold(
    family: str, dtype: torch.dtype, shape: str, recompute: Recompute
) -> None:
    config = config_of(family, **FAMILIES[family])
    measured, held, _ = peaks(config, SHAPES[shape], dtype, recompute, PLAIN, 1024)
    assert 0.96 * held <= measured <= 1.1 * held


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(
    "adapter",
    [
        LoRAConfig(rank=8, layers="last:3"),
        LoRAConfig(rank=8, target_modules=("q_proj",), rank_pattern={"q_proj": 4}),
        LoRAConfig(rank=8, modules_to_save=("lm_head",)),
        LoRAConfig(rank=8, trainable_token_indices=(3, 5)),
    ],
    ids=["upper", "one-module", "whole-head", "token-rows"],
)
def test_any_adapter(adapter: LoRAConfig, recompute: Recompute) -> None:
    config = config_of("llama", num_hidden_layers=7)
    measured, held, _ = peaks(config, SHAPES["short-rows"], torch.float32, recompute, adapter, 1024)
    assert 0.99 * held <= measured <= 1.1 * held


def test_adapted_experts() -> None:
    config = config_of("qwen3_moe", num_hidden_layers=5)
    adapter = LoRAConfig(rank=8, target_parameters=EXPERT_PARAMETERS)
    measured, held, _ = peaks(config, SHAPES["short-rows"], torch.float32, "none", adapter, 1024)
    assert 0.97 * held <= measured <= 1.15 * held


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fewer_tokens_say_no_less_than_all_of_them(dtype: torch.dtype, recompute: Recompute) -> None:
    """In a model whose sizes are more like a real one's; and from headers it is known within a factor."""
    config = config_of("llama", num_hidden_layers=6, hidden_size=192, intermediate_size=512, vocab_size=2000)
    shape = StepShape(512, 200, (32, 96, 128, 256))
    measured, held, estimate = peaks(config, shape, dtype, recompute, PLAIN, 256)
    assert 0.98 * held <= measured <= 1.25 * held
    assert 0.8 * held <= estimate <= 1.9 * held


@pytest.mark.parametrize(
    "shape",
    [
        StepShape(2400, 20, (2400,)),
        StepShape(2400, 20, (30, 970, 700, 700), (-1, 0, 1, 1)),
        StepShape(2400, 20, (1900, *(10,) * 50), (-1, *(0,) * 50)),
    ],
    ids=["row", "pair", "many-answers"],
)
def test_the_first_tokens_of_a_long_document_say_what_it_saves(shape: StepShape) -> None:
    """Attention's output is saved of long documents alone."""
    config = config_of("llama", num_hidden_layers=4)
    measured, held, _ = peaks(config, shape, torch.float32, "none", PLAIN, PROBED_TOKENS)
    assert 0.98 * held <= measured <= 1.1 * held


def test_the_buffers_of_attention_s_kernel_are_counted() -> None:
    """With few documents each head has buffers; in a tree, each task has them for the segments that others continue."""
    config = config_of("llama")
    size = decoder_size(config, resolve_adapter(PLAIN, module_shapes(config)), torch.float32)

    def gaps(lengths: tuple[int, ...], parents: tuple[int, ...] = ()) -> int:
        shape = StepShape(2400, 20, lengths, parents)
        return parts_of(size, shape, estimated_step(size, shape, "none"), 0)["gaps between buffers"]

    none, of_head = gaps((300,) * 8), 2 * 4 * config.head_dim
    assert gaps((2400,)) - none == 2400 * config.num_heads * of_head
    of_group = config.num_key_value_heads * of_head
    assert gaps((2200, 100, 100), (-1, 0, 0)) - none == 3 * 2200 * of_group
    assert gaps((2200, *(10,) * 20), (-1, *(0,) * 20)) - none == 8 * 2200 * of_group
    assert gaps((900, 20, 300, 1100, 20, 50, 10), (-1, 0, 1, -1, 3, 3, -1)) - none == (3 * 920 + 3 * 1100) * of_group


@pytest.mark.parametrize("more", [{}, {"dropout": 0.1}, {"use_dora": True}])
def test_both_engines_count_wide_gaps_for_dropout_and_dora(more: dict[str, Any]) -> None:
    config = config_of("llama")
    layout = resolve_adapter(LoRAConfig(rank=4, **more), module_shapes(config))
    sizes = decoder_size(config, layout, torch.float32), transformers_size({}, 1000, layout, 4)
    assert [size.gaps for size in sizes] == [WIDE_GAPS if more else GAPS] * 2


def test_tensors_are_counted_as_torch_allocates_them() -> None:
    x = torch.ones(100, 100)
    weights = [x]

    def work() -> None:
        y = x @ x
        z = (y.view(-1)[5:], y + weights[0].T)
        del y
        z[1].add_(1)
        del z
        torch.empty(7000)

    with TensorBytes() as counted:
        work()
    assert counted.peak_bytes == pytest.approx(held_at_most(work), abs=64)
    assert counted.peak_bytes == 80_000
    assert counted.current_bytes == 0, "what was there before is not counted, nor views of it"


@pytest.mark.parametrize("limit", [1000, 200, 64, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_is_cut_to_whole_documents(shape: StepShape, limit: int) -> None:
    cut = shape.cut(limit)
    batch = cut.batch(7, torch.device("cpu"))
    assert len(batch.input_ids) == cut.tokens <= max(limit, 1) and int(batch.input_ids.max()) < 7
    assert len(batch.supervised_positions) == cut.supervised_tokens <= shape.supervised_tokens
    assert sum(cut.lengths) == cut.tokens
    assert cut is shape if shape.tokens <= limit else cut.tokens > limit // 3


def test_kernels_of_every_size_are_counted_as_far_as_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "64")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")
    config = config_of("llama")
    size = replace(decoder_size(config, resolve_adapter(PLAIN, module_shapes(config)), torch.float32), kernels=16)
    for sizes, kept in ((3, 48), (3000, 100)):
        shape = replace(SHAPES["long-row"], sizes=sizes)
        found = parts_of(size, shape, estimated_step(size, shape, "none"), 0)
        assert found["compiled kernels"] == kept * 700_000


@pytest.fixture
def measured() -> Callable[..., tuple[MeasuredMemory, list[str]]]:
    config = config_of("llama", num_hidden_layers=4)
    layout = resolve_adapter(PLAIN, module_shapes(config))
    asked: list[str] = []

    def short(recompute: Recompute) -> ShortModel:
        asked.append(recompute)
        return short_decoder(config, layout, torch.float32, torch.device("cpu"), recompute)

    def memory(budget: int | None, process: ProcessBytes | None = None) -> tuple[MeasuredMemory, list[str]]:
        size = decoder_size(config, layout, torch.float32)
        if process is None:
            process = ProcessBytes(lambda: settled_rss_bytes(torch.float32))
            process.now = 1 << 20
        return (
            MeasuredMemory(size, short, 300, process, lambda: asked.append("forget"), budget),
            asked,
        )

    return memory


def test_each_way_is_measured_once(measured: Callable[..., tuple[MeasuredMemory, list[str]]]) -> None:
    memory, asked = measured(None)
    first, again = memory.parts(SHAPES["long-row"], "none"), memory.parts(SHAPES["long-row"], "none")
    assert first == again and asked == ["none", "forget"]
    assert first["process"] > 50 << 20, "measured again once a step's code is there"
    assert memory.parts(SHAPES["long-row"], "block")["kept activations"] < first["kept activations"]


def test_what_cannot_fit_is_not_measured(measured: Callable[..., tuple[MeasuredMemory, list[str]]]) -> None:
    memory, asked = measured(3 << 20)
    assert sum(memory.parts(SHAPES["long-row"], "none").values()) > 3 << 20
    assert asked == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama", "lfm2", "qwen3_5_text", "granite4-h", "falcon_h1", "gemma4_text"])
def test_a_conversation_holds_keys_values_and_states(variant: str, dtype: torch.dtype) -> None:
    """A model that answers during the run holds bytes for each token, and for a row as a whole."""
    config = config_of(variant)
    size = decoder_size(config, resolve_adapter(PLAIN, module_shapes(config)), dtype)
    cache = KVCache(config, 1, 3 * PAGE, dtype=dtype)
    states = sum(state.nbytes for layer in cache.states for state in layer)
    held = sum(part.nbytes for part in (*cache.keys, *cache.values)) + states
    assert 4 * PAGE * size.cache_bytes + size.mixer_state_bytes == held  # with the page of zeros
    assert size.mixer_state_bytes == states and (states > 0) == (
        variant in ("lfm2", "qwen3_5_text", "granite4-h", "falcon_h1")
    )
    without = second_model_bytes(size, 1000, 0)
    assert second_model_bytes(size, 1000, 37) - without == 37 * size.cache_bytes


def test_what_one_base_leaves_in_the_process_is_counted_for_the_other(
    measured: Callable[..., tuple[MeasuredMemory, list[str]]],
) -> None:
    """Each is measured in the same process: kernels that the second compiles are there when the first is trained."""
    resident = {"bytes": 1 << 20}
    process = ProcessBytes(lambda: resident["bytes"])
    first, second = (measured(None, process)[0] for _ in range(2))
    before = first.parts(SHAPES["long-row"], "none")["process"]
    resident["bytes"] = 7 << 20
    second.parts(SHAPES["long-row"], "none")
    assert (before, first.parts(SHAPES["long-row"], "none")["process"]) == (1 << 20, 7 << 20)

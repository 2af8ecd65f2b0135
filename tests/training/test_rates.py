"""What unpacking costs beside products and a token in training, by a clock that is told how long each piece takes."""

from __future__ import annotations

import math

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from torch import Tensor

from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.weights import empty_weights, named_views
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.training.memory import rates
from backhand.training.memory.rates import Rates, products_of, sampled, unpacking_share
from backhand.training.memory.token_seconds import TokenSeconds, numbers_in_blocks
from support.tiny_gguf import write_tiny_gguf
from support.tiny_models import tiny_model
from support.tiny_mxfp4 import IN_BLOCKS, save_packed

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


class Ticking:
    """A clock that moves when a product is computed: by its values, and more where they are unpacked first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, unpacking: float) -> None:
        self.now = 0.0
        self.products: list[tuple[int, int, int]] = []
        both = rates._both

        def ticking(x: Tensor, weight: Tensor | QuantizedMatrix) -> Tensor:
            rows, columns = weight.shape
            self.products.append((rows, columns, len(x)))
            self.now += rows * columns * (len(x) + (0 if isinstance(weight, Tensor) else unpacking))
            return both(x, weight)

        monkeypatch.setattr(rates, "_both", ticking)

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module", params=["llama", "llama-tied", "phi3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    kinds = iter([StorageType.Q8_0, StorageType.Q4_0, StorageType.Q5_1] * 40)
    model = tiny_model(request.param, num_hidden_layers=5, **_SIZES)
    folder = tmp_path_factory.mktemp(request.param)
    return open_model(write_tiny_gguf(model, folder / "tiny.gguf", storage=lambda _: next(kinds)))


def _values(source: ModelSource) -> tuple[int, int]:
    """Of all blocks' matrices, and of the head."""
    config = decoder_config(source.config)
    names = [name for name in source.tensor_names() if name.startswith("model.layers.")]
    blocks = sum(math.prod(source.shape(name)) for name in names if len(source.shape(name)) == 2)
    return blocks, config.vocab_size * config.hidden_size


def test_a_token_meets_every_matrix_once(source: ModelSource) -> None:
    blocks, head = _values(source)
    config = decoder_config(source.config)
    assert sum(rows * columns * count for (rows, columns), count in products_of(config).items()) == blocks + head
    stacks = [sample.parts for sample in sampled(source, config)]
    assert sum(part.row_count * part.columns for stack in stacks for part in stack) == blocks + head
    weights = Decoder.from_source(source, dtype=torch.float32, quantized=True).weights
    block = weights.blocks[2]
    wanted = [block.input, block.output, block.gate_up, block.down]
    for matrix, stack in zip(wanted, stacks[8:12], strict=True):
        assert isinstance(matrix, QuantizedMatrix)
        assert torch.equal(matrix.dense(), QuantizedMatrix(stack, torch.float32).dense())


def test_a_large_model_is_sampled_evenly(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    config = decoder_config(source.config)
    blocks, head = _values(source)
    for share in (0.5, 0.1):
        monkeypatch.setattr(rates, "_SAMPLE_VALUES", share * (blocks + head))
        *of_blocks, of_head = [
            sum(part.row_count * part.columns for part in stack) for stack, _ in sampled(source, config)
        ]
        assert len(of_blocks) == (12 if share == 0.5 else 4)
        assert sum(of_blocks) == pytest.approx(share * blocks, rel=0.05)
        assert of_head == pytest.approx(share * head, rel=0.05)


@pytest.mark.parametrize("tokens", [1, 40, 256, 1000])
def test_the_share_is_the_formula(source: ModelSource, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking that takes as long as the products of seven tokens."""
    clock = Ticking(monkeypatch, unpacking=7)
    found = unpacking_share(source, torch.float32, tokens, clock)
    blocks, head = _values(source)
    wanted = 7 * (blocks + head * math.ceil(tokens / 256)) / (tokens * (blocks + head))
    assert found == pytest.approx(wanted, rel=1e-9)
    assert {count for _, _, count in clock.products} == {min(tokens, 256)}


@pytest.fixture(scope="module", params=["directory", "file"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """gpt-oss, its experts in MXFP4."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "directory":
        save_packed(folder)
        return open_model(folder)
    model = tiny_model("gpt_oss", **IN_BLOCKS)
    packed = {True: StorageType.MXFP4, False: StorageType.F32}
    return open_model(write_tiny_gguf(model, folder / "tiny.gguf", storage=lambda name: packed["_exps" in name]))


def test_experts_are_sampled_as_they_are_stored(mixture: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    config = decoder_config(mixture.config)
    blocks, head = _values(mixture)
    samples = sampled(mixture, config)
    assert sum(part.row_count * part.columns for parts, _ in samples for part in parts) == blocks + head - _ROUTERS
    experts = [parts for parts, met in samples if met == 3 / 11]
    assert len(experts) == 2 * 11 * len(config.layers)
    assert {part.type_id for parts in experts for part in parts} == {int(StorageType.MXFP4)}
    block = Decoder.from_source(mixture, dtype=torch.float32, quantized=True).weights.blocks[1]
    for matrix, stack in zip((block.gate_up, block.down), (experts[22:33], experts[33:44]), strict=True):
        assert isinstance(matrix, QuantizedMatrix)
        rows = [QuantizedMatrix(parts, torch.float32).dense() for parts in stack]
        assert torch.equal(matrix.dense(), torch.cat(rows))
    monkeypatch.setattr(rates, "_SAMPLE_VALUES", 0.1 * (blocks + head))
    few = [parts for parts, met in sampled(mixture, config) if met < 1]
    assert len(few) == 2 * 3
    held = sum(part.row_count * part.columns for parts in few for part in parts)
    every = sum(part.row_count * part.columns for parts in experts for part in parts)
    assert held == pytest.approx(0.1 * every, rel=0.05)


_ROUTERS = 2 * 11 * 64
"""Numbers in matrices that are held dense."""


@pytest.mark.parametrize("tokens", [1, 2, 40, 2000])
def test_the_share_of_experts_is_the_formula(
    mixture: ModelSource, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of eleven are chosen: each is unpacked once, or by so few tokens not always, and multiplied by its own."""
    clock = Ticking(monkeypatch, unpacking=7)
    found = unpacking_share(mixture, torch.float32, tokens, clock)
    blocks, head = _values(mixture)
    names = [name for name in mixture.tensor_names() if ".experts." in name and name.endswith(".weight")]
    experts = sum(math.prod(mixture.shape(name)) for name in names)
    others = blocks - experts - _ROUTERS
    own = tokens * 3 / 11
    unpacked = 7 * (others + experts * min(1.0, own) + head * math.ceil(tokens / 256))
    assert found == pytest.approx(unpacked / (tokens * (others + head) + own * experts), rel=1e-9)
    assert {count for _, _, count in clock.products} == {min(tokens, 256), max(1, min(256, round(own)))}


def test_what_seems_to_cost_less_than_nothing_costs_nothing(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unpacking_share(source, torch.float32, 100, Ticking(monkeypatch, unpacking=-3)) == 0.0


def test_what_the_clock_cannot_tell_costs_nothing(source: ModelSource) -> None:
    assert unpacking_share(source, torch.float32, 40, clock=lambda: 7.0) == 0.0


def test_products_are_those_of_the_shapes(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, head = _values(source)
    for piece in (rates._PIECE_VALUES, 3000):  # whole matrices, and their first rows
        monkeypatch.setattr(rates, "_PIECE_VALUES", piece)
        clock = Ticking(monkeypatch, unpacking=0)
        here = Rates(torch.float32, clock)
        products = products_of(decoder_config(source.config))
        threads = torch.get_num_threads()
        assert here.products_s(products, 512) == pytest.approx((blocks + head) / threads, rel=1e-9)
        measured = len(clock.products)
        here.products_s(products, 300)
        assert len(clock.products) == measured, "nothing is measured twice"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen3_moe"])
def test_a_token_takes_its_products_and_the_rest(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiplication takes 1; whatever else, 5 for each number in a block, and 1000 for a token once."""
    clock = Ticking(monkeypatch, unpacking=0)

    def loss_and_gradients(model: Decoder, batch: PackedBatch, *_: object) -> None:
        config = model.config
        own = sum(rows * columns * count for (rows, columns), count in products_of(config).items())
        clock.now += len(batch.input_ids) * (own + 5 * numbers_in_blocks(config) + 1000)

    monkeypatch.setattr(Decoder, "loss_and_gradients", loss_and_gradients)
    config = decoder_config(tiny_model(family, num_hidden_layers=4).config.to_dict())
    products = sum(rows * columns * count for (rows, columns), count in products_of(config).items())
    wanted = products + 5 * numbers_in_blocks(config)
    assert TokenSeconds(torch.float32, clock).of(config) * torch.get_num_threads() == pytest.approx(wanted, rel=1e-9)


def test_layers_count_by_their_own_sizes_and_experts_as_far_as_they_are_chosen() -> None:
    """Every matrix of a model of several kinds of layers, of experts the chosen part of each stack."""
    for family in ("lfm2", "qwen3_5_text", "qwen3_moe", "mixtral", "gpt_oss"):
        config = decoder_config(tiny_model(family).config.to_dict())
        wanted, of_experts = config.vocab_size * config.hidden_size, 0
        for name, view in named_views(empty_weights(config, torch.float32, "meta"), config):
            if name.startswith("model.layers.") and len(view.shape) == 2:
                wanted += 0 if ".experts." in name else math.prod(view.shape)
                of_experts += math.prod(view.shape) if ".experts." in name else 0
        if config.mixture is not None:
            wanted += of_experts * config.mixture.chosen // config.mixture.experts
        assert sum(rows * columns * count for (rows, columns), count in products_of(config).items()) == wanted, family


def test_a_rest_that_seems_less_than_nothing_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking(monkeypatch, unpacking=0)
    monkeypatch.setattr(Decoder, "loss_and_gradients", lambda *_: None)
    config = decoder_config(tiny_model("llama").config.to_dict())
    products = sum(rows * columns * count for (rows, columns), count in products_of(config).items())
    assert TokenSeconds(torch.float32, clock).of(config) * torch.get_num_threads() == pytest.approx(products, rel=1e-9)


@pytest.mark.smollm2
@pytest.mark.parametrize("tokens", [64, 2048])
def test_the_share_of_a_real_file_is_the_formula(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part of its matrices, and by whole rows: so nearly, that one chunk of the head's more or less would show."""
    source = open_model("smollm2-135m")
    blocks, head = _values(source)
    clock = Ticking(monkeypatch, unpacking=7)
    found = unpacking_share(source, torch.float32, tokens, clock)
    passes = math.ceil(tokens / 256)
    assert found == pytest.approx(7 * (blocks + head * passes) / (tokens * (blocks + head)), rel=1e-3)
    assert {count for _, _, count in clock.products} == {min(tokens, 256)}
    assert {columns for _, columns, _ in clock.products} == {576, 1536}

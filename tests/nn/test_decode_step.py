"""One compiled call for all blocks computes the same as block by block, on every instruction set of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.kernels.builds import load, usable, using
from backhand.kernels.library import proving_kernels
from backhand.nn.decoder.decode_step import decode_step
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.decoding import IncrementalDecoder
from backhand.nn.loading import open_model
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.decode_steps import adapted, peft_model, stepped
from tests.support.parity import decoder_like, relative_error
from tests.support.product_builds import ALIKE
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import VARIANTS, tiny_documents, tiny_model

# Experts, sinks, gates, other mixers than attention, angles of neighbouring features, layers of several sizes.
BLOCK_BY_BLOCK = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "qwen3_5",
    "lfm2",
    "glm",
    "gemma4",
    "granite4-h",
    "granite4-experts",
    "bamba",
    "nemotron",
    "falcon",
)
TAKEN = tuple(variant for variant in VARIANTS if not variant.startswith(BLOCK_BY_BLOCK))
DIFFERENT = ("llama", "gemma2", "granite", "olmo2")

pytestmark = pytest.mark.skipif(not usable(), reason="the compiled library is not built")


@pytest.fixture(params=usable())
def build(request):
    with using(load(request.param)), proving_kernels():
        yield request.param


def test_which_families_are_taken() -> None:
    for variant in VARIANTS:
        decoder = adapted(variant)
        cache = IncrementalDecoder(decoder).cache
        found = decode_step(decoder, decoder.block_adapters(None), cache)
        assert (found is not None) == (variant in TAKEN), variant


# The widest build in every family, and the others whose source is not the same in float64 in those that differ most.
@pytest.mark.parametrize(
    ("build", "variant"),
    [
        (build, variant)
        for build in usable()
        for variant in (TAKEN if build == usable()[-1] else () if build in ALIKE else DIFFERENT)
    ],
    indirect=["build"],
)
def test_a_token_is_the_same_as_block_by_block(build: str, variant: str) -> None:
    decoder = adapted(variant)
    assert relative_error(stepped(decoder, whole=True), stepped(decoder, whole=False)) < 1e-12
    decoder.detach()
    assert relative_error(stepped(decoder, whole=True), stepped(decoder, whole=False)) < 1e-12


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gemma3_text", "qwen3"])
def test_rows_of_several_lengths_step_together(build: str, variant: str) -> None:
    """More than one pass over a matrix takes, and fewer in the end."""
    decoder = adapted(variant)
    documents = [one.tolist() for one in tiny_documents([3 + row % 11 for row in range(19)], seed=4)]
    state = IncrementalDecoder(decoder, rows=19, capacity=4)
    state.extend(state.cache.add_rows(19), [ids[:-2] for ids in documents])
    state.step([ids[-2] for ids in documents])
    assert state._decode_step is not None
    for row in reversed(range(5, 19)):
        state.cache.remove(row)
    found = state.step([ids[-1] for ids in documents[:5]])
    for row in range(5):
        assert relative_error(found[row], decoder.logits(torch.tensor(documents[row]))[-1]) < 1e-12


@pytest.mark.skipif("amx" not in usable(), reason="this processor has no AMX")
@pytest.mark.parametrize(("variant", "scaling"), [("llama", 1.7), ("gemma3_text", 0.5), ("qwen3", 2.0)])
def test_with_amx_a_row_has_the_bits_of_a_long_pass(variant: str, scaling: float) -> None:
    """Documents of a few tokens and of many, together and alone."""
    decoder = decoder_like(peft_model(variant), scaling, dtype=torch.bfloat16)
    lengths = [3, 40, 41, 70, 12, 5, 10, 3, 4, 9]
    documents = [one.tolist() for one in tiny_documents(lengths, seed=4)]
    with using(load("amx")):
        every = decoder.logits(torch.tensor([token for ids in documents for token in ids]), lengths)
        right = every.split(lengths)
        for chosen in (range(10), *([row] for row in range(10)), [7, 8], [0, 3]):
            rows = [documents[row] for row in chosen]
            packed = decoder.logits(torch.tensor([token for ids in rows for token in ids]), [len(ids) for ids in rows])
            assert torch.equal(packed, torch.cat([right[row] for row in chosen])), chosen
            state = IncrementalDecoder(decoder, rows=len(rows), capacity=4, head=Decoder.head)
            found = [state.extend(state.cache.add_rows(len(rows)), [ids[:-2] for ids in rows])]
            found += [state.step([ids[place] for ids in rows]) for place in (-2, -1)]
            assert state._decode_step is not None
            for back, logits in zip((3, 2, 1), found, strict=True):
                assert torch.equal(logits, torch.stack([right[row][-back] for row in chosen])), (chosen, back)


@pytest.mark.skipif("amx" not in usable(), reason="this processor has no AMX")
@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
def test_with_amx_a_token_far_after_its_windows_beginning_has_the_bits_of_a_pass(variant: str) -> None:
    """Keys before the window are left out by whole steps: at every offset within one."""
    decoder = decoder_like(peft_model(variant), 1.7, dtype=torch.bfloat16)
    longer, shorter = (one.tolist() for one in tiny_documents([150, 75], seed=5))
    with using(load("amx")):
        right = [decoder.logits(torch.tensor(ids)) for ids in (longer, shorter)]
        state = IncrementalDecoder(decoder, rows=2, capacity=4, head=Decoder.head)
        state.extend(state.cache.add_rows(2), [longer[:80], shorter[:5]])
        for place in range(70):
            logits = state.step([longer[80 + place], shorter[5 + place]])
            assert torch.equal(logits[0], right[0][80 + place]), place
            assert torch.equal(logits[1], right[1][5 + place]), place
        assert state._decode_step is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", DIFFERENT)
def test_it_errs_no_more_than_block_by_block(build: str, variant: str, dtype: torch.dtype) -> None:
    exact = stepped(adapted(variant), whole=False)
    errors = [relative_error(stepped(adapted(variant, dtype), whole=whole), exact) for whole in (True, False)]
    assert errors[0] < max(1.5 * errors[1], 1e-6)


def test_a_quick_row_of_a_quantized_base_errs_no_more_than_block_by_block(build: str, tmp_path: Path) -> None:
    """A single answer that nothing is compared with, by an adapted base in the blocks of its file."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    model = tiny_model("llama", **sizes)
    source = open_model(write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=StorageType.Q8_0))
    found = []
    for dtype, quantized in ((torch.float64, False), (torch.bfloat16, True)):
        decoder = Decoder.from_source(source, dtype=dtype, quantized=quantized)
        layout = resolve_adapter(LoRAConfig(rank=5, alpha=8.5), decoder.module_shapes())
        lora = LoRAParameters(layout.slots)
        decoder.attach(lora)
        lora.values.copy_(0.1 * torch.randn(lora.values.shape, generator=torch.Generator().manual_seed(5)))
        lora.refresh_compute(dtype)
        found.append(decoder)
    exact, narrow = found
    assert IncrementalDecoder(narrow)._quick
    right = stepped(exact, whole=False, rows=1)
    errors = [relative_error(stepped(narrow, whole=whole, rows=1), right) for whole in (True, False)]
    assert errors[0] < max(1.5 * errors[1], 1e-6)
    narrow.detach()
    assert relative_error(stepped(narrow, whole=True, rows=1), right) > 10 * errors[0], "the adapter counts"


def test_the_same_bits_whatever_the_threads(build: str) -> None:
    decoder, threads = adapted("qwen3", torch.bfloat16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = stepped(decoder, whole=True)
        for count in (2, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(stepped(decoder, whole=True), once)
    finally:
        torch.set_num_threads(threads)


def with_adapter(config: LoRAConfig) -> tuple[Decoder, LoRAParameters]:
    decoder = adapted("llama")
    decoder.detach()
    layout = resolve_adapter(config, decoder.module_shapes())
    lora = LoRAParameters(layout.slots, dtype=torch.float64, full_tensors=layout.full_tensors)
    decoder.attach(lora)
    decoder.start_values(lora)
    lora.values.add_(0.05 * torch.randn(lora.values.shape, generator=torch.Generator().manual_seed(5)))
    lora.refresh_compute(decoder.dtype)
    return decoder, lora


def test_weights_that_the_adapter_trains_are_those_of_now(build: str) -> None:
    decoder, lora = with_adapter(
        LoRAConfig(rank=3, alpha=8.5, target_modules=("q_proj",), modules_to_save=("o_proj", "input_layernorm"))
    )
    state = IncrementalDecoder(decoder)
    state.cache.add_rows(1)
    for change in (1.0, 1.5):
        lora.values.mul_(change)
        lora.refresh_compute(decoder.dtype)
        decoder.refresh()
        state.cache.truncate(0, 0)
        state.extend([0], [[3, 4, 5]])
        assert relative_error(state.step([6])[0], decoder.logits(torch.tensor([3, 4, 5, 6]))[-1]) < 1e-12


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_factors_goes_block_by_block(build: str, more: dict[str, bool]) -> None:
    decoder, _ = with_adapter(LoRAConfig(rank=3, alpha=8.5, target_modules=("k_proj", "down_proj"), **more))
    assert decode_step(decoder, decoder.block_adapters(None), IncrementalDecoder(decoder).cache) is None

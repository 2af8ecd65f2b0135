from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch

from backhand.kernels.builds import torch_form
from backhand.nn.decoder import block, decoding
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.decoding import IncrementalDecoder
from backhand.nn.decoder.kv_cache import PAGE
from backhand.ops.rms_norm import rms_norm_forward
from tests.support.parity import decoder_like, relative_error
from tests.support.tiny_models import VARIANTS, attach_lora, tiny_documents, tiny_model

SCALING = 8.5 / 5
TOLERANCE = 1e-5


@cache
def peft_model(variant: str) -> Any:
    return attach_lora(tiny_model(variant), rank=5, alpha=8.5, seed=7)


def adapted_decoder(variant: str) -> Decoder:
    return decoder_like(peft_model(variant), SCALING)


def ids(length: int, seed: int = 2) -> list[int]:
    return tiny_documents([length], seed=seed)[0].tolist()


def expected_at(decoder: Decoder, tokens: Sequence[int], positions: range) -> list[torch.Tensor]:
    """Logits at these positions by the whole forward; each of its own text, where the angles depend on its length."""
    if decoder.config.length_limits:
        return [full(decoder, tokens[: position + 1])[-1] for position in positions]
    return list(full(decoder, tokens)[positions.start : positions.stop])


def full(decoder: Decoder, tokens: Sequence[int]) -> torch.Tensor:
    return decoder.logits(torch.tensor(tokens))


# Without an adapter one of each kind of mixer.
@pytest.mark.parametrize(
    ("variant", "adapted"),
    [
        *((variant, True) for variant in VARIANTS),
        *(
            (variant, False)
            for variant in ("llama", "gemma3_text", "lfm2", "qwen3_5_text", "bamba", "nemotron_h", "gpt_oss")
        ),
    ],
)
def test_one_row_token_by_token_equals_the_full_forward(variant: str, adapted: bool) -> None:
    decoder = adapted_decoder(variant)
    if not adapted:
        decoder.detach()
    tokens = ids(37)
    expected = expected_at(decoder, tokens, range(37))
    state = IncrementalDecoder(decoder, rows=1, capacity=16)
    state.cache.add_rows(1)
    assert relative_error(state.extend([0], [tokens[:11]])[0], expected[10]) < TOLERANCE
    for position in range(11, 37):
        assert relative_error(state.step([tokens[position]])[0], expected[position]) < TOLERANCE
    assert state.cache.lengths == [37]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_different_lengths_equal_each_alone(variant: str) -> None:
    decoder = adapted_decoder(variant)
    lengths = [3, 21, 9, 9, 1]
    rows = [ids(length + 12, seed=length) for length in lengths]
    expected = [expected_at(decoder, row, range(len(row))) for row in rows]
    state = IncrementalDecoder(decoder, rows=6, capacity=8)
    state.cache.add_rows(5)
    logits = state.extend(range(5), [row[:length] for row, length in zip(rows, lengths, strict=True)])
    for row, length in enumerate(lengths):
        assert relative_error(logits[row], expected[row][length - 1]) < TOLERANCE
    for offset in range(12):
        logits = state.step([row[length + offset] for row, length in zip(rows, lengths, strict=True)])
        for row, length in enumerate(lengths):
            assert relative_error(logits[row], expected[row][length + offset]) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_extending_rows_that_hold_tokens_equals_the_full_forward(variant: str) -> None:
    decoder = adapted_decoder(variant)
    # Rows 1 and 2 are alike, seen and new, so that they share one kernel call; row 0 is fresh in the second round.
    seen, new = [0, 13, 13, 6], [7, 10, 10, 2]
    rows = [ids(s + n, seed=20 + i) for i, (s, n) in enumerate(zip(seen, new, strict=True))]
    state = IncrementalDecoder(decoder, rows=4, capacity=8)
    state.cache.add_rows(4)
    state.extend([3, 1, 2], [rows[3][:6], rows[1][:13], rows[2][:13]])
    logits = state.extend(range(4), [row[s:] for row, s in zip(rows, seen, strict=True)])
    for row, tokens in enumerate(rows):
        assert relative_error(logits[row], full(decoder, tokens)[-1]) < TOLERANCE


@pytest.mark.parametrize(
    "variant", ["llama", "gemma3_text", "lfm2", "qwen3_5_text", "granite4-h", "falcon_h1", "nemotron_h"]
)
def test_long_prompts_pass_in_chunks(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CHUNK_TOKENS", 10)
    decoder = adapted_decoder(variant)
    rows = [ids(length, seed=length) for length in (4, 33, 8, 10)]
    state = IncrementalDecoder(decoder, rows=4, capacity=8)
    state.cache.add_rows(4)
    logits = state.extend(range(4), rows)
    for row, tokens in enumerate(rows):
        assert relative_error(logits[row], full(decoder, tokens)[-1]) < TOLERANCE


def test_a_row_is_cut_only_where_it_fits_into_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CHUNK_TOKENS", 10)
    assert decoding._chunks([4, 8, 2, 25]) == [
        [(0, 0, 4)],
        [(1, 0, 8), (2, 0, 2)],
        [(3, 0, 10)],
        [(3, 10, 20)],
        [(3, 20, 25)],
    ]


@pytest.mark.parametrize("variant", ["mistral", "lfm2", "qwen3_5_text"])
def test_a_removed_row_gives_its_number_to_the_last_one(variant: str) -> None:
    decoder = adapted_decoder(variant)
    rows = [ids(length, seed=length) for length in (5, 12, 17)]
    state = IncrementalDecoder(decoder, rows=3, capacity=8)
    state.cache.add_rows(3)
    state.extend(range(3), rows)
    assert state.cache.remove(0) == 2
    assert state.cache.lengths == [17, 12]
    logits = state.step([5, 6])
    assert relative_error(logits[0], full(decoder, [*rows[2], 5])[-1]) < TOLERANCE
    assert relative_error(logits[1], full(decoder, [*rows[1], 6])[-1]) < TOLERANCE
    assert state.cache.remove(1) is None
    assert state.cache.add_rows(2) == range(1, 3)
    assert state.cache.lengths == [18, 0, 0]
    with pytest.raises(ValueError, match="do not fit"):
        state.cache.add_rows(1)


@pytest.mark.parametrize("variant", ["qwen3", "phi3-longrope", "lfm2", "lfm2-biases", "qwen3_5_text"])
def test_a_shared_prefix_is_computed_once_and_copied(variant: str) -> None:
    """Or anew, where the angles change with the row's length."""
    decoder = adapted_decoder(variant)
    prefix, endings = ids(14), [ids(4, seed=8), ids(6, seed=9), ids(4, seed=10)]
    shared = IncrementalDecoder(decoder, capacity=14)
    shared.cache.add_rows(1)
    shared.extend([0], [prefix])
    state = IncrementalDecoder(decoder, rows=4, capacity=2)
    state.cache.add_rows(1)
    state.extend([0], [[7, 8]])
    state.cache.copy_row(shared.cache, 0, state.cache.add_rows(3))
    assert state.cache.lengths == [2, 14, 14, 14]
    logits = state.extend(range(1, 4), endings)
    for row, ending in enumerate(endings):
        assert relative_error(logits[row], full(decoder, prefix + ending)[-1]) < TOLERANCE


@pytest.mark.parametrize("form", [torch_form, nullcontext], ids=["torch", "compiled"])
@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "lfm2", "gemma4_text"])
def test_rows_that_begin_alike_hold_it_once(variant: str, form: Callable[[], AbstractContextManager[None]]) -> None:
    """Each goes on by itself after it, and what one releases the others still have."""
    decoder = adapted_decoder(variant)
    length = 2 * PAGE + 5
    prompt, answers = ids(length), [ids(5, seed=seed) for seed in range(3, 7)]
    state = IncrementalDecoder(decoder, rows=5, capacity=8)
    cache = state.cache
    with form():
        state.extend(cache.add_rows(1), [prompt])
        cache.copy_row(cache, 0, cache.add_rows(3))
        assert cache.pages_in_use == 3 and all(torch.equal(row, cache.places[0]) for row in cache.places[:4])
        state.step([answer[0] for answer in answers])
        assert cache.pages_in_use == 2 + 4, "of the page in which they part each has its own"
        shared, own = cache.places[:4, : 2 * PAGE], cache.places[:4, 2 * PAGE : length + 1]
        assert bool((shared == shared[0]).all()) and own.unique().numel() == own.numel()
        cache.remove(0)  # row 3 takes its number
        rows = [answers[3], answers[1], answers[2]]
        logits = torch.empty(0)
        for place in range(1, 5):
            logits = state.step([row[place] for row in rows])
        for found, row in zip(logits, rows, strict=True):
            assert relative_error(found, full(decoder, prompt + row)[-1]) < TOLERANCE
        cache.truncate(1, PAGE + 3)  # in the middle of a page that others hold
        assert cache.lengths[1] == (0 if any(cache.states) else PAGE + 3)
        new = [*prompt[cache.lengths[1] : PAGE + 3], 4, 5]
        assert relative_error(state.extend([1], [new])[0], full(decoder, [*prompt[: PAGE + 3], 4, 5])[-1]) < TOLERANCE
        logits = state.step([7, 7, 7])
        assert relative_error(logits[0], full(decoder, [*prompt, *rows[0], 7])[-1]) < TOLERANCE
        assert relative_error(logits[2], full(decoder, [*prompt, *rows[2], 7])[-1]) < TOLERANCE
    for _ in range(3):
        cache.remove(0)
    assert cache.pages_in_use == 0 and cache.places.count_nonzero() == 0


@pytest.mark.parametrize("variant", ["llama3", "phi3-longrope"])
def test_a_truncated_row_continues_differently(variant: str) -> None:
    decoder = adapted_decoder(variant)
    tokens = ids(20)
    state = IncrementalDecoder(decoder, capacity=8)
    state.cache.add_rows(1)
    state.extend([0], [tokens])
    state.cache.truncate(0, 12)
    logits = state.extend([0], [[4, 5, 6]])
    assert relative_error(logits[0], full(decoder, [*tokens[:12], 4, 5, 6])[-1]) < TOLERANCE


@pytest.mark.parametrize("variant", ["lfm2", "lfm2-biases", "qwen3_5_text", "granite4-h", "falcon_h1", "nemotron_h"])
def test_a_row_with_a_state_is_emptied_where_it_would_be_cut(variant: str) -> None:
    decoder = adapted_decoder(variant)
    tokens = ids(20)
    state = IncrementalDecoder(decoder, rows=2, capacity=8)
    state.cache.add_rows(2)
    state.extend([0, 1], [tokens, tokens[:9]])
    assert state.cache.truncate(1, 9) == 9 and state.cache.truncate(0, 12) == 0
    assert state.cache.lengths == [0, 9] and state.cache.tokens == [[], tokens[:9]]
    logits = state.extend([0, 1], [[*tokens[:12], 4, 5, 6], [7]])
    assert relative_error(logits[0], full(decoder, [*tokens[:12], 4, 5, 6])[-1]) < TOLERANCE
    assert relative_error(logits[1], full(decoder, [*tokens[:9], 7])[-1]) < TOLERANCE


@pytest.mark.parametrize("variant", ["lfm2", "lfm2-biases", "qwen3_5_text", "granite4-h", "falcon_h1", "nemotron_h"])
def test_a_state_that_was_left_in_the_middle_is_not_used(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption between two layers: some have the new token in their states, and others do not."""
    decoder = adapted_decoder(variant)
    tokens = ids(10)
    state = IncrementalDecoder(decoder)
    state.cache.add_rows(1)
    state.extend([0], [tokens])
    with monkeypatch.context() as patched:
        calls = iter([None, None])

        def interrupted(*arguments: Any, **options: Any) -> Any:
            if next(calls, "over") == "over":
                raise KeyboardInterrupt
            return block.mlp_sublayer_forward(*arguments, **options)

        patched.setattr(decoding, "mlp_sublayer_forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            state.step([5])
    assert state.cache.lengths == [10]
    with pytest.raises(ValueError, match="row 0 was interrupted during an append"):
        state.step([5])
    assert state.cache.truncate(0, 10) == 0
    logits = state.extend([0], [[*tokens, 8]])
    assert relative_error(logits[0], full(decoder, [*tokens, 8])[-1]) < TOLERANCE


@pytest.mark.parametrize("variant", ["lfm2", "qwen3_5_text"])
def test_a_row_that_is_taken_into_use_again_has_no_state(variant: str) -> None:
    decoder = adapted_decoder(variant)
    state = IncrementalDecoder(decoder)
    state.cache.add_rows(1)
    state.extend([0], [ids(9)])
    state.cache.remove(0)
    state.cache.add_rows(1)
    assert relative_error(state.extend([0], [[3, 4]])[0], full(decoder, [3, 4])[-1]) < TOLERANCE


def test_bfloat16_errs_no_more_than_the_full_forward() -> None:
    exact = adapted_decoder("llama")
    narrow = decoder_like(peft_model("llama"), SCALING, dtype=torch.bfloat16)
    tokens = ids(40)
    expected = full(exact, tokens)[30:]
    state = IncrementalDecoder(narrow)
    state.cache.add_rows(1)
    state.extend([0], [tokens[:30]])
    cached = torch.cat([state.step([token]) for token in tokens[30:]])
    assert relative_error(cached, expected) < 1.5 * relative_error(full(narrow, tokens)[30:], expected)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted-head", "base"])
def test_the_likeliest_logits_are_not_rounded(adapted: bool) -> None:
    targets = [*(f"{part}_proj" for part in "qkv"), "lm_head"]
    model = attach_lora(tiny_model("llama"), rank=5, alpha=8.5, target_modules=targets)
    decoder = decoder_like(model, SCALING, dtype=torch.bfloat16)
    if not adapted:
        decoder.detach()
    x = torch.randn(3, decoder.config.hidden_size).bfloat16()
    # Large, as trained models' are, so that rounding is plain to see.
    decoder.weights.final_norm.mul_(20)
    logits = decoding.head_logits(decoder, x)
    normed, _ = rms_norm_forward(x, decoder.weights.final_norm, decoder.config.norm_eps)
    weight = decoder.weights.head.double()
    factors = decoder.head_factors()
    if factors is not None:
        weight = weight + factors.scaling * (factors.lora_B.double() @ factors.lora_A.double())
    expected = normed.double() @ weight.T
    likeliest = expected.topk(decoding.EXACT_CANDIDATES - 6).indices
    assert relative_error(logits.gather(1, likeliest), expected.gather(1, likeliest)) < 1e-6
    assert relative_error(decoder.head(x).gather(1, likeliest), expected.gather(1, likeliest)) > 1e-4
    assert relative_error(logits, expected) < 1e-2


def test_room_after_a_row_holds_no_stray_values() -> None:
    state = IncrementalDecoder(adapted_decoder("llama"), rows=2, capacity=5)
    state.cache.add_rows(2)
    state.extend([0, 1], [ids(3), ids(30)])
    assert state.cache.places[0, 3:].count_nonzero() == 0
    for buffer in (*state.cache.keys, *state.cache.values):
        assert buffer[:, :PAGE].count_nonzero() == 0


def test_a_single_row_is_read_where_it_lies() -> None:
    """After it grew, and after it was cut and went on; the numbers are those of a copy."""
    state = IncrementalDecoder(adapted_decoder("gemma2"), capacity=4)
    cache = state.cache
    state.extend(cache.add_rows(1), [ids(PAGE + 3)])
    for length in (PAGE + 3, 5):
        cache.truncate(0, length)
        for new in ids(5 * PAGE):
            state.step([new])
        places = cache.places[:, 2 : cache.lengths[0]]
        views, copies = cache.read(1, cache.where(places)), cache.read(1, places)
        for view, copy, buffer in zip(views, copies, (cache.keys[1], cache.values[1]), strict=True):
            assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() != copy.data_ptr()
            assert torch.equal(view, copy)


def test_pages_in_another_order_are_copied() -> None:
    """Though the last is as far from the first as it would be in one piece."""
    cache = IncrementalDecoder(adapted_decoder("gemma2"), capacity=4 * PAGE).cache
    order = torch.cat([torch.arange(PAGE) + page * PAGE for page in (1, 3, 2, 4)])[None]
    assert isinstance(cache.where(order), torch.Tensor)
    assert cache.where(order.sort().values) == slice(PAGE, 5 * PAGE)


def test_what_an_interrupted_step_reserved_is_not_shared() -> None:
    """Each row takes its own page after the full pages that both hold."""
    decoder = adapted_decoder("gemma2")
    prompt, state = ids(2 * PAGE), IncrementalDecoder(decoder, rows=2, capacity=8)
    cache = state.cache
    state.extend(cache.add_rows(1), [prompt])
    cache.reserve([0], [1])  # and here it was interrupted
    cache.copy_row(cache, 0, cache.add_rows(1))
    assert cache.places[1, 2 * PAGE :].count_nonzero() == 0
    logits = state.step([5, 6])
    assert cache.places[0, 2 * PAGE] != cache.places[1, 2 * PAGE]
    for found, new in zip(logits, (5, 6), strict=True):
        assert relative_error(found, full(decoder, [*prompt, new])[-1]) < TOLERANCE


def test_wrong_calls_are_refused() -> None:
    state = IncrementalDecoder(adapted_decoder("llama"), rows=2)
    state.cache.add_rows(2)
    with pytest.raises(ValueError, match="at least one new token"):
        state.extend([0, 1], [[3], []])
    with pytest.raises(ValueError, match="1 tokens for 2 rows"):
        state.step([3])

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from backhand import printing
from backhand.generation import completer as batch
from backhand.generation.completer import EngineCompleter, complete_greedily, shared_length
from backhand.nn.decoder import decoding
from backhand.nn.decoder.decoder import Decoder
from tests.support.in_memory import InMemoryModel
from tests.support.parity import decoder_like
from tests.support.tiny_models import FAMILIES, attach_lora, tiny_documents, tiny_model

NEW_TOKENS = 12


@cache
def base_model(family: str) -> Any:
    # A tied head with random weights repeats the last token, which any cache would get right.
    return tiny_model(family, tie_word_embeddings=False)


def base_decoder(family: str = "llama") -> Decoder:
    model = base_model(family)
    return Decoder.from_source(InMemoryModel(model.config.to_dict(), model.state_dict()), dtype=torch.float32)


def prompts(*lengths: int, prefix: int = 0) -> list[list[int]]:
    shared = tiny_documents([prefix], seed=5)[0].tolist()
    return [shared + tiny_documents([n], seed=50 + i)[0].tolist() for i, n in enumerate(lengths)]


def transformers_greedy(model: Any, prompt: list[int], stop_ids: list[int]) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=0,
    )
    completion: list[int] = output[0, len(prompt) :].tolist()
    return completion[:-1] if completion and completion[-1] in stop_ids else completion


def stops_for(decoder: Decoder, asked: list[list[int]]) -> list[int]:
    """A token that some answers hold early and others do not, so that rows leave the batch at different times."""
    answers = complete_greedily(decoder, asked, max_new_tokens=NEW_TOKENS, stop_ids=())
    return [answers[0][3], answers[1][6]]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_generate(family: str) -> None:
    decoder = base_decoder(family)
    asked = prompts(3, 21, 9, 9, 1)
    stop_ids = stops_for(decoder, asked)
    expected = [transformers_greedy(base_model(family), prompt, stop_ids) for prompt in asked]
    assert len({len(answer) for answer in expected}) > 1
    assert complete_greedily(decoder, asked, max_new_tokens=NEW_TOKENS, stop_ids=stop_ids) == expected


@pytest.mark.parametrize("family", ["llama3", "gemma3_text"])
def test_adapted_answers_are_those_of_peft(family: str) -> None:
    adapted = attach_lora(tiny_model(family, tie_word_embeddings=False), rank=5, alpha=8.5)
    decoder = decoder_like(adapted, 8.5 / 5)
    asked = prompts(5, 12)
    expected = [transformers_greedy(adapted, prompt, []) for prompt in asked]
    assert complete_greedily(decoder, asked, max_new_tokens=NEW_TOKENS, stop_ids=()) == expected
    decoder.detach()
    assert complete_greedily(decoder, asked, max_new_tokens=NEW_TOKENS, stop_ids=()) != expected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_the_batch_changes_nothing(batch_size: int) -> None:
    decoder = base_decoder("mistral")
    asked = prompts(3, 21, 9, 9, 1, 14, 2, 30)
    stop_ids = stops_for(decoder, asked)
    alone = [
        complete_greedily(EngineCompleter(decoder), [prompt], max_new_tokens=NEW_TOKENS, stop_ids=stop_ids)[0]
        for prompt in asked
    ]
    reported: list[int] = []
    together = complete_greedily(
        decoder, asked, max_new_tokens=NEW_TOKENS, stop_ids=stop_ids, batch_size=batch_size, on_done=reported.append
    )
    assert together == alone
    assert sorted(reported) == list(range(len(asked)))


def test_a_shared_beginning_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = base_decoder("gemma3_text")
    asked = prompts(3, 7, 7, 2, prefix=20)
    tokens_seen: list[int] = []
    embed = decoder.embed
    monkeypatch.setattr(decoder, "embed", lambda ids: tokens_seen.append(len(ids)) or embed(ids))
    shared = complete_greedily(decoder, asked, max_new_tokens=4, stop_ids=(), batch_size=4)
    assert tokens_seen[:2] == [20, 19]
    monkeypatch.setattr(batch, "SHORTEST_SHARED_PREFIX", 1000)
    assert complete_greedily(decoder, asked, max_new_tokens=4, stop_ids=(), batch_size=4) == shared
    assert tokens_seen[5] == 4 * 20 + 19


def test_a_conversation_goes_on_from_a_state_and_one_that_parts_inside_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A state summarizes the whole text before it: there is none of a text's beginning."""
    decoder = base_decoder("lfm2")
    completer, asked = EngineCompleter(decoder), prompts(9)[0]
    computed: list[int] = []
    embed = decoder.embed
    monkeypatch.setattr(decoder, "embed", lambda ids: computed.append(len(ids)) or embed(ids))

    def answered(prompt: list[int]) -> list[int]:
        computed.clear()
        (answer,) = complete_greedily(completer, [prompt], max_new_tokens=NEW_TOKENS, stop_ids=())
        assert answer == transformers_greedy(base_model("lfm2"), prompt, [])
        return answer

    first = answered(asked)
    assert computed[0] == len(asked)
    answered([*asked, *first, 7, 8])
    assert computed[0] == 3  # the answer's last token has not been computed yet
    answered([*asked, *first[:2], 9])
    assert computed[0] == len(asked) + 3


@pytest.mark.parametrize(
    ("asked", "length"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 1), ([[5, 6]], 1), ([[1], [2]], 0), ([[7, 7], [7, 7]], 1)],
)
def test_length_of_the_shared_beginning(asked: list[list[int]], length: int) -> None:
    assert shared_length(asked) == length


def test_few_rows_at_once_where_keys_and_values_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = base_decoder()
    asked = prompts(3, 9, 4)
    expected = complete_greedily(decoder, asked, max_new_tokens=5, stop_ids=())
    monkeypatch.setattr(batch, "CACHE_BYTES", 1)
    rows: list[int] = []
    head = decoding.head_logits
    monkeypatch.setattr(decoding, "head_logits", lambda decoder, x: rows.append(len(x)) or head(decoder, x))
    assert complete_greedily(decoder, asked, max_new_tokens=5, stop_ids=()) == expected
    assert set(rows) == {1}


def test_a_prefix_of_all_prompts_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    capacities: list[int] = []

    class Recorded(decoding.IncrementalDecoder):
        def __init__(self, *args: Any, capacity: int, **kwargs: Any) -> None:
            capacities.append(capacity)
            super().__init__(*args, capacity=capacity, **kwargs)

    monkeypatch.setattr(batch, "IncrementalDecoder", Recorded)
    complete_greedily(base_decoder(), prompts(3, 7, 7, 2, prefix=20), max_new_tokens=4, stop_ids=())
    assert capacities == [20, 20 + 3 + 7 + 7 + 2 + 4 * 4]


def test_nothing_asked_nothing_answered() -> None:
    assert complete_greedily(base_decoder(), [], max_new_tokens=5, stop_ids=()) == []
    assert complete_greedily(base_decoder(), [[3]], max_new_tokens=0, stop_ids=()) == [[]]


def test_a_row_that_is_given_up_ends_there_and_the_others_go_on() -> None:
    decoder = base_decoder()
    asked = prompts(3, 9, 4)
    whole = complete_greedily(decoder, asked, max_new_tokens=6, stop_ids=())
    reported: list[int] = []
    completions = complete_greedily(
        decoder,
        asked,
        max_new_tokens=6,
        stop_ids=(),
        on_done=reported.append,
        give_up=lambda number, ids: number == 1 and len(ids) == 2,
    )
    assert completions == [whole[0], whole[1][:2], whole[2]]
    assert sorted(reported) == [0, 1, 2]


def test_the_time_left_follows_the_tokens_of_answers_in_work(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, asked, shown = base_decoder(), prompts(*range(3, 15)), list[tuple[float, str]]()
    clock = [0.0]
    monkeypatch.setattr(printing.time, "monotonic", lambda: clock[0])
    step = decoding.IncrementalDecoder.step

    def slow(state: Any, tokens: Any) -> Any:
        clock[0] += 10.0
        shown.append((clock[0], printing.now()))
        return step(state, tokens)

    monkeypatch.setattr(decoding.IncrementalDecoder, "step", slow)
    with printing.counting("answers", len(asked), "prompts") as done:
        # One answer ends early, the others at the limit of 20 tokens.
        complete_greedily(
            decoder, asked, max_new_tokens=20, stop_ids=(), on_done=done, give_up=lambda number, _: number == 0
        )
    of_steps = dict(shown)
    assert of_steps[100.0] == "answers, 1 of 12 prompts, at most about 1 min 25 s left"  # 90 s are left
    assert of_steps[180.0] == "answers, 1 of 12 prompts, at most about 18 s left"

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from backhand import printing
from backhand.adapters.config import LoRAConfig
from backhand.adapters.inject import inject
from backhand.generation.completer import complete_greedily
from backhand.generation.transformers_completer import TransformersCompleter
from tests.support.tiny_models import tiny_documents, tiny_model


def tiny_gpt2() -> Any:
    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=101, n_embd=24, n_layer=2, n_head=3, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def tiny_mamba() -> Any:
    torch.manual_seed(4)
    config = transformers.MambaConfig(vocab_size=101, hidden_size=24, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


MAKERS = {"gpt2": tiny_gpt2, "mamba": tiny_mamba}


@cache
def model(kind: str) -> Any:
    return MAKERS[kind]()


def prompts(*lengths: int) -> list[list[int]]:
    return [tiny_documents([n], seed=70 + i, vocab_size=101)[0].tolist() for i, n in enumerate(lengths)]


def greedy_by_full_forward(reference: Any, prompt: list[int], new_tokens: int, stop_ids: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            token = int(reference(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_answers_are_those_of_full_forwards_whatever_the_cache(kind: str) -> None:
    asked = prompts(5, 3, 5, 9, 5)
    free = [greedy_by_full_forward(model(kind), prompt, 8, []) for prompt in asked]
    stop_ids = [free[0][2], free[3][5]]
    expected = [greedy_by_full_forward(model(kind), prompt, 8, stop_ids) for prompt in asked]
    for batch_size in (2, 64):
        answers = complete_greedily(
            TransformersCompleter(model(kind)), asked, max_new_tokens=8, stop_ids=stop_ids, batch_size=batch_size
        )
        assert answers == expected


def test_the_models_own_generation_settings_do_not_count() -> None:
    ours = tiny_gpt2()
    ours.generation_config = transformers.GenerationConfig(
        repetition_penalty=5.0, do_sample=True, temperature=9.0, eos_token_id=7, min_new_tokens=3
    )
    asked = prompts(6)
    expected = [greedy_by_full_forward(model("gpt2"), asked[0], 6, [])]
    assert complete_greedily(TransformersCompleter(ours), asked, max_new_tokens=6, stop_ids=()) == expected


def test_the_time_left_is_that_of_the_longest_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, clock, shown = model("gpt2"), [0.0], list[str]()
    monkeypatch.setattr(printing.time, "monotonic", lambda: clock[0])

    def slow(number: int, ids: Sequence[int]) -> bool:
        if number == 1:
            clock[0] += 10.0
            shown.append(printing.now())
        return number == 0  # three answers have the full length

    with printing.counting("answers", 4, "prompts") as done:
        asked = prompts(5, 5, 9, 9)
        complete_greedily(
            TransformersCompleter(ours), asked, max_new_tokens=10, stop_ids=(), on_done=done, give_up=slow
        )
    # After two of twenty tokens, in two batches of ten; the third one has taken its 10 s, and is not counted yet.
    assert shown[2] == "answers, 1 of 4 prompts, at most about 4 min 30 s left"


def test_the_adapter_can_be_left_out() -> None:
    adapted = tiny_gpt2()
    adapter = inject(adapted, LoRAConfig(rank=3, alpha=20.0))
    for _, parameter in adapter.named_parameters():
        torch.nn.init.normal_(parameter)
    asked = prompts(6)
    answers = TransformersCompleter(adapted, adapter)
    with_adapter = complete_greedily(answers, asked, max_new_tokens=6, stop_ids=())
    answers.use_adapter(False)
    base = complete_greedily(answers, asked, max_new_tokens=6, stop_ids=())
    answers.use_adapter(True)
    assert complete_greedily(answers, asked, max_new_tokens=6, stop_ids=()) == with_adapter
    assert base == [greedy_by_full_forward(model("gpt2"), asked[0], 6, [])] != with_adapter
    with pytest.raises(ValueError, match="no adapter"):
        TransformersCompleter(model("gpt2")).use_adapter(True)


def test_context_and_vocabulary() -> None:
    assert TransformersCompleter(model("gpt2")).context_tokens == 64
    assert TransformersCompleter(model("mamba")).context_tokens > 1_000_000
    assert TransformersCompleter(model("gpt2")).vocab_size == 101
    assert TransformersCompleter(tiny_model("gemma3_text")).context_tokens == 128


def test_interruption_passes_through(tmp_path: Path) -> None:
    def interrupt(_number: int, _token: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TransformersCompleter(model("gpt2")).complete([[5]], lambda _, logits: [0], interrupt, max_new_tokens=3)


def test_an_answer_does_not_depend_on_the_prompts_before_it() -> None:
    """Angles of the rule `dynamic` grow with the longest text so far, and transformers keeps them."""
    angles = {"rope_type": "dynamic", "rope_theta": 20.0, "factor": 9.0}

    def fresh() -> TransformersCompleter:
        return TransformersCompleter(tiny_model("llama", max_position_embeddings=8, rope_parameters=angles))

    short, long = prompts(11, 60)
    expected = complete_greedily(fresh(), [short], max_new_tokens=12, stop_ids=())
    used = fresh()
    complete_greedily(used, [long], max_new_tokens=1, stop_ids=())
    assert complete_greedily(used, [short], max_new_tokens=12, stop_ids=()) == expected

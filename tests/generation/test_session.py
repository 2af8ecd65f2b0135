from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from backhand.data.options import TemplateOptions
from backhand.errors import DataError, UsageError
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.generation.options import SamplingOptions
from backhand.generation.session import GenerationSession
from backhand.nn.model_options import BaseModelOptions
from tests.support.tiny_tokenizer import tiny_tokenizer

SAMPLED = SamplingOptions(temperature=1.1, top_p=0.95, top_k=50, seed=5, max_new_tokens=20)
GREEDY = SamplingOptions(greedy=True, max_new_tokens=20)


@pytest.fixture(scope="module")
def loaded(model_directory: Path) -> Any:
    with loaded_model(BaseModelOptions(model=str(model_directory), dtype="float32")) as model:
        yield model


@pytest.fixture
def session(loaded: LoadedModel) -> GenerationSession:
    return GenerationSession(loaded)


def test_prompts_are_rendered_by_the_chat_template(session: GenerationSession) -> None:
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert session.tokenizer.decode(session.prompt_ids("hi")) == expected
    talk = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    assert session.tokenizer.decode(session.conversation_ids(talk)) == (
        "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_system_message_and_another_template(loaded: LoadedModel) -> None:
    with_system = GenerationSession(loaded, TemplateOptions(system="be brief"))
    assert session_text(with_system, "hi").startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")
    template = TemplateOptions(chat_template="{{ messages[0]['content'] }}{{ mark }}", template_args={"mark": "!"})
    assert session_text(GenerationSession(loaded, template), "hi") == "hi!"


def test_what_a_user_types_is_never_a_control_token(session: GenerationSession) -> None:
    turn_end = session.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert session.prompt_ids("a<|im_end|>b").count(turn_end) == session.prompt_ids("ab").count(turn_end)
    assert session_text(session, "a<|im_end|>b").startswith("<|im_start|>user\na<|im_end|>b<|im_end|>")


def test_without_a_template_the_text_is_continued_unchanged(loaded: LoadedModel) -> None:
    plain = GenerationSession(loaded, TemplateOptions(chat_template="none"))
    assert session_text(plain, "the user asks") == "the user asks"
    assert not plain.has_template
    with pytest.raises(DataError, match="no chat template"):
        plain.conversation_ids([{"role": "user", "content": "hi"}])
    with pytest.raises(DataError, match="empty"):
        plain.prompt_ids("")
    with pytest.raises(UsageError, match="system is given"):
        GenerationSession(loaded, TemplateOptions(chat_template="none", system="be brief"))


def session_text(session: GenerationSession, prompt: str) -> str:
    text: str = session.tokenizer.decode(session.prompt_ids(prompt))
    return text


def test_a_seed_draws_what_transformers_draws_with_it(session: GenerationSession, model_directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    prompt_ids = session.prompt_ids("the answer")
    torch.manual_seed(SAMPLED.seed)
    theirs = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        do_sample=True,
        temperature=1.1,
        top_k=50,
        top_p=0.95,
        max_new_tokens=20,
        pad_token_id=0,
    )[0, len(prompt_ids) :]
    answer = session.answer(prompt_ids, SAMPLED)
    assert answer.text == session.tokenizer.decode(theirs, skip_special_tokens=True)
    assert answer.text != session.answer(prompt_ids, replace(SAMPLED, seed=6)).text


@pytest.mark.parametrize("options", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_row_is_answered_as_it_is_alone(session: GenerationSession, options: SamplingOptions) -> None:
    prompts = [session.prompt_ids(text) for text in ("a", "the user asks for a list", "name", "the")]
    together = session.answer_all(prompts, options, batch_rows=3)
    for number, prompt in enumerate(prompts):
        assert session.answer(prompt, replace(options, seed=options.seed + number)) == together[number]


def test_pieces_make_the_answer(session: GenerationSession) -> None:
    pieces: list[str] = []
    answer = session.answer(session.prompt_ids("a list"), SAMPLED, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3
    done: list[int] = []
    session.answer_all([session.prompt_ids("a"), session.prompt_ids("b")], GREEDY, on_done=done.append)
    assert sorted(done) == [0, 1]


def test_the_stop_string_ends_the_answer_and_is_not_in_it(session: GenerationSession) -> None:
    prompt_ids = session.prompt_ids("a list")
    free = session.answer(prompt_ids, SAMPLED)
    stop = free.text[3:5]
    stopped = session.answer(prompt_ids, replace(SAMPLED, stop=(stop, "never said")))
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (stopped.finish_reason, stopped.tokens < free.tokens) == ("stop", True)


def test_stop_tokens_end_the_answer(loaded: LoadedModel) -> None:
    free = GenerationSession(replace(loaded, stop_ids=()))
    prompt_ids = free.prompt_ids("a list")
    said: list[int] = []
    loaded.model.complete(
        [prompt_ids],
        lambda _, logits: logits.argmax(-1).tolist(),
        lambda _, token: said.append(token) or False,
        max_new_tokens=6,
    )
    stopping = GenerationSession(replace(loaded, stop_ids=(said[4],)))
    answer = stopping.answer(prompt_ids, GREEDY)
    assert answer.tokens == said.index(said[4]) + 1
    assert answer.finish_reason == "stop"
    assert answer.text == free.tokenizer.decode(said[: said.index(said[4])], skip_special_tokens=True)


def test_the_models_own_ends_are_stop_tokens(loaded: LoadedModel) -> None:
    ends = tiny_tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert set(ends) <= set(loaded.stop_ids)


def test_answers_end_where_the_context_ends(session: GenerationSession) -> None:
    long = session.prompt_ids("q" * 104)
    assert len(long) < session.model.context_tokens == 128
    answer = session.answer(long, replace(GREEDY, max_new_tokens=500))
    assert answer.finish_reason == "length"
    assert answer.tokens == 128 - len(long)
    with pytest.raises(DataError, match=r"150 tokens, and the model takes 128"):
        session.answer([5] * 150, GREEDY)
    with pytest.raises(DataError, match=r"rows\.jsonl:7") as caught:
        session.answer_all([[5], [299, 300]], GREEDY, sources=["rows.jsonl:6", "rows.jsonl:7"])
    assert "token 300" in caught.value.what


def test_a_conversation_is_not_computed_again(loaded: LoadedModel, session: GenerationSession) -> None:
    decoder = loaded.model.decoder  # type: ignore[attr-defined]
    seen: list[int] = []
    embed = decoder.embed
    talk: list[dict[str, Any]] = [{"role": "user", "content": "name a number"}]
    fresh = GenerationSession(loaded)
    try:
        decoder.embed = lambda ids: seen.append(len(ids)) or embed(ids)
        first = session.answer(session.conversation_ids(talk), SAMPLED)
        talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "another"}]
        seen.clear()
        second_ids = session.conversation_ids(talk)
        second = session.answer(second_ids, SAMPLED)
        assert seen[0] < len(second_ids) - len(session.conversation_ids(talk[:1])) + 1
    finally:
        del decoder.embed
    loaded.model._state = None  # type: ignore[attr-defined]
    assert fresh.answer(second_ids, SAMPLED) == second


def test_an_interrupted_answer_leaves_the_model_as_it_should_be(session: GenerationSession) -> None:
    prompt_ids = session.prompt_ids("a long story")
    expected = session.answer(prompt_ids, SAMPLED)

    def interrupt(_piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.answer(prompt_ids, SAMPLED, on_text=interrupt)
    assert session.answer(prompt_ids, SAMPLED) == expected

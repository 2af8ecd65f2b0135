from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from backhand.generation.session import TextStream, decode
from tests.support.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece Llama tokenizers decode: spaces as ▁, bytes as <0x..>, the first space of a text stripped."""
    words = ["▁", "▁the", "▁a", "b", "c", "é", "名"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


SENTENCEPIECE = byte_fallback_tokenizer()


def streamed(token_ids: Sequence[int], stop: Sequence[str] = (), tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    stream = TextStream(tokenizer, stop)
    parts = [stream.push(token_id) for token_id in token_ids]
    parts.append(stream.finish())
    assert "".join(parts) == stream.text
    return stream.text


@given(st.lists(st.integers(0, 299), max_size=40))
def test_parts_make_the_whole_for_any_tokens(token_ids: list[int]) -> None:
    assert streamed(token_ids) == decode(TOKENIZER, token_ids)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_part_holds_half_a_character(text: str) -> None:
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    stream = TextStream(TOKENIZER)
    so_far = ""
    for token_id in token_ids:
        so_far += stream.push(token_id)
        assert text.startswith(so_far)
    assert so_far + stream.finish() == text


@given(st.text(st.sampled_from("the a b cé名\U0001f642"), max_size=20))
def test_byte_fallback_and_stripped_first_spaces_stream_as_they_decode(text: str) -> None:
    pieces = {" ": "▁", "b": "b", "c": "c", "é": "é", "名": "名"}
    token_ids: list[int] = []
    for character in text:
        known = SENTENCEPIECE.convert_tokens_to_ids(pieces[character]) if character in pieces else None
        token_ids += [known] if known is not None else list(character.encode())
    assert streamed(token_ids, tokenizer=SENTENCEPIECE) == text.removeprefix(" ")


def test_a_character_of_several_tokens_comes_when_it_is_whole() -> None:
    token_ids = TOKENIZER.encode("a\U0001f642b", add_special_tokens=False)
    stream = TextStream(TOKENIZER)
    assert [stream.push(token_id) for token_id in token_ids] == ["a", "", "", "", "\U0001f642", "b"]


def test_an_unfinished_character_appears_at_the_end() -> None:
    token_ids = TOKENIZER.encode("a\U0001f642", add_special_tokens=False)[:-1]
    stream = TextStream(TOKENIZER)
    assert [stream.push(token_id) for token_id in token_ids] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


@given(
    st.text(st.sampled_from("abcé\n"), max_size=40),
    st.lists(st.text(st.sampled_from("abcé\n"), min_size=1, max_size=5), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    found = [at for at in (text.find(string) for string in stop) if at >= 0]
    # The stop string that is complete first ends the text, wherever an overlapping longer one would have started.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    result = streamed(token_ids, stop)
    if not found:
        assert result == text
        return
    assert text.startswith(result)
    assert any(text[len(result) :].startswith(string) for string in stop)
    assert len(result) <= min(ends)[1]


@pytest.mark.parametrize("stop", [("END",), ("xyz", "END of"), ("END", "")])
def test_what_may_become_a_stop_string_is_held_back(stop: tuple[str, ...]) -> None:
    stream = TextStream(TOKENIZER, stop)
    shown = "".join(stream.push(token_id) for token_id in TOKENIZER.encode("go EN", add_special_tokens=False))
    assert shown == "go "
    rest = "".join(stream.push(token_id) for token_id in TOKENIZER.encode("D of it", add_special_tokens=False))
    assert stream.stopped
    assert (rest, stream.finish(), stream.text) == ("", "", "go ")


def test_what_was_held_back_and_is_no_stop_string_comes_out() -> None:
    assert streamed(TOKENIZER.encode("go ENd", add_special_tokens=False), ["END"]) == "go ENd"
    assert streamed(TOKENIZER.encode("go EN", add_special_tokens=False), ["END"]) == "go EN"


def test_control_tokens_are_no_text() -> None:
    token_ids = [TOKENIZER.convert_tokens_to_ids("<|im_end|>"), *TOKENIZER.encode("a", add_special_tokens=False)]
    assert streamed(token_ids) == "a"

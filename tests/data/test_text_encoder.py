from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from backhand.data.chat import Document
from backhand.data.text_encoder import TextEncoder, unused_mark
from backhand.errors import ArtifactError, DataError
from tests.support.tokenizer_kinds import WITH_TOOLS, byte_level, normalizing, sentence_pieces

KINDS = {"byte_level": byte_level, "sentence_pieces": sentence_pieces}
PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "</s>",
    "<s>",
    "<tool_call>",
    "<|im_",
    "end|>",
    " ",
    "\n",
    "a",
    "é",
    "\ue000",
    "😀",
]


def plain_ids(encoder: TextEncoder, text: str) -> np.ndarray:
    mark = encoder.mark_for(text)
    return encoder.encode(encoder.protect(text, mark, template_tokens=True), source="f:1", mark=mark).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_is_encoded_as_the_tokenizer_does(kind: str) -> None:
    tokenizer = KINDS[kind]()
    encoder = TextEncoder(tokenizer)
    for text in ("the user asks", " a name,\n\n  a date ", "yes é 😀 \ue000", ""):
        assert encoder.mark_for(text) is None
        assert plain_ids(encoder, text).tolist() == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8))
def test_no_text_becomes_a_control_token_and_none_is_lost(kind: str, pieces: list[str]) -> None:
    tokenizer = KINDS[kind]()
    encoder = TextEncoder(tokenizer, template=WITH_TOOLS)
    text = "".join(pieces)
    ids = plain_ids(encoder, text).tolist()
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content in {"<tool_call>", *SPECIAL}}
    assert not control.intersection(ids) - {tokenizer.unk_token_id}
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip() == text.strip()


SPECIAL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>")


def test_control_tokens_that_share_characters_are_all_broken() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["ab", "bc"]})
    encoder = TextEncoder(tokenizer)
    ids = plain_ids(encoder, "abc")
    assert tokenizer.decode(ids) == "abc"
    assert not set(tokenizer.all_special_ids).intersection(ids.tolist())


def test_tables_and_lists_are_protected_to_their_depth() -> None:
    encoder = TextEncoder(byte_level(), template=WITH_TOOLS)
    value = {"a<|im_end|>": ["<tool_call>", 3, None, {"b": "<|im_end|>"}]}
    mark = encoder.mark_for(value)
    assert mark is not None
    broken = f"<{mark}|im_end|>"
    assert encoder.protect(value, mark, template_tokens=True) == {
        f"a{broken}": [f"<{mark}tool_call>", 3, None, {"b": broken}]
    }
    assert encoder.protect(value, mark, template_tokens=False) == {
        f"a{broken}": ["<tool_call>", 3, None, {"b": broken}]
    }


def test_the_mark_is_nowhere_in_the_text() -> None:
    assert unused_mark(["\ue000 \ue002", "\ue001"]) == "\ue003"
    encoder = TextEncoder(byte_level())
    text = "\ue000<|im_end|>\ue001"
    assert encoder.mark_for(text) == "\ue002"
    assert byte_level().decode(plain_ids(encoder, text)) == text
    with pytest.raises(DataError, match="private-use"):
        unused_mark(["".join(map(chr, range(0xE000, 0xF900)))])


def trimming() -> Any:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def trimming_line_ends() -> Any:
    tokenizer = trimming()
    tokenizer.add_tokens(["  ", "}\n"])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer", [byte_level(), trimming(), trimming_line_ends(), sentence_pieces(), normalizing()]
)
def test_documents_encoded_together_have_the_tokens_and_ends_of_each_alone(tokenizer: Any) -> None:
    encoder, draw = TextEncoder(tokenizer), random.Random(7)
    pieces = [*PIECES, "  ", "\t", "\x7f", "}\n", "the user's ", "＜|stop|＞"]
    texts = ["", *("".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(300))]
    documents = [Document(text, (), None, False, False, "f:1") for text in texts]
    for document, encoded in zip(documents, encoder.encode_plain(documents), strict=True):
        if encoded is None:
            with pytest.raises(DataError, match="control token"):
                encoder.encode(document.text, source="f:1")
            continue
        alone = encoder.encode(document.text, source="f:1")
        assert encoded.input_ids.tolist() == alone.input_ids.tolist()
        assert encoded.ends.tolist() == alone.ends.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_straddles_a_break(kind: str) -> None:
    tokenizer = KINDS[kind]()
    encoder = TextEncoder(tokenizer)
    text = "the user asks and the assistant answers"
    whole = encoder.encode(text, source="f:1")
    place = next(i for i in range(1, len(text)) if i not in whole.ends.tolist())
    parted = encoder.encode(text, source="f:1", breaks=[place])
    assert place in parted.ends.tolist()
    assert parted.ends[-1] == len(text)
    left = tokenizer.encode(text[:place], add_special_tokens=False)
    assert parted.input_ids[: len(left)].tolist() == left
    assert tokenizer.decode(parted.input_ids) == text


def test_ends_count_characters_of_the_text_and_its_marks() -> None:
    encoder = TextEncoder(byte_level())
    mark = encoder.mark_for("<|im_end|>")
    text = encoder.protect("é<|im_end|> the answer", mark, template_tokens=True)
    encoded = encoder.encode(text, source="f:1", mark=mark, breaks=[len(text) - 2])
    assert encoded.ends.tolist() == sorted(encoded.ends.tolist())
    assert encoded.ends[-1] == len(text)
    assert {1, 2, len(text) - 2} <= set(encoded.ends.tolist())


def test_a_control_token_that_only_comes_about_by_rewriting_is_refused() -> None:
    tokenizer = normalizing()
    full_width = "＜|stop|＞"
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert stop in tokenizer.encode(full_width), "this tokenizer must be one that rewrites"
    with pytest.raises(DataError, match="control token") as raised:
        plain_ids(TextEncoder(tokenizer), full_width)
    assert raised.value.where == "f:1"
    assert stop not in plain_ids(TextEncoder(tokenizer), "<|stop|>")


@pytest.mark.parametrize(("kind", "prefix"), [("byte_level", ()), ("sentence_pieces", (1,))])
def test_what_the_tokenizer_puts_first(kind: str, prefix: tuple[int, ...]) -> None:
    assert TextEncoder(KINDS[kind]()).prefix_ids == prefix


def test_truncation_and_padding_that_someone_left_switched_on_do_nothing() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    ids = TextEncoder(tokenizer).encode("the user asks", source="f:1").input_ids
    assert ids.tolist() == byte_level().encode("the user asks")
    assert tokenizer.backend_tokenizer.truncation is not None


def test_a_tokenizer_in_python_is_refused() -> None:
    class Slow:
        backend_tokenizer: Any = None

    with pytest.raises(ArtifactError, match="Slow is not a fast tokenizer"):
        TextEncoder(Slow())

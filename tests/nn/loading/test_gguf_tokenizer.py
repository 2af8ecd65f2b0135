"""Tokenizers from GGUF files give llama.cpp's ids on texts that distinguish tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from backhand.errors import ArtifactError
from backhand.nn.loading import open_model
from backhand.nn.loading.gguf_pretokenizers import PRE_TOKENIZERS
from tests.support.boundary_tokenizers import boundary_tokenizer, sentencepiece_pieces, spaced_tokenizer
from tests.support.llama_cpp import LlamaCpp
from tests.support.odd_texts import ODD_TEXTS
from tests.support.tiny_gemma4 import add_gemma4_tokenizer
from tests.support.tiny_gguf import (
    add_byte_level_tokenizer,
    add_sentencepiece_tokenizer,
    write_tiny_gguf,
    write_vocabulary_gguf,
)
from tests.support.tiny_models import tiny_model
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

# llama.cpp takes a combining mark for punctuation here, the models' own tokenizers for part of the word.
_MARKS = ("e\u0301 combining a\u0308\u0308", "नमस्ते दुनिया ไทย")
_MARKS_DIFFER = {"tekken", "gpt-4o"}


def _byte_level_file(path: Path, pre: str) -> Path:
    tokenizer = boundary_tokenizer()
    return write_vocabulary_gguf(
        path, len(tokenizer), lambda writer: add_byte_level_tokenizer(writer, tokenizer, len(tokenizer), pre)
    )


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_ids_equal_llama_cpp(pre: str, tmp_path: Path) -> None:
    path = _byte_level_file(tmp_path / "v.gguf", pre)
    tokenizer, peer = open_model(path).tokenizer(), LlamaCpp(path)
    for text in ODD_TEXTS:
        if pre in _MARKS_DIFFER and text in _MARKS:
            continue
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == peer.token_ids(text), text
        assert tokenizer.decode(ids) == text


def test_these_texts_tell_all_ways_to_cut_apart(tmp_path: Path) -> None:
    ways = {kind: pre for pre, kind in PRE_TOKENIZERS.items()}
    seen = []
    for pre in ways.values():
        tokenizer = open_model(_byte_level_file(tmp_path / f"{pre}.gguf", pre)).tokenizer()
        seen.append(tuple(tuple(ids) for ids in tokenizer(list(ODD_TEXTS), add_special_tokens=False).input_ids))
    assert len(set(seen)) == len(ways) == 9


@pytest.mark.parametrize("user_defined", [(), ("<think>", "  ", "\n\n")], ids=["plain", "user-defined"])
@pytest.mark.parametrize("space_prefix", [True, False])
@pytest.mark.parametrize("add_bos", [True, False])
def test_sentencepiece_ids_equal_llama_cpp(
    user_defined: tuple[str, ...], space_prefix: bool, add_bos: bool, tmp_path: Path
) -> None:
    pieces = sentencepiece_pieces(user_defined)
    path = write_vocabulary_gguf(
        tmp_path / "v.gguf",
        len(pieces),
        lambda writer: add_sentencepiece_tokenizer(writer, pieces, space_prefix=space_prefix, add_bos=add_bos),
    )
    tokenizer, peer = open_model(path).tokenizer(), LlamaCpp(path)
    for text in (*ODD_TEXTS, "<s> a", "x</s>y", "a <think> b</think>", "hi</s> there\n\nx"):
        ids = tokenizer(text).input_ids
        assert ids == peer.token_ids(text, add_special=True), text
        if not space_prefix:
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_spaced_ids_equal_llama_cpp_and_the_original(tmp_path: Path) -> None:
    original = spaced_tokenizer()
    path = write_vocabulary_gguf(
        tmp_path / "v.gguf", len(original), lambda writer: add_gemma4_tokenizer(writer, original)
    )
    tokenizer, peer = open_model(path).tokenizer(), LlamaCpp(path)
    for text in (*ODD_TEXTS, "<bos> a", "x<eos>y", *("a" + "\n" * count + "b" for count in range(1, 40))):
        ids = tokenizer(text).input_ids
        assert ids == peer.token_ids(text, add_special=True), text
        assert ids == original(text).input_ids, text
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")


@pytest.mark.smollm2
def test_smollm2_ids_equal_llama_cpp() -> None:
    source = open_model("smollm2-135m")
    tokenizer, peer = source.tokenizer(), LlamaCpp(source.path)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 345?"}, {"role": "assistant", "content": "357"}], tokenize=False
    )
    for text in (*ODD_TEXTS, chat):
        ids = tokenizer(text).input_ids
        assert ids == peer.token_ids(text, add_special=True), text
        assert tokenizer.decode(ids) == text
    assert source.stop_token_ids() == (0, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_tiny_tokenizer_survives_the_file(tmp_path: Path) -> None:
    source = open_model(write_tiny_gguf(tiny_model("llama"), tmp_path / "t.gguf"))
    ours, original = source.tokenizer(), tiny_tokenizer()
    for text in ODD_TEXTS:
        assert ours(text).input_ids == original(text).input_ids
        encoded = ours(text, return_offsets_mapping=True)
        assert encoded.offset_mapping[-1][1] == len(text)
    assert ours.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "<|im_end|> is text here"}]
    assert ours.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(messages, tokenize=False)
    assert ours.all_special_ids == original.all_special_ids
    assert source.stop_token_ids() == (0, 2)
    assert source.tokenizer() is ours


@pytest.mark.parametrize(("pre", "stated", "expected"), [("llama-bpe", None, True), ("llama-bpe", False, False),
                                                         ("qwen2", None, False), ("qwen2", True, True)])  # fmt: skip
def test_bos_comes_first_where_the_file_or_its_kind_says_so(
    pre: str, stated: bool | None, expected: bool, tmp_path: Path
) -> None:
    tokenizer = boundary_tokenizer()

    def add(writer: GGUFWriter) -> None:
        add_byte_level_tokenizer(writer, tokenizer, len(tokenizer), pre)
        (entries,) = writer.kv_data
        del entries["tokenizer.ggml.add_bos_token"]
        if stated is not None:
            writer.add_add_bos_token(stated)

    path = write_vocabulary_gguf(tmp_path / "v.gguf", len(tokenizer), add)
    ours = open_model(path).tokenizer()
    assert ours("x").input_ids == LlamaCpp(path).token_ids("x", add_special=True)
    assert (ours("x").input_ids[0] == ours.bos_token_id) is expected
    assert ours("x", add_special_tokens=False).input_ids[0] != ours.bos_token_id


def test_eos_comes_last_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = boundary_tokenizer()

    def add(writer: GGUFWriter) -> None:
        add_byte_level_tokenizer(writer, tokenizer, len(tokenizer), "qwen2")
        writer.add_add_eos_token(True)

    path = write_vocabulary_gguf(tmp_path / "v.gguf", len(tokenizer), add)
    ours = open_model(path).tokenizer()
    assert ours("x").input_ids == LlamaCpp(path).token_ids("x", add_special=True)
    assert ours("x").input_ids[-1] == ours.eos_token_id


def _broken(kind: str, writer: GGUFWriter) -> None:
    tokenizer = boundary_tokenizer()
    if kind != "none":
        add_byte_level_tokenizer(writer, tokenizer, len(tokenizer), "viking" if kind == "pre" else "gpt-2")
    (entries,) = writer.kv_data
    if kind == "model":
        entries["tokenizer.ggml.model"].value = "rwkv"
    if kind == "eos":
        entries["tokenizer.ggml.eos_token_id"].value = 99_999
    if kind == "merges":
        entries["tokenizer.ggml.merges"].value = ["ab"]
    if kind == "scores":
        entries["tokenizer.ggml.model"].value = "llama"
    if kind == "unknown merge":
        entries["tokenizer.ggml.merges"].value = ["zz qq"]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("none", "no tokenizer"),
        ("pre", "'viking'"),
        ("model", "'rwkv'"),
        ("eos", "99999"),
        ("merges", "merge .ab. does not join"),
        ("scores", "scores"),
        ("unknown merge", "tokenizer"),
    ],
)
def test_vocabularies_that_cannot_be_used_are_named(kind: str, named: str, tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        _broken(kind, writer)

    path = write_vocabulary_gguf(tmp_path / "v.gguf", len(boundary_tokenizer()), add)
    with pytest.raises(ArtifactError, match=named) as raised:
        open_model(path).tokenizer()
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("keys", [("bos", "eos"), ("cls", "seperator")])
def test_an_encoder_s_texts_are_between_its_marks_whatever_the_file_calls_them(
    keys: tuple[str, str], tmp_path: Path
) -> None:
    """Older files have the ids of [CLS] and [SEP] alone, the latter under this key."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁hello", "▁world", "s"]

    def add(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("bert")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 2, 3, 3, 1, 1, 1])
        for key, token in zip((*keys, "unknown", "padding"), (2, 3, 1, 0), strict=True):
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)

    tokenizer = open_model(write_vocabulary_gguf(tmp_path / "v.gguf", len(tokens), add)).tokenizer()
    assert tokenizer("hello worlds").input_ids == [2, 4, 5, 6, 3]

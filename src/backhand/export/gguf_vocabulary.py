"""A BPE tokenizer as a GGUF file's vocabulary: byte-level, or one of characters with ▁ for a space, as Gemma's.

Of a byte-level one the name under tokenizer.ggml.pre stands for the patterns by which text is cut; it is found by
comparing the tokenizer's own patterns with those of the names that are known. Anything else is refused, since a wrong
name gives other token ids without a word. llama.cpp cuts the second kind at line ends, where the tokenizer does not:
that is the same as long as no token is made of line ends and other characters. Sentencepiece vocabularies with a space
put in front have scores, which a fast tokenizer's file does not.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import gguf

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_tokenizer import LINES, PRE_TOKENIZERS, SPACED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_NORMALIZERS = (None, {"type": "NFC"})
_DIGITS = r"\p{N}"
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_NO_CUTS = (
    None,
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    {"type": "Split", "pattern": {"Regex": LINES}, "behavior": "Isolated", "invert": False},
)
"""Ways to cut where no space is left that make no difference, given what tokens consist of."""
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_ALWAYS_SHOWN = (
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    '<|"|>',
)
"""Gemma 4's tokens that llama.cpp's chat must see in an answer, and that its converter therefore calls no control
tokens."""


def add_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int, where: str
) -> list[str]:
    """Tokens and their types, merges, special ids, what is put around a text, and the chat template.

    Args:
        vocab_size: rows of the embedding; rows without a token get one that is marked unused.

    Returns:
        added tokens behind the last row, which the model cannot read and the file leaves out: llama.cpp opens no file
        with more tokens than rows.

    Raises:
        ArtifactError: another kind of tokenizer, one that cuts text in a way that has no name, or one whose other
            tokens are more than the rows.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    spaced = _is_spaced(described)
    pre = None if spaced else _pre_tokenizer_name(described)
    if not spaced and pre is None:
        raise ArtifactError(
            "its tokenizer cannot be written into a GGUF file here",
            where=where,
            why="known are byte-level BPE tokenizers that cut text in one of the ways that have a name, and Gemma's",
            next_step="merge into a Hugging Face directory, and run llama.cpp's convert_hf_to_gguf.py on it",
        )
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = dict(tokenizer.added_tokens_decoder)
    without_row = sorted(index for index in by_id if index >= vocab_size)
    if any(index not in added or index == tokenizer.eos_token_id for index in without_row):
        raise ArtifactError(
            f"its tokenizer has tokens up to id {without_row[-1]}, and the model {vocab_size} rows for them",
            where=where,
            why="only tokens that were added, and do not end a text, can be left out of a GGUF file",
            next_step="take the tokenizer that belongs to the model",
        )
    tokens, types = [], []
    for index in range(vocab_size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        types.append(_token_type(index, by_id, added, spaced))
    writer.add_tokenizer_model(SPACED if pre is None else "gpt2")
    if pre is None:
        writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = described["model"]["merges"]
    if merges:  # an empty list has no type that could be written
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None and index < vocab_size:
            add(index)
    around = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(bool(around) and around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(around) and around[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return [by_id[index] for index in without_row]


def _token_type(index: int, by_id: dict[int, str], added: dict[int, Any], spaced: bool) -> gguf.TokenType:
    if index not in by_id:
        return gguf.TokenType.UNUSED
    if spaced and by_id[index] in _BYTES:
        return gguf.TokenType.BYTE
    if spaced and by_id[index] in _ALWAYS_SHOWN:
        return gguf.TokenType.USER_DEFINED
    if index not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED


def _is_spaced(described: dict[str, Any]) -> bool:
    """Whether it is of the kind that llama.cpp calls gemma4."""
    model = described["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or model.get("ignore_merges"):
        return False
    if described.get("normalizer") != _SPACES or described.get("pre_tokenizer") not in _NO_CUTS:
        return False
    made = ("".join(merge) if not isinstance(merge, str) else merge.replace(" ", "") for merge in model["merges"])
    return set(_BYTES) <= model["vocab"].keys() and not any(re.search(r"\n[^\n]|[^\n]\n", token) for token in made)


def _pre_tokenizer_name(described: dict[str, Any]) -> str | None:
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or described.get("normalizer") not in _NORMALIZERS:
        return None
    patterns = _patterns(described.get("pre_tokenizer"))
    if patterns is None:
        return None
    for name, known in PRE_TOKENIZERS.items():
        if known.patterns == patterns and known.whole_words == bool(model.get("ignore_merges")):
            return name
    return None


def _patterns(step: Any) -> tuple[str, ...] | None:
    """The patterns that a pre-tokenizer cuts by, one after another; None if it is none of the usual steps."""
    steps = step["pretokenizers"] if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    patterns: list[str] = []
    byte_level = False
    for part in steps:
        match part:
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(_DIGITS)
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}:
                patterns.append(regex)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                byte_level = True
                if part.get("use_regex"):
                    patterns.extend(PRE_TOKENIZERS["gpt-2"].patterns)
            case _:
                return None
    return tuple(patterns) if byte_level else None

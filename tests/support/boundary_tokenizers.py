"""Vocabularies learned without regard to words, so that every difference in how text is cut shows in the ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.support.odd_texts import ODD_TEXTS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of a GGUF vocabulary."""

_UNREACHABLE = "Ġdigits"


@cache
def boundary_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs merged across spaces, digits and punctuation, and one word that no merges lead to."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>", "<u>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(list(ODD_TEXTS) * 3, trainer)
    content = json.loads(backend.to_str())
    assert _UNREACHABLE not in content["model"]["vocab"]
    content["model"]["vocab"][_UNREACHABLE] = len(content["model"]["vocab"])
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<u>")


@cache
def spaced_tokenizer(*, across_lines: bool = False) -> PreTrainedTokenizerFast:
    """Pairs of characters, as Gemma's: ▁ for a space, bytes for what has no token, merges that end at line ends."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    if not across_lines:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|[\n]+"), behavior="isolated")
    special = [AddedToken(text, special=True, normalized=False) for text in ("<pad>", "<eos>", "<bos>", "<unk>")]
    pieces = [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, limit_alphabet=110, special_tokens=special + pieces, show_progress=False
    )
    backend.train_from_iterator(list(ODD_TEXTS) * 3, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(content))
    # As released tokenizers cut: there is no space left to cut at.
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    ends = {f"{role}_token": f"<{role}>" for role in ("pad", "eos", "bos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ends)


def sentencepiece_pieces(user_defined: Sequence[str] = ()) -> list[tuple[str, float, int]]:
    """(piece, score, type) as a sentencepiece model of pairs has them: unknown, ends, bytes, and the rest by rank."""
    backend = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=700, limit_alphabet=120, show_progress=False)
    backend.train_from_iterator(["\u2581" + text.replace(" ", "\u2581") for text in ODD_TEXTS] * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    merged = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model["merges"]]
    characters = [token for token in model["vocab"] if len(token) == 1]
    ranked = dict.fromkeys([*merged, *characters])
    return [
        ("<unk>", 0.0, UNKNOWN),
        ("<s>", 0.0, CONTROL),
        ("</s>", 0.0, CONTROL),
        *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
        *((piece, 0.0, USER_DEFINED) for piece in user_defined),
        *((piece, -float(rank), NORMAL) for rank, piece in enumerate(ranked) if piece not in user_defined),
    ]

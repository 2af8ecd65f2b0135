"""Vocabularies learned without regard to words, so that every difference in how text is cut shows in the ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support.odd_texts import ODD_TEXTS

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

"""A tiny byte-level BPE tokenizer with ChatML, so that whole-pipeline tests run offline."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "the user asks the assistant and the assistant answers the user in json",
    "a system says what the answer is for; a name, a number, a date, a list of them",
    "user\nassistant\nsystem\n" * 3,
)
_VOCAB_SIZE = 300


@cache
def _backend_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    text: str = backend.to_str()
    return text


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """300 tokens: three special ones first, 256 bytes, merges; bos <|im_start|>, eos <|im_end|>, as SmolLM2 has it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend_json()),
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=TURN_END,
        unk_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind: lower-case words, pieces of words, and [CLS] and [SEP] around every text."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    letters = [chr(place) for place in range(ord("a"), ord("z") + 1)]
    words = sorted({word.strip(";,") for line in _CORPUS for word in line.split()})
    vocabulary = dict.fromkeys((*special, *".,;!?-", *letters, *(f"##{one}" for one in letters), *words))
    backend = Tokenizer(models.WordPiece({token: place for place, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def pair_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Write `word_piece_tokenizer` as a BertTokenizer, which returns token types, and return it."""
    word_piece_tokenizer().save_pretrained(directory)
    place = directory / "tokenizer_config.json"
    config = json.loads(place.read_text())
    del config["backend"]
    place.write_text(json.dumps(config | {"tokenizer_class": "BertTokenizer"}))
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(directory)
    return tokenizer

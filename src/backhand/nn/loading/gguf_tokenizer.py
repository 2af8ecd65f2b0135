"""Build a transformers fast tokenizer from a GGUF file's vocabulary.

The result gives the same token ids as llama.cpp. There are four kinds of vocabulary:

- `gpt2`: byte-level BPE. The pre-tokenizer named in tokenizer.ggml.pre splits the text, bytes are represented by
  letters, and tokenizer.ggml.merges lists the merges in order.
- `llama`: SentencePiece BPE with scores. A space becomes ▁, and a leading ▁ may be added. Of all neighbours whose
  concatenation is a token, the one with the highest score is merged first. Characters without a token fall back to
  byte tokens.
- `gemma4`: character-level BPE. A space becomes ▁, runs of newlines are split from the text between them, merges are
  listed in order, and characters without a token fall back to byte tokens.
- `bert`: WordPiece of lower-case words without accents. A token that begins a word is stored with ▁ before it, and one
  that continues a word without `##`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_pretokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


_CONTROL, _USER_DEFINED = 3, 4
_RANK = 4
"""The pooling of files for llama.cpp's /v1/rerank."""
_SPACE = "\u2581"
GEMMA4_KIND, LINE_PATTERN = "gemma4", r"[^\n]+|[\n]+"
"""Name of the third kind of vocabulary, and the pattern by which it splits text."""
BERT_KIND, CONTINUING = "bert", "##"
"""Name of the fourth kind of vocabulary, and what WordPiece puts before tokens that continue a word."""
BERT_NORMALIZER: dict[str, Any] = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
}
"""The normalizer of the fourth kind, as a tokenizer's file describes it."""
_KEY = "tokenizer.ggml."
MOST_MERGES = 2**22
MOST_COMPARED = 2**30
"""Upper bound for the characters compared in tokens longer than `_SHORT`, summed over all split points."""
_SHORT = 64
"""Tokens of at most this length are tried at every split point."""


def build_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """Build the tokenizer with its special tokens and chat template.

    Raises:
        ArtifactError: if the file has no vocabulary, or its kind is unknown.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = _strings(file, "tokens")
    if not tokens:
        raise ArtifactError(
            "the file contains no tokenizer", where=str(file.path), next_step="use a complete GGUF file"
        )
    kind = file.value(_KEY + "model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(file, tokens)
    elif kind == "llama":
        backend, adds_bos = _spaced(file, tokens, scored=True), True
    elif kind == GEMMA4_KIND:
        backend, adds_bos = _spaced(file, tokens, scored=False), True
    elif kind == BERT_KIND:
        tokens = _word_pieces(file, tokens)
        backend, adds_bos = _word_piece(file, tokens), True
    else:
        raise ArtifactError(
            f"tokenizers of kind {kind!r:.60} cannot be read from a GGUF file",
            where=str(file.path),
            why=f"the known kinds are gpt2, llama, {GEMMA4_KIND} and {BERT_KIND}",
            next_step="use the model's Hugging Face directory",
        )
    _add_marked_tokens(backend, file, tokens)
    names = {
        role: _token(file, tokens, key)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    architecture = file.value("general.architecture")
    encoder = kind == BERT_KIND or architecture == "modern-bert"
    if encoder:
        # Older files name only [CLS] and [SEP], the latter by this key.
        names["bos"] = names["bos"] or _token(file, tokens, "cls")
        names["sep"] = _token(file, tokens, "seperator")
        names["eos"] = names["eos"] or names["sep"]
    has_bos = file.value(_KEY + "add_bos_token", adds_bos) and names["bos"] is not None
    has_eos = file.value(_KEY + "add_eos_token", kind == BERT_KIND) and names["eos"] is not None
    first, last = (name if has else None for name, has in ((names["bos"], has_bos), (names["eos"], has_eos)))
    separates = encoder and file.value(_KEY + "add_sep_token", False)
    _add_template(backend, first, last, (names["sep"] if separates else None) if encoder else first)
    # llama.cpp scores a query and a document without token types.
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    scores_pairs = encoder and file.value(f"{architecture}.pooling_type") == _RANK
    template = file.value("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ArtifactError("tokenizer.chat_template is not a string", where=str(file.path))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **(inputs if scores_pairs else {}),
        **{f"{role}_token": name for role, name in names.items() if name is not None},
    )


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.value(_KEY + "pre", "default")
    pre_tokenizer = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre_tokenizer is None:
        raise ArtifactError(
            f"the pre-tokenizer {name!r:.60} is not known",
            where=str(file.path),
            why=f"the known pre-tokenizers are {', '.join(PRE_TOKENIZERS)}",
            next_step="use the model's Hugging Face directory",
        )
    vocabulary = _vocabulary(tokens)
    model = models.BPE(vocabulary, _merges(file, vocabulary), ignore_merges=pre_tokenizer.ignore_merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre_tokenizer.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre_tokenizer.adds_bos


def _merges(file: GGUFFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for entry in _strings(file, "merges"):
        left, _, right = entry.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ArtifactError(
                f"the tokenizer's merge {entry!r} does not join two tokens into a token", where=str(file.path)
            )
        merges.append((left, right))
    return merges


def _spaced(file: GGUFFile, tokens: list[str], *, scored: bool) -> Tokenizer:
    """Build a BPE model in which ▁ is a space, with merges from the file's scores or from its list of merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = _vocabulary(tokens)
    merges = _merges_by_score(file, tokens, vocabulary) if scored else _merges(file, vocabulary)
    unknown = _token(file, tokens, "unknown")
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if scored and file.value(_KEY + "add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    backend.normalizer, backend.decoder = normalizers.Sequence(steps) if scored else steps[0], decoders.Sequence(back)
    if not scored:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(LINE_PATTERN), behavior="isolated")
    return backend


def stored_piece(token: str) -> str:
    """Return a WordPiece token as a file stores it."""
    return token.removeprefix(CONTINUING) if token.startswith(CONTINUING) else _SPACE + token


def _word_pieces(file: GGUFFile, tokens: list[str]) -> list[str]:
    """Return the tokens as WordPiece has them. Control tokens are stored as they are."""
    types = file.value(_KEY + "token_type", [])
    control = {place for place, kind in enumerate(types if isinstance(types, list) else ()) if kind == _CONTROL}
    return [
        token if place in control else token[1:] if token.startswith(_SPACE) else CONTINUING + token
        for place, token in enumerate(tokens)
    ]


def _word_piece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = _token(file, tokens, "unknown") or "[UNK]"
    backend = Tokenizer(models.WordPiece(_vocabulary(tokens), unk_token=unknown, continuing_subword_prefix=CONTINUING))
    settings = {name: value for name, value in BERT_NORMALIZER.items() if name != "type"}
    backend.normalizer = normalizers.BertNormalizer(**settings)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(CONTINUING)
    return backend


def _merges_by_score(file: GGUFFile, tokens: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return every pair of tokens that concatenates to a token, best score first, equal scores by the token's id.

    Trying every split point of a token is quadratic in its length. Long tokens are therefore split only where both
    halves have the length of some token. The total work is bounded, far above the needs of any vocabulary in use.

    Raises:
        ArtifactError: if a token has no score, or the bound is exceeded.
    """
    scores = file.value(_KEY + "scores")
    numbers = isinstance(scores, list) and all(isinstance(score, int | float) and score == score for score in scores)
    if not numbers or len(scores) != len(tokens):
        raise ArtifactError("tokenizer.ggml.scores does not give every token a score", where=str(file.path))
    lengths = {len(token) for token in vocabulary}
    merges: list[tuple[float, int, int, str]] = []
    compared = 0
    for token, index in vocabulary.items():
        size = len(token)
        cuts: Iterable[int] = range(1, size)
        if size > _SHORT:
            cuts = sorted(cut for cut in lengths if 0 < cut < size and size - cut in lengths)
            compared += len(lengths) + size * len(cuts)
        if compared > MOST_COMPARED or len(merges) > MOST_MERGES:
            why = "long tokens consist of one another in millions of combinations"
            raise ArtifactError("the tokenizer has too many possible merges", where=str(file.path), why=why)
        merges += [
            (-scores[index], index, cut, token)
            for cut in cuts
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
    merges.sort()
    return [(token[:cut], token[cut:]) for _, _, cut, token in merges]


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Return token → id, with the first id of a token that occurs twice."""
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocabulary.setdefault(token, index)
    return vocabulary


def _add_marked_tokens(backend: Tokenizer, file: GGUFFile, tokens: list[str]) -> None:
    """Add control tokens as special tokens, and user-defined tokens as tokens that are never split."""
    from tokenizers import AddedToken

    types = file.value(_KEY + "token_type", [])
    are_ints = isinstance(types, list) and all(isinstance(kind, int) and not isinstance(kind, bool) for kind in types)
    if not are_ints or (types and len(types) != len(tokens)):
        raise ArtifactError(f"{_KEY}token_type does not give every token a number", where=str(file.path))
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    user_defined = [token for token, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])


def _token(file: GGUFFile, tokens: list[str], role: str) -> str | None:
    index = file.value(f"{_KEY}{role}_token_id")
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ArtifactError(
            f"{role}_token_id {index!r:.60} is not in the vocabulary of {len(tokens)}", where=str(file.path)
        )
    return tokens[index]


def _strings(file: GGUFFile, key: str) -> list[str]:
    """Return a list of strings, empty if the key is absent."""
    items = file.value(_KEY + key, [])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ArtifactError(f"{_KEY}{key} is not a list of strings", where=str(file.path))
    return items


def _add_template(backend: Tokenizer, bos: str | None, eos: str | None, second: str | None) -> None:
    """Put tokens around a text, and around the two texts of a pair, whose second text begins with `second`."""
    from tokenizers import processors

    first, last, between = ([token] if token else [] for token in (bos, eos, second))
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if first or last:
        single = [*first, "$A:0", *last]
        of_second = [f"{token}:1" for token in (*between, "$B", *last)]
        special = [(token, backend.token_to_id(token)) for token in dict.fromkeys((*first, *last, *between))]
        pair = [*single, *of_second]
        steps.append(processors.TemplateProcessing(single=single, pair=pair, special_tokens=special))
    backend.post_processor = processors.Sequence(steps)

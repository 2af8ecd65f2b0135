"""A transformers fast tokenizer from a GGUF file's vocabulary.

The tokenizers library does the work; what is built here gives llama.cpp's own ids, which is what the file was made for.
Three kinds of vocabulary:

- `gpt2`: byte-level pairs. Text is cut by the patterns named in tokenizer.ggml.pre, bytes are spelled as letters, and
  tokenizer.ggml.merges says in which order to join.
- `llama`: sentencepiece pairs with scores. A space is ▁, one more may be put in front, and of neighbours whose union is
  a token the union with the highest score is made first; characters without a token fall back to byte tokens.
- `gemma4`: pairs of characters. A space is ▁, runs of line ends are cut from what lies between them, merges say in
  which order to join, and characters without a token fall back to byte tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
GEMMA4_KIND, LINE_PATTERN = "gemma4", r"[^\n]+|[\n]+"
"""The third kind's name, and how it cuts text."""
_KEY = "tokenizer.ggml."
MOST_MERGES = 2**22
MOST_COMPARED = 2**30
"""Characters of tokens longer than `_SHORT`, over all places where they are cut."""
_SHORT = 64


def build_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template.

    Raises:
        ArtifactError: if it has no vocabulary, or one of a kind that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = _strings(file, "tokens")
    if not tokens:
        raise ArtifactError("it holds no tokenizer", where=str(file.path), next_step="use a complete GGUF file")
    kind = file.value(_KEY + "model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(file, tokens)
    elif kind == "llama":
        backend, adds_bos = _spaced(file, tokens, scored=True), True
    elif kind == GEMMA4_KIND:
        backend, adds_bos = _spaced(file, tokens, scored=False), True
    else:
        raise ArtifactError(
            f"tokenizers of kind {kind!r:.60} cannot be read from a GGUF file",
            where=str(file.path),
            why=f"known are gpt2, llama and {GEMMA4_KIND}",
            next_step="use the model's Hugging Face directory",
        )
    _add_marked_tokens(backend, file, tokens)
    names = {
        role: _token(file, tokens, key)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    has_bos = file.value(_KEY + "add_bos_token", adds_bos) and names["bos"] is not None
    has_eos = file.value(_KEY + "add_eos_token", False) and names["eos"] is not None
    _add_template(backend, names["bos"] if has_bos else None, names["eos"] if has_eos else None)
    template = file.value("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ArtifactError("tokenizer.chat_template is no text", where=str(file.path))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": name for role, name in names.items() if name is not None},
    )


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.value(_KEY + "pre", "default")
    cut = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if cut is None:
        raise ArtifactError(
            f"text cannot be cut as {name!r:.60} tokenizers do",
            where=str(file.path),
            why=f"known are {', '.join(PRE_TOKENIZERS)}",
            next_step="use the model's Hugging Face directory",
        )
    vocabulary = _vocabulary(tokens)
    model = models.BPE(vocabulary, _merges(file, vocabulary), ignore_merges=cut.ignore_merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, cut.adds_bos


def _merges(file: GGUFFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for entry in _strings(file, "merges"):
        left, _, right = entry.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ArtifactError(
                f"the tokenizer joins {entry!r}, which are no tokens or make none", where=str(file.path)
            )
        merges.append((left, right))
    return merges


def _spaced(file: GGUFFile, tokens: list[str], *, scored: bool) -> Tokenizer:
    """Pairs of characters, joined by their scores or by the file's merges; ▁ is a space."""
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


def _merges_by_score(file: GGUFFile, tokens: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score first; of equal scores the token that comes first.

    Looking up both halves of a token at each of its places is quadratic in its length: long tokens are cut only where
    both halves have the length of some token, and all of that has a bound, which no vocabulary in use comes near.

    Raises:
        ArtifactError: a token has no score, or the bound is met.
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
            why = "long tokens are made of one another in millions of ways"
            raise ArtifactError("its tokens can be joined in too many ways", where=str(file.path), why=why)
        merges += [
            (-scores[index], index, cut, token)
            for cut in cuts
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
    merges.sort()
    return [(token[:cut], token[cut:]) for _, _, cut, token in merges]


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Token → id; of a token that is there twice, the first."""
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocabulary.setdefault(token, index)
    return vocabulary


def _add_marked_tokens(backend: Tokenizer, file: GGUFFile, tokens: list[str]) -> None:
    """Control tokens become special, user-defined ones stay whole in any text."""
    from tokenizers import AddedToken

    types = file.value(_KEY + "token_type", [])
    whole = isinstance(types, list) and all(isinstance(kind, int) and not isinstance(kind, bool) for kind in types)
    if not whole or (types and len(types) != len(tokens)):
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
    """A list of strings, empty if absent."""
    items = file.value(_KEY + key, [])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ArtifactError(f"{_KEY}{key} is no list of strings", where=str(file.path))
    return items


def _add_template(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    from tokenizers import processors

    first, last = ([bos] if bos else []), ([eos] if eos else [])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if first or last:
        of_pair = [f"{token}:1" for token in first], [f"{token}:1" for token in last]
        single = [*first, "$A:0", *last]
        steps.append(
            processors.TemplateProcessing(
                single=single,
                pair=[*single, *of_pair[0], "$B:1", *of_pair[1]],
                special_tokens=[(token, backend.token_to_id(token)) for token in (*first, *last)],
            )
        )
    backend.post_processor = processors.Sequence(steps)


# How text is cut before byte-pair merging, by the name a GGUF file states in tokenizer.ggml.pre.
#
# The patterns are those by which the models' own tokenizers cut; a name stands for the same patterns here and in
# llama.cpp (llama-vocab.cpp), which the tests compare id by id. Several patterns are applied one after another, each
# inside the pieces of the one before.

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_REST}"

_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_REST}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How one kind of vocabulary cuts text."""

    patterns: tuple[str, ...]  # regular expressions; what matches is a piece, and so is what lies between matches
    ignore_merges: bool = False  # a piece that is itself a token is taken as one, whatever the merges say
    adds_bos: bool = False  # the beginning-of-text token comes first unless the file says otherwise


_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3_KIND = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
_QWEN2_KIND = PreTokenizer((_QWEN2,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mellum"), PreTokenizer((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS_GPT2),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3_KIND),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2_KIND),
    "qwen35": PreTokenizer((_QWEN35,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2.removesuffix(r"|\s+"), r"\p{N}+", r"[0-9][0-9][0-9]")),
}
"""By name; `default` is meant where a file states none."""

"""A transformers fast tokenizer from a GGUF file's vocabulary.

The tokenizers library does the work; what is built here gives llama.cpp's own ids, which is what the file was made for.
Two kinds of vocabulary:

- `gpt2`: byte-level pairs. Text is cut by the patterns named in tokenizer.ggml.pre, bytes are spelled as letters, and
  tokenizer.ggml.merges says in which order to join.
- `llama`: sentencepiece pairs with scores. A space is ▁, one more may be put in front, and of neighbours whose union is
  a token the union with the highest score is made first; characters without a token fall back to byte tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.nn.loading.gguf_pre_tokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_KEY = "tokenizer.ggml."


def build_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template.

    Args:
        file: an opened GGUF file.

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
        backend, adds_bos = _sentencepiece(file, tokens), True
    else:
        raise ArtifactError(
            f"tokenizers of kind {kind!r} cannot be read from a GGUF file",
            where=str(file.path),
            why="known are gpt2 and llama",
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
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": name for role, name in names.items() if name is not None},
    )


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.value(_KEY + "pre", "default")
    cut = PRE_TOKENIZERS.get(name)
    if cut is None:
        raise ArtifactError(
            f"text cannot be cut as {name!r} tokenizers do",
            where=str(file.path),
            why=f"known are {', '.join(PRE_TOKENIZERS)}",
            next_step="use the model's Hugging Face directory",
        )
    vocabulary = _vocabulary(tokens)
    model = models.BPE(vocabulary, _merges(file, vocabulary), ignore_merges=cut.whole_words)
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


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.value(_KEY + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or isinstance(scores[0], str):
        raise ArtifactError("tokenizer.ggml.scores does not give every token a score", where=str(file.path))
    unknown = _token(file, tokens, "unknown")
    vocabulary = _vocabulary(tokens)
    model = models.BPE(
        vocabulary, _merges_by_score(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    has_prefix = bool(file.value(_KEY + "add_space_prefix", True))
    steps = [normalizers.Prepend(_SPACE)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if has_prefix else undo)
    return backend


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score first; of equal scores the token that comes first."""
    merges = [
        (-scores[index], index, token[:cut], token[cut:])
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort()
    return [(left, right) for _, _, left, right in merges]


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
    if not isinstance(types, list):
        raise ArtifactError(f"{_KEY}token_type is no list", where=str(file.path))
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    user_defined = [token for token, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])


def _token(file: GGUFFile, tokens: list[str], role: str) -> str | None:
    index = file.value(f"{_KEY}{role}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ArtifactError(
            f"{role}_token_id {index!r} is not in the vocabulary of {len(tokens)}", where=str(file.path)
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

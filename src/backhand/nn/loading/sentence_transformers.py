"""Pooling, prompts and length of a model in the form of sentence-transformers: the files next to its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from backhand.errors import ArtifactError, short_reason
from backhand.reading import read_json

MODULES, PROMPTS, LENGTH = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
_TOKENIZER = "tokenizer_config.json"
_UNLIMITED = 10**9
"""Numbers above this in `model_max_length` mean that the tokenizer does not limit the length."""
_LEGACY = "pooling_mode_"  # prefix of the keys that older versions write, each with true or false
_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last", "mean_tokens": "mean", "cls_token": "cls"}
"""Poolings by their names in the files, without `_LEGACY`."""
_WITHOUT_FILES = "give --pooling, --query-prompt and --document-prompt, which train, embed and mine use instead"
_PROMPTS = ("query",), ("document", "passage")
"""Names of the query prompt, and of the document prompt."""


class EmbeddingFiles(NamedTuple):
    """Contents of the files."""

    pooling: str  # `mean`, `cls` or `last`
    query_prompt: str
    document_prompt: str
    max_length: int | None = None  # longest text in tokens; None if the files do not limit it


def read_embedding_files(directory: Path) -> EmbeddingFiles | None:
    """Return the contents of the files, or None for a model that is no model of vectors, such as a cross-encoder.

    Raises:
        ArtifactError: the files are malformed, or the model computes more than a pooling and a normalization.
    """
    if not (directory / MODULES).is_file():
        directory = directory.parent  # the transformer may be in a subdirectory
    if not (directory / MODULES).is_file():
        return None
    try:
        modules = read_json(directory / MODULES, list[dict[str, Any]])
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if kinds == ["Transformer"]:
            return None
        if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Normalize" for kind in kinds[2:]):
            raise ArtifactError(
                f"the model consists of {', '.join(kinds)}",
                where=str(directory / MODULES),
                why="a transformer, a pooling and a normalization are supported",
                next_step=_WITHOUT_FILES,
            )
        pooling_file = directory / modules[1]["path"] / "config.json"
        config = read_json(pooling_file, dict[str, Any])
        prompts: dict[str, Any] = {}
        if (directory / PROMPTS).is_file():
            prompts = read_json(directory / PROMPTS, dict[str, Any]).get("prompts") or {}
        query, document = (next((str(prompts[name]) for name in names if prompts.get(name)), "") for names in _PROMPTS)
        max_length = _max_length(directory / modules[0].get("path", ""))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(
            "the files of sentence-transformers cannot be read",
            where=str(getattr(error, "filename", None) or directory),
            why=short_reason(error),
            next_step="fetch the model again",
        ) from None
    if config.get("include_prompt") is False and (query or document):
        raise ArtifactError(
            "the pooling leaves out the tokens of the prompt, which is not supported",
            where=f"{pooling_file}: include_prompt",
            why="the vector of a text is computed from all its tokens, those of the prompt included",
            next_step=_WITHOUT_FILES,
        )
    return EmbeddingFiles(_pooling(config, pooling_file), query, document, max_length)


def _pooling(config: dict[str, Any], path: Path) -> str:
    modes = config.get("pooling_mode") or [
        key.removeprefix(_LEGACY) for key, value in config.items() if key.startswith(_LEGACY) and value
    ]
    modes = [str(mode) for mode in modes] if isinstance(modes, list) else [str(modes)]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ArtifactError(
            f"the pooling is {' and '.join(modes) or 'not stated'}",
            where=str(path),
            why="exactly one pooling is supported: mean, cls or lasttoken",
            next_step=_WITHOUT_FILES,
        )
    return _POOLINGS[modes[0]]


def _max_length(transformer: Path) -> int | None:
    """Return the longest text in tokens, or None. Without `max_seq_length` the tokenizer's limit holds.

    Raises:
        OSError, ValueError: a file cannot be read.
        ArtifactError: texts are converted to lower case before a tokenizer that distinguishes case.
    """
    settings, tokenizer = (
        read_json(path, dict[str, Any]) if (path := transformer / name).is_file() else {}
        for name in (LENGTH, _TOKENIZER)
    )
    if settings.get("do_lower_case") and not tokenizer.get("do_lower_case"):
        raise ArtifactError(
            "the model converts texts to lower case before its tokenizer, which is not supported",
            where=f"{transformer / LENGTH}: do_lower_case",
            next_step=f"convert the texts yourself, and {_WITHOUT_FILES}",
        )
    length = settings.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 2):
        raise ValueError(f"{LENGTH}: max_seq_length = {length!r} is no number of tokens from 2")
    limit = tokenizer.get("model_max_length")
    return limit if length is None and type(limit) is int and 2 <= limit < _UNLIMITED else length

"""Pooling and prompts of a model in the form of sentence-transformers: the files next to its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from backhand.errors import ArtifactError
from backhand.reading import read_json

MODULES, PROMPTS, LENGTH = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
POOLING_NAMES = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
"""Names of the poolings in the files."""
_LEGACY = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
_QUERY, _DOCUMENT = ("query",), ("document", "passage")


class EmbeddingFiles(NamedTuple):
    """Contents of the files."""

    pooling: str  # `mean`, `cls` or `last`
    query_prompt: str
    document_prompt: str


def read_embedding_files(directory: Path) -> EmbeddingFiles | None:
    """Return pooling and prompts, or None for a model that is no model of sentence-transformers.

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
        if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Normalize" for kind in kinds[2:]):
            raise ArtifactError(
                f"the model consists of {', '.join(kinds)}",
                where=str(directory / MODULES),
                why="a transformer, a pooling and a normalization are supported",
                next_step="give --pooling, --query-prompt and --document-prompt to train the transformer alone",
            )
        config = read_json(directory / modules[1]["path"] / "config.json", dict[str, Any])
        modes = config.get("pooling_mode") or [mode for key, mode in _LEGACY.items() if config.get(key)]
        mode = modes[0] if isinstance(modes, list) and len(modes) == 1 else modes
        pooling = next((name for name, written in POOLING_NAMES.items() if written == mode), None)
        if pooling is None:
            raise ArtifactError(
                f"the pooling {mode!r} is not supported",
                where=str(directory / modules[1]["path"] / "config.json"),
                next_step=f"give --pooling {' or '.join(POOLING_NAMES)}",
            )
        prompts: dict[str, Any] = {}
        if (directory / PROMPTS).is_file():
            prompts = read_json(directory / PROMPTS, dict[str, Any]).get("prompts") or {}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(
            "the files of sentence-transformers cannot be read",
            where=str(directory),
            why=str(error),
            next_step="fetch the model again",
        ) from None

    def prompt(names: tuple[str, ...]) -> str:
        return next((str(prompts[name]) for name in names if prompts.get(name)), "")

    return EmbeddingFiles(pooling, prompt(_QUERY), prompt(_DOCUMENT))

"""Options of vectors of texts.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from backhand.bounds import Bound, Check, Options
from backhand.data.rows import PoolingName
from backhand.errors import UsageError

EmbeddingLoss = Literal["infonce", "symmetric", "triplet", "cosent"]


def _check_dims(where: str, dims: Any) -> None:
    """Raise UsageError unless `dims` are different positive integers."""
    if not all(isinstance(size, int) and size > 0 for size in dims) or len({*dims}) < len(dims):
        raise UsageError(f"{list(dims)} are not different lengths of vectors", where=where)


@dataclass(frozen=True)
class VectorOptions(Options):
    """The loss of vectors."""

    pooling: PoolingName | None = None
    """The vector of a text (`embed`): the hidden state of its `last` token, which is the end-of-sequence token, of its
    first one (`cls`), or the `mean` of all. Default: as the model's sentence-transformers files say, else `last`."""

    embedding_loss: EmbeddingLoss | None = None
    """Loss of vectors (`embed`): `infonce` with all texts of a step as negatives, `symmetric` to find anchors from
    positives as well, `triplet` with the negatives of the row alone, or `cosent` for pairs with a score. Default:
    `cosent` for pairs with a score, else `infonce`."""

    similarity_scale: Annotated[float, Bound(at_least=0.01, at_most=1000.0)] = 20.0
    """Factor of the cosines in the losses of vectors, the inverse of a temperature."""

    triplet_margin: Annotated[float, Bound(above=0.0, at_most=2.0)] = 0.5
    """Margin between the cosines of positive and negative (`triplet`)."""

    matryoshka_dims: Annotated[tuple[int, ...], Check(_check_dims)] = ()
    """Lengths to which the vectors can be cut, such as `256 128 64` (`embed`; 2205.13147). The loss is the sum over
    these and the whole vector."""

    query_prompt: str | None = None
    """Text in front of every anchor (`embed`), such as an instruction. Default: as the model's sentence-transformers
    files say, else none."""

    document_prompt: str | None = None
    """Text in front of all other texts (`embed`). Default: as for `query_prompt`."""


def check_loss(options: Any) -> None:
    """Raise UsageError for numbers that the form of the loss does not use."""
    if options.embedding_loss != "triplet" and options.triplet_margin != VectorOptions.triplet_margin:
        raise UsageError(
            f"triplet_margin {options.triplet_margin} is given, but the loss is not triplet",
            where="triplet_margin",
            next_step="leave it out, or give --embedding-loss triplet",
        )
    if options.embedding_loss == "triplet" and options.similarity_scale != VectorOptions.similarity_scale:
        raise UsageError(
            f"similarity_scale {options.similarity_scale} is given, but triplet does not use it",
            where="similarity_scale",
            next_step="leave it out; triplet has --triplet-margin",
        )

"""What `backhand combine`, `inspect`, `diff` and `compress` can be told; no torch, for the command line reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from backhand.adapters.config import Rank
from backhand.bounds import Bound, Check, Options, Share, Words
from backhand.errors import UsageError
from backhand.nn.model_options import AdapterReading

Operation = Literal["add", "scale", "average", "subtract", "concatenate", "ties", "dare", "svd"]
DEFAULT_DENSITY = {"ties": 0.2, "dare": 0.1}
"""TIES keeps the largest fifth [arXiv:2306.01708, §4], DARE drops nine of ten [arXiv:2311.03099, §4]."""


_LARGEST_WEIGHT = 1e9


def parse_weights(words: Sequence[str]) -> tuple[float, ...]:
    """Numbers from the words behind `--weights`, with spaces or commas between them.

    Raises:
        UsageError: a word that is none; names of adapters, perhaps, that an option cannot tell from its own words.
    """
    found = []
    for word in ",".join(words).split(","):
        try:
            found.append(float(word))
        except ValueError:
            raise UsageError(
                f"{word!r} is not a number",
                where="weights",
                why="every word behind --weights, up to the next option, is a weight",
                next_step="name the adapters first: backhand combine add A B --weights 0.7 0.3",
            ) from None
    return tuple(found)


def _check_weight(where: str, weight: Any) -> None:
    if not math.isfinite(weight) or weight == 0:
        raise UsageError(f"weight {weight!r} is not a finite number other than 0", where=where)
    if not 1 / _LARGEST_WEIGHT <= abs(weight) <= _LARGEST_WEIGHT:
        raise UsageError(
            f"weight {weight!r} is out of range",
            where=where,
            why=f"it may be {1 / _LARGEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}: float32 holds no more",
        )


@dataclass(frozen=True)
class CombineOptions(Options):
    """What to make of which adapters; everything is said of ΔW = scaling · lora_B @ lora_A."""

    operation: Operation
    """`add`: Σ w ΔW. `subtract`: the first less the others. `average`: Σ w ΔW / Σ w. `scale`: one adapter times its
    weight. `concatenate`: as `add`, the factors side by side as they are. `svd`: as `add`, at the smallest rank that
    loses nothing, or at `rank`. `ties`, `dare`: entries chosen before they are added, see docs/adapters.md."""

    adapters: tuple[Path, ...] = ()
    """The adapters: directories that training or PEFT wrote, or, with `model`, GGUF files."""

    output: Path | None = None
    """Directory for the new adapter, in PEFT's format."""

    weights: Annotated[tuple[Annotated[float, Check(_check_weight)], ...], Words(parse_weights)] = ()
    """One number an adapter, behind the adapters: `combine add A B --weights 0.7 0.3`. Not given: 1 each; `scale` needs
    its one."""

    rank: Rank | None = None
    """Largest rank of the new adapter. Not given: the rank of the result, so that nothing is lost; for `ties` and
    `dare`, whose results have full rank, the largest rank among the adapters. What is lost is said."""

    density: Annotated[float, Bound(above=0, at_most=1)] | None = None
    """Share of the entries of ΔW that `ties` and `dare` keep; not given: 0.2 for `ties`, 0.1 for `dare`."""

    seed: int = 0
    """Which entries `dare` keeps."""

    model: str | None = None
    """Base model to hold the adapters against, and to record in the new one; not given: the adapters against each
    other."""

    force_base: bool = False
    """Combine adapters that were trained on different base models, tokenizers or chat templates."""

    overwrite: bool = False
    """Replace an adapter that is already in `output`."""

    json: bool = False
    """Print one JSON object in place of the table."""

    reading: AdapterReading = field(default_factory=AdapterReading)

    def _check_together(self) -> None:
        count = len(self.adapters)
        needed = 2 if self.operation not in ("scale", "svd") else 1
        if count < needed or (self.operation == "scale" and count > 1):
            wanted = "one adapter" if self.operation == "scale" else f"{needed} adapters or more"
            raise UsageError(f"{self.operation} takes {wanted}, {count} given", where="adapters")
        self._check_weights(count)
        if self.output is None:
            raise UsageError("there is no place for the new adapter", where="output", next_step="name a directory")
        if self.rank is not None and self.operation == "concatenate":
            raise UsageError(
                "concatenate keeps the factors as they are", where="rank", next_step="take add, which reduces them"
            )
        if self.density is not None and self.operation not in DEFAULT_DENSITY:
            raise UsageError(f"{self.operation} keeps every entry", where="density")

    def _check_weights(self, count: int) -> None:
        if self.operation == "scale" and not self.weights:
            raise UsageError("scale needs the number to multiply by", where="weights", next_step="give --weights 0.5")
        if self.weights and len(self.weights) != count:
            weights = f"{len(self.weights)} weight{'s' if len(self.weights) != 1 else ''}"
            raise UsageError(
                f"{weights} for {count} adapter{'s' if count != 1 else ''}",
                where="weights",
                next_step="give each adapter its number, in their order",
            )
        if self.operation == "average" and self.weights and abs(sum(self.weights)) < 1e-9 * max(map(abs, self.weights)):
            raise UsageError(
                "the weights of an average add up to 0", where="weights", next_step="take add, which does not divide"
            )

    def coefficients(self) -> tuple[float, ...]:
        """What each adapter's ΔW is multiplied by."""
        weights = self.weights or (1.0,) * len(self.adapters)
        if self.operation == "average":
            return tuple(weight / sum(weights) for weight in weights)
        if self.operation == "subtract":
            return (weights[0], *(-weight for weight in weights[1:]))
        return weights

    def kept_density(self) -> float:
        """The density in force."""
        return self.density if self.density is not None else DEFAULT_DENSITY[self.operation]


@dataclass(frozen=True)
class InspectOptions(Options):
    """What to look at, and what to leave."""

    adapter: Path
    """The adapter: the directory that training or PEFT wrote, or, with `model`, a GGUF file."""

    error: Share = 0.01
    """How far ΔW may be off, relative to ‖ΔW‖, for a rank to count as enough; the rest of the rank is wasted."""

    model: str | None = None
    """Base model to hold norms against; not given: the one the adapter names, if it is on this machine."""

    force_base: bool = False
    """Hold them against this base model although the adapter was trained on another."""

    json: bool = False
    """Print one JSON object in place of the tables."""

    plot: bool = False
    """Draw inspect.png, into `output` or, if that is not given, here."""

    output: Path | None = None
    """Directory for inspect.json and the picture."""

    reading: AdapterReading = field(default_factory=AdapterReading)


@dataclass(frozen=True)
class DiffOptions(Options):
    """What to compare, and what to leave."""

    first: Path
    """One adapter: a directory, or, with `model`, a GGUF file."""

    second: Path
    """The other."""

    error: Share | None = None
    """Largest difference allowed in any module, relative to the larger ‖ΔW‖ of the two; above it the command fails
    with exit code 6. Not given: any."""

    model: str | None = None
    """Base model, which adapters in GGUF files are read beside."""

    json: bool = False
    """Print one JSON object in place of the table."""

    plot: bool = False
    """Draw diff.png, into `output` or, if that is not given, here."""

    output: Path | None = None
    """Directory for diff.json and the picture."""

    reading: AdapterReading = field(default_factory=AdapterReading)


@dataclass(frozen=True)
class CompressOptions(Options):
    """What to make smaller, and how far it may be off."""

    adapter: Path
    """The adapter: the directory that training or PEFT wrote, or, with `model`, a GGUF file."""

    error: Share = 0.05
    """How far each module's ΔW may be off, relative to ‖ΔW‖: it gets the smallest rank that keeps to this."""

    output: Path | None = None
    """Directory for the smaller adapter; not given: only say what it would be."""

    model: str | None = None
    """Base model, which an adapter in a GGUF file is read beside."""

    overwrite: bool = False
    """Replace an adapter that is already in `output`."""

    json: bool = False
    """Print one JSON object in place of the table."""

    plot: bool = False
    """Draw compress.png, into `output` or, if that is not given, here."""

    reading: AdapterReading = field(default_factory=AdapterReading)

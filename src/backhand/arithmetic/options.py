"""Options of `backhand combine`, `inspect`, `diff` and `compress`. Imports no torch: the command line reads it."""

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
    """Parse the numbers after `--weights`, separated by spaces or commas.

    Raises:
        UsageError: if a word is not a number, such as an adapter that is named after the option.
    """
    found = []
    for word in ",".join(words).split(","):
        try:
            found.append(float(word))
        except ValueError:
            raise UsageError(
                f"{word!r} is not a number",
                where="weights",
                why="every word after --weights, up to the next option, is a weight",
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
            why=f"weights are {1 / _LARGEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}, so that float32 can store the result",
        )


@dataclass(frozen=True)
class CombineOptions(Options):
    """Options of `combine`. All operations are on the updates ΔW = scaling · lora_B @ lora_A."""

    operation: Operation
    """`add`: Σ w ΔW. `subtract`: the first minus the others. `average`: Σ w ΔW / Σ w. `scale`: one adapter times its
    weight. `concatenate`: as `add`, with concatenated factors. `svd`: as `add`, at the smallest rank without loss, or
    at `rank`. `ties`, `dare`: entries are selected before they are added, see docs/adapters.md."""

    adapters: tuple[Path, ...] = ()
    """The adapters: directories that training or PEFT wrote, or, with `model`, GGUF files."""

    output: Path | None = None
    """Directory for the new adapter, in PEFT's format."""

    weights: Annotated[tuple[Annotated[float, Check(_check_weight)], ...], Words(parse_weights)] = ()
    """One number per adapter, after the adapters: `combine add A B --weights 0.7 0.3`. Default: 1 each; required for
    `scale`."""

    rank: Rank | None = None
    """Largest rank of the new adapter. Default: the rank of the result, so that nothing is lost; for `ties` and `dare`,
    whose results have full rank, the largest rank of the adapters. The error is printed."""

    density: Annotated[float, Bound(above=0, at_most=1)] | None = None
    """Share of the entries of ΔW that `ties` and `dare` keep. Default: 0.2 for `ties`, 0.1 for `dare`."""

    seed: int = 0
    """Random seed for the entries that `dare` keeps."""

    model: str | None = None
    """Base model to check the adapters against, and to record in the new one. Default: the adapters are checked against
    each other."""

    force_base: bool = False
    """Combine adapters that were trained on different base models, tokenizers or chat templates."""

    overwrite: bool = False
    """Replace an adapter that is already in `output`."""

    json: bool = False
    """Print one JSON object instead of the table."""

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
        """Return the factor of each adapter's ΔW."""
        weights = self.weights or (1.0,) * len(self.adapters)
        if self.operation == "average":
            return tuple(weight / sum(weights) for weight in weights)
        if self.operation == "subtract":
            return (weights[0], *(-weight for weight in weights[1:]))
        return weights

    def kept_density(self) -> float:
        """The given density, or the operation's default."""
        return self.density if self.density is not None else DEFAULT_DENSITY[self.operation]


@dataclass(frozen=True)
class InspectOptions(Options):
    """Options of `inspect`."""

    adapter: Path
    """The adapter: the directory that training or PEFT wrote, or, with `model`, a GGUF file."""

    error: Share = 0.01
    """Allowed error of ΔW, relative to ‖ΔW‖, for the needed rank; any rank above it counts as wasted."""

    model: str | None = None
    """Base model to compare norms with. Default: the one that the adapter names, if it is on this machine."""

    force_base: bool = False
    """Compare norms with this base model although the adapter was trained on another."""

    json: bool = False
    """Print one JSON object instead of the tables."""

    plot: bool = False
    """Draw inspect.png into `output`, or into the current directory by default."""

    output: Path | None = None
    """Directory for inspect.json and the picture."""

    reading: AdapterReading = field(default_factory=AdapterReading)


@dataclass(frozen=True)
class DiffOptions(Options):
    """Options of `diff`."""

    first: Path
    """First adapter: a directory, or, with `model`, a GGUF file."""

    second: Path
    """Second adapter."""

    error: Share | None = None
    """Largest difference allowed in any module, relative to the larger ‖ΔW‖ of the two; above it the command fails
    with exit code 6. Default: no limit."""

    model: str | None = None
    """Base model, needed to read adapters in GGUF files."""

    json: bool = False
    """Print one JSON object instead of the table."""

    plot: bool = False
    """Draw diff.png into `output`, or into the current directory by default."""

    output: Path | None = None
    """Directory for diff.json and the picture."""

    reading: AdapterReading = field(default_factory=AdapterReading)


@dataclass(frozen=True)
class CompressOptions(Options):
    """Options of `compress`."""

    adapter: Path
    """The adapter: the directory that training or PEFT wrote, or, with `model`, a GGUF file."""

    error: Share = 0.05
    """Allowed error of each module's ΔW, relative to ‖ΔW‖: the module gets the smallest rank within this error."""

    output: Path | None = None
    """Directory for the smaller adapter. Default: only print the result."""

    model: str | None = None
    """Base model, needed to read an adapter in a GGUF file."""

    overwrite: bool = False
    """Replace an adapter that is already in `output`."""

    json: bool = False
    """Print one JSON object instead of the table."""

    plot: bool = False
    """Draw compress.png into `output`, or into the current directory by default."""

    reading: AdapterReading = field(default_factory=AdapterReading)

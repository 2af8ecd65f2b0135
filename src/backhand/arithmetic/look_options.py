"""What `backhand inspect`, `diff` and `compress` can be told. This file imports no torch: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from backhand.bounds import Options, Share
from backhand.nn.model_options import AdapterReading


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

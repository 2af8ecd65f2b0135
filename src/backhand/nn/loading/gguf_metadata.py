"""Read a GGUF file's metadata key by key: check type and range, and report the keys that nothing has read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile

NEUTRAL = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "classifier.output_labels")
"""Keys that do not change the model's computation."""
NEUTRAL_VALUES = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
"""Keys that do not change the model's computation if they have these values."""
_TOO_LARGE = 2**31
_KIND_NAMES = {int: "non-negative integer", float: "non-negative number", str: "string"}


def describe(value: object) -> str:
    """Format a value for a message. A list is given by its length."""
    return f"a list of {len(value)}" if isinstance(value, list) else f"{value!r:.60}"


class Metadata:
    """The architecture's metadata keys, without their prefix `<architecture>.`. It records which keys were read.

    Methods raise ArtifactError if a value has the wrong type or is out of range.
    """

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._file = file
        self._prefix = f"{architecture}."
        self._read: set[str] = set(NEUTRAL)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key. A list of equal items, one per layer, is returned as that item."""
        self._read.add(key)
        value = self._file.value(self._prefix + key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        return self.checked(key, self.get(key, default))

    def checked(self, key: str, value: object) -> int:
        """Return a value of a key, or one item of its list, after checking that it is a positive integer."""
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _TOO_LARGE:
            why = "models whose layers differ in size are not supported" if isinstance(value, list) else None
            raise self._wrong(key, f"= {describe(value)} is not a positive integer below {_TOO_LARGE}", why)
        return value

    def first(self, key: str, default: int | None = None) -> int:
        """Return a positive integer, or the first one of a list."""
        value = self.get(key, default)
        return self.checked(key, value[0] if isinstance(value, list) and value else value)

    def per_layer(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """Return a positive integer per layer. A single number applies to all layers."""
        value = self.get(key, default)
        if not isinstance(value, list):
            return [self.checked(key, value)] * layers
        if len(value) != layers:
            raise self._wrong(key, f"has {len(value)} numbers for {layers} layers")
        return [self.checked(key, item) for item in value]

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, f"= {describe(value)} is not a positive number")
        return float(value)

    def optional(self, key: str, kind: type[int] | type[float] | type[str]) -> Any:
        """Return a non-negative number or a string, or None if the key is absent."""
        value = self.get(key)
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if value is not None and not (fits and (kind is str or 0 <= value < _TOO_LARGE)):
            raise self._wrong(key, f"= {describe(value)} is not a {_KIND_NAMES[kind]}")
        return value

    def _wrong(self, key: str, what: str, why: str | None = None) -> ArtifactError:
        return ArtifactError(f"{self._prefix}{key} {what}", where=str(self._file.path), why=why)

    @property
    def window(self) -> int | None:
        """The sliding window, or None if the key is absent or 0."""
        return self.optional("attention.sliding_window", int) or None

    def sliding_rope_parameters(self, theta: float) -> dict[str, Any]:
        """Return the rope parameters of sliding layers. `theta` is the default base."""
        return {"rope_type": "default", "rope_theta": self.number("rope.freq_base_swa", theta)}

    def accept_if_equal(self, key: str, expected: float) -> None:
        """Mark a key as read if it confirms the expected number. Any other number stays unread."""
        value = self._file.value(self._prefix + key)
        if isinstance(value, int | float) and math.isclose(value, expected, rel_tol=1e-5):
            self._read.add(key)

    def mark_unread(self, key: str) -> None:
        """Report a key as unread even if its value was read."""
        self._read.discard(key)

    def unread_keys(self) -> tuple[dict[str, Any], list[str]]:
        """Return the keys that were not read and are not neutral, with their full names.

        The first result maps keys that the gguf package declares to their values; the second lists all other keys.
        """
        names = {key.removeprefix(self._prefix) for key in self._file if key.startswith(self._prefix)}
        unread, foreign = {}, []
        for name in sorted(names - self._read):
            key = self._prefix + name
            value = self._file.value(key)
            if name in NEUTRAL_VALUES and NEUTRAL_VALUES[name] == value:
                continue
            if name in declared_keys():
                unread[key] = value
            else:
                foreign.append(key)
        return unread, foreign


def all_but_every(metadata: Metadata, key: str, layers: int, interval: int) -> list[bool]:
    """Return a flag per layer: the list in the file, or, from an interval n, False for every n-th layer.

    Args:
        interval: the default interval.
    """
    pattern = metadata.get(key, interval)
    if isinstance(pattern, bool):
        return [pattern] * layers
    if isinstance(pattern, list):
        return [bool(item) for item in pattern]
    period = metadata.integer(key, interval)
    return [bool((layer + 1) % period) for layer in range(layers)]


def sliding_layers(metadata: Metadata, layers: int, interval: int) -> list[bool]:
    """Return True per layer that uses a sliding window. `interval` is the default."""
    return all_but_every(metadata, "attention.sliding_window_pattern", layers, interval)


def layer_kinds(slides: Iterable[bool]) -> list[str]:
    """Return a config's `layer_types` from the flags of the sliding layers."""
    return ["sliding_attention" if sliding else "full_attention" for sliding in slides]


def rotary_fraction(rotated: int, head_dim: int) -> float:
    """Return a `partial_rotary_factor` f for which transformers' int(head_dim * f) is exactly `rotated`."""
    fraction = rotated / head_dim
    return fraction if int(head_dim * fraction) == rotated else math.nextafter(fraction, 1.0)


@cache
def declared_keys() -> frozenset[str]:
    """Return the architecture keys that the installed gguf package declares, without the architecture's name."""
    from gguf.constants import Keys

    def texts(holder: type) -> Iterator[str]:
        for name, value in vars(holder).items():
            if isinstance(value, type):
                yield from texts(value)
            elif isinstance(value, str) and not name.startswith("_"):
                yield value

    return frozenset(text.removeprefix("{arch}.") for text in texts(Keys) if text.startswith("{arch}."))

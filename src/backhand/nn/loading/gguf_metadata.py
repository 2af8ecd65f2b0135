"""A GGUF file's metadata, read key by key: of the right kind, in range, and none left unread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile

NEUTRAL = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type")
"""Keys that do not change what a model computes."""
NEUTRAL_VALUES = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
"""Keys that do not with these values."""
_TOO_LARGE = 2**31
_KIND_NAMES = {int: "number from 0 on", float: "number from 0 on", str: "text"}


def describe(value: object) -> str:
    """A value in a message; of a list its length."""
    return f"a list of {len(value)}" if isinstance(value, list) else f"{value!r:.60}"


class Metadata:
    """Keys of the architecture, without its name in front, noting which were read; wrong values are ArtifactErrors."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._file = file
        self._prefix = f"{architecture}."
        self._read: set[str] = set(NEUTRAL)

    def get(self, key: str, default: Any = None) -> Any:
        """The value; a list of equal numbers, one for each layer, is that number."""
        self._read.add(key)
        value = self._file.value(self._prefix + key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A number from 1 on; an ArtifactError where it is none."""
        return self.checked(key, self.get(key, default))

    def checked(self, key: str, value: object) -> int:
        """This number, which is the key's or in its list; an ArtifactError where it is none from 1 on."""
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _TOO_LARGE:
            why = "models whose layers differ in size are not supported" if isinstance(value, list) else None
            raise self._wrong(key, f"= {describe(value)} is not a positive integer below {_TOO_LARGE}", why)
        return value

    def first(self, key: str, default: int | None = None) -> int:
        """A number from 1 on, or the first in a list of such; an ArtifactError where it is none."""
        value = self.get(key, default)
        return self.checked(key, value[0] if isinstance(value, list) and value else value)

    def per_layer(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """A number from 1 on for each layer; an ArtifactError where it is none, or the list has another length."""
        value = self.get(key, default)
        if not isinstance(value, list):
            return [self.checked(key, value)] * layers
        if len(value) != layers:
            raise self._wrong(key, f"has {len(value)} numbers for {layers} layers")
        return [self.checked(key, item) for item in value]

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero; an ArtifactError where it is none."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, f"= {describe(value)} is not a positive number")
        return float(value)

    def optional(self, key: str, kind: type[int] | type[float] | type[str]) -> Any:
        """A number that is not negative, or a text; None where there is none."""
        value = self.get(key)
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if value is not None and not (fits and (kind is str or 0 <= value < _TOO_LARGE)):
            raise self._wrong(key, f"= {describe(value)} is no {_KIND_NAMES[kind]}")
        return value

    def _wrong(self, key: str, what: str, why: str | None = None) -> ArtifactError:
        return ArtifactError(f"{self._prefix}{key} {what}", where=str(self._file.path), why=why)

    @property
    def window(self) -> int | None:
        """The sliding window, None where there is none, as 0 says too."""
        return self.optional("attention.sliding_window", int) or None

    def sliding_rope_parameters(self, theta: float) -> dict[str, Any]:
        """The rotary parameters of sliding layers, with this base where the file is silent."""
        return {"rope_type": "default", "rope_theta": self.number("rope.freq_base_swa", theta)}

    def accept_if_equal(self, key: str, expected: float) -> None:
        """Take a number that says what is known already; another one stays unread."""
        value = self._file.value(self._prefix + key)
        if isinstance(value, int | float) and math.isclose(value, expected, rel_tol=1e-5):
            self._read.add(key)

    def mark_unread(self, key: str) -> None:
        """Hand a key on as unread, whatever has been asked of it."""
        self._read.discard(key)

    def unread_keys(self) -> tuple[dict[str, Any], list[str]]:
        """What was not asked for and is not known to be neutral, under its full name: with its value, and foreign."""
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


def sliding_layers(metadata: Metadata, layers: int, interval: int) -> list[bool]:
    """Which layers slide: as the file lists them, or all but every so-manieth, as it says or as is usual."""
    pattern = metadata.get("attention.sliding_window_pattern", interval)
    if isinstance(pattern, bool):
        return [pattern] * layers
    if isinstance(pattern, list):
        return [bool(item) for item in pattern]
    period = metadata.integer("attention.sliding_window_pattern", interval)
    return [bool((layer + 1) % period) for layer in range(layers)]


def layer_kinds(slides: Iterable[bool]) -> list[str]:
    """`layer_types` by which layers slide."""
    return ["sliding_attention" if here else "full_attention" for here in slides]


def rotary_fraction(rotated: int, head_dim: int) -> float:
    """A share of which, multiplied and cut as transformers does it, is that number again."""
    share = rotated / head_dim
    return share if int(head_dim * share) == rotated else math.nextafter(share, 1.0)


@cache
def declared_keys() -> frozenset[str]:
    """Keys of an architecture that the installed gguf package declares, without the architecture's name."""
    from gguf.constants import Keys

    def texts(holder: type) -> Iterator[str]:
        for name, value in vars(holder).items():
            if isinstance(value, type):
                yield from texts(value)
            elif isinstance(value, str) and not name.startswith("_"):
                yield value

    return frozenset(text.removeprefix("{arch}.") for text in texts(Keys) if text.startswith("{arch}."))

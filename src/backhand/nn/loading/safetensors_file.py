"""Read safetensors files, with errors that name damaged downloads."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.loading.source import check_floating
from backhand.reading import kind_of, open_plain

_FETCH_AGAIN = "fetch the model again"
_BYTES_PER_MAPPING = 1 << 20


class SafetensorsFile:
    """One safetensors file. The header stays open, and the data is mapped again after each mebibyte read.

    Pages read through a mapping count as memory of the process until the mapping is closed. Reading through the
    header's handle would therefore keep the whole file in memory in addition to the weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping: tuple[Any, int] = None, 0  # the open mapping, and the number of bytes still to read through it

    @cached_property
    def _header(self) -> Any:
        return self._opened()

    def _opened(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            open_plain(self.path).close()  # safe_open would block on a pipe
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    @cached_property
    def names(self) -> dict[str, None]:
        """Names of all tensors, in the header's order."""
        return dict.fromkeys(self._header.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return tuple(self._header.get_slice(name).get_shape())

    def load(self, name: str) -> Tensor:
        """Return a tensor of a floating dtype, mapped.

        Raises:
            ArtifactError: if the file is damaged or the dtype is not floating.
        """
        return check_floating(self.raw(name), name, str(self.path))

    def raw(self, name: str) -> Tensor:
        """Return a tensor of any dtype, mapped.

        Raises:
            ArtifactError: if the file is damaged.
        """
        from safetensors import SafetensorError

        try:
            current = self._mapping  # read once, because several threads read tensors
            mapped, remaining = current if current[1] else (self._opened(), _BYTES_PER_MAPPING)
            tensor: Tensor = mapped.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None
        if self._mapping is current:  # otherwise another thread has stored its mapping, which stays
            self._mapping = (mapped, remaining - tensor.nbytes) if remaining > tensor.nbytes else (None, 0)
        return tensor

    def _damaged(self, error: Exception) -> ArtifactError:
        try:
            with open_plain(self.path) as file:
                kind = kind_of(file.read(512))
        except OSError as unreadable:
            return ArtifactError(f"{self.path} cannot be read: {unreadable.strerror}", next_step=_FETCH_AGAIN)
        why = str(error) if kind is None else f"it is {kind}"
        return ArtifactError(f"{self.path} is damaged or incomplete", why=why, next_step=_FETCH_AGAIN)

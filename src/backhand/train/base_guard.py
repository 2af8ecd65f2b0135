"""The frozen base must be finite and must not move: a digest of every tensor at start and end, samples between."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from backhand.errors import CheckError
from backhand.train.interface import Trainable
from backhand.train.proofs import Proof, ProofLog

_SHOWN = 5


class BaseGuard:
    """Remembers the digests of the base's tensors.

    Args:
        model: its `frozen_tensors` are read once now.
        log: told what was found.

    Raises:
        CheckError: a tensor holds NaN or infinity. Logits would not show it: torch's CPU attention turns NaN queries
            of short documents into zeros.
    """

    def __init__(self, model: Trainable, log: ProofLog) -> None:
        self._model = model
        self._log = log
        self._digests: dict[str, bytes] = {}
        self._next_sample = 0
        unusable: list[str] = []
        for name, tensor in model.frozen_tensors():
            self._digests[name] = tensor_digest(tensor)
            if not is_finite(tensor):
                unusable.append(name)
        log(Proof("every base weight is finite", not unusable, len(unusable), 0))
        if unusable:
            raise CheckError(
                f"{len(unusable)} of {len(self._digests)} base weights hold NaN or infinity",
                where=first_names(unusable),
                next_step="load the model again from its source: the file is damaged, or overflows in this dtype",
            )

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of all tensors as they were at the start, in the compute dtype."""
        whole = hashlib.sha256()
        for name in sorted(self._digests):
            whole.update(name.encode() + b"\0" + self._digests[name])
        return whole.hexdigest()

    def sample(self) -> None:
        """Look at one tensor, the next one each time. Raises CheckError if it has moved."""
        tensors = list(self._model.frozen_tensors())
        self._compare([tensors[self._next_sample % len(tensors)]], "a sample")
        self._next_sample += 1

    def check(self) -> None:
        """Look at every tensor, and log the proof. Raises CheckError naming those that have moved."""
        self._compare(self._model.frozen_tensors(), "all")
        self._log(Proof("the frozen base has not moved by one bit (SHA-256)", True, 0, 0))

    def _compare(self, tensors: Iterable[tuple[str, Tensor]], which: str) -> None:
        moved = [name for name, tensor in tensors if self._digests[name] != tensor_digest(tensor)]
        if moved:
            self._log(Proof(f"the frozen base has not moved by one bit (SHA-256, {which})", False, len(moved), 0))
            raise CheckError(
                f"{len(moved)} frozen base weights have changed during training",
                where=first_names(moved),
                why="something else than the adapter was written to",
                next_step="if code of your own runs in this process, keep it from the model; else report it",
            )


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of the bytes of a tensor."""
    return hashlib.sha256(byte_view(tensor)).digest()


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; integers always do not."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN comes through both; no mask of the tensor's size is made
    return bool(torch.isfinite(low) & torch.isfinite(high))


def named_unusable(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Names of the tensors that are not finite."""
    return (name for name, tensor in tensors if not is_finite(tensor))


def first_names(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest

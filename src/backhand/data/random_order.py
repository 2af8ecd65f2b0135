"""Random permutations that are the same with every version of NumPy."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def random_order(count: int, seed: int, *stream: object) -> npt.NDArray[np.int64]:
    """Return a random permutation of `range(count)`, (count,) int64, from a seed and the name of the stream.

    It sorts raw 64-bit draws of the Philox generator: NumPy guarantees that raw draws never change, but not that
    `permutation` does not.
    """
    name = repr((seed, *stream)).encode()
    key = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8").astype(np.uint64)
    draws = np.random.Philox(key=key).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64, copy=False)

"""Independent seeds for every purpose of a run, from its one seed: nothing random has a state that could be lost."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """An independent 63-bit seed for one purpose, e.g. the dropout of one micro-batch of one step."""
    text = "/".join(str(part) for part in (seed, purpose, *numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

"""The builds and dtypes in which products are a loop of ours: float64, proved, in each; bfloat16 with AMX's tiles."""

from __future__ import annotations

import torch

from backhand.kernels.builds import usable

_WIDE = [name for name in usable() if name not in ("baseline", "avx2")]
ALIKE = frozenset(_WIDE[:-1])
"""Builds whose source is that of the widest one here, but for bfloat16."""

PRODUCT_BUILDS = [(name, torch.float64) for name in usable() if name not in ALIKE] + [("amx", torch.bfloat16)] * (
    "amx" in usable()
)


def build_id(kind: tuple[str, torch.dtype]) -> str:
    return f"{kind[0]}-{str(kind[1]).rpartition('.')[2]}"

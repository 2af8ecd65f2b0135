"""What the dotted path of a module says: its kind, and its layer."""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def kind_of(module: str) -> str:
    """What the module is in every layer: its last part, such as `q_proj`."""
    return module.rsplit(".", 1)[-1]


def layer_of(module: str) -> int | None:
    """The first number in the path, if there is one."""
    match = _LAYER.search(module)
    return int(match[1]) if match else None

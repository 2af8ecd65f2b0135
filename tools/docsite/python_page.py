"""The Python interface: every public name of the package, by mkdocstrings, from its own docstring."""

from __future__ import annotations

import backhand

_BY_ROOM = {
    "Fine-tune": (
        "train",
        "TrainConfig",
        "ModelOptions",
        "DataOptions",
        "LoRAConfig",
        "OptimizationOptions",
        "RunOptions",
        "Observer",
    ),
    "Use": ("generate", "classify", "export"),
    "Measure": ("evaluate", "EvaluateOptions", "EvaluateRunOptions", "compare"),
    "Any PyTorch model": ("inject", "inject_from"),
    "Errors": ("BackhandError",),
}


def python_page() -> str:
    """Every name of `backhand.__all__`, the known ones in groups, any other at the end."""
    homes: dict[str, str] = backhand._HOMES
    grouped = {name for names in _BY_ROOM.values() for name in names}
    groups = _BY_ROOM | {"More": tuple(name for name in homes if name not in grouped)}
    parts = ["# Python names", "`import backhand` imports nothing else; each name is loaded when it is first used."]
    for title, names in groups.items():
        if names:
            parts += [f"## {title}", *(f"::: {homes[name]}.{name}" for name in names)]
    return "\n\n".join([*parts, ""])

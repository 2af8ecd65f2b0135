"""Names of the matrices of a mixture's experts, which files have in several ways.

    model.layers.0.mlp.experts.3.gate_proj.weight            (f, hidden)            Qwen3-MoE on the hub; inside here
    model.layers.0.block_sparse_moe.experts.3.w1.weight      (f, hidden)            Mixtral on the hub: w1, w3, w2
    model.layers.0.mlp.experts.gate_up_proj                  (experts, 2f, hidden)  modules of transformers 5
    model.layers.0.mlp.experts.down_proj                     (experts, hidden, f)

A matrix that lies in a stack is a piece of it. transformers writes the names of the hub and reads both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

_STACK = re.compile(r".*\.mlp\.experts\.(gate_up_proj|down_proj)")
_MIXTRAL = re.compile(r"(?P<block>.*)\.block_sparse_moe\.(?P<rest>.+)")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_ONE = re.compile(r"(?P<block>.*)\.mlp\.experts\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")


class Piece(NamedTuple):
    """A matrix in a stack: which expert's, and which of its rows."""

    expert: int
    rows: slice

    def of(self, stack: Tensor) -> Tensor:
        """The matrix, a view of the stack, (experts, out, in)."""
        return stack[self.expert, self.rows]

    def shape(self, stack: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of the matrix, from the stack's shape."""
        return len(range(*self.rows.indices(stack[1]))), stack[2]


def may_hold_experts(name: str) -> bool:
    """Whether a tensor of this name is a stack of matrices if it has three dimensions; asking costs no file."""
    return _STACK.fullmatch(name) is not None


def experts_within(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Piece | None]]:
    """What a stored tensor holds: (name inside Backhand, which piece of it) each, None for all of it.

    Args:
        name: as a Hugging Face directory has it.
        shape: of the tensor.
    """
    if _STACK.fullmatch(name) is None or len(shape) != 3:
        yield _renamed(name), None
        return
    for module, piece in matrices_of(name, shape[0], shape[1]):
        yield f"{module}.weight", piece


def parts_of(parameter: str) -> tuple[str, ...]:
    """Which linear modules of an expert a parameter holds, by the last part of its path."""
    return ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)


def matrices_of(parameter: str, experts: int, out_features: int) -> Iterator[tuple[str, Piece]]:
    """What a parameter of experts consists of: (path of an expert's linear module, which piece it is) each.

    Args:
        parameter: its path, which ends in `gate_up_proj` or `down_proj`.
        experts: how many.
        out_features: rows of each expert's matrix in it.
    """
    holder, _, own = parameter.rpartition(".")
    parts = parts_of(own)
    rows = out_features // len(parts)
    for expert in range(experts):
        for place, part in enumerate(parts):
            yield f"{holder}.{expert}.{part}", Piece(expert, slice(place * rows, (place + 1) * rows))


def parameter_of(name: str) -> str | None:
    """Path of the parameter of experts that holds this matrix, given by its name in here; None for any other tensor."""
    found = expert_of(name)
    if found is None:
        return None
    block, _, part = found
    return f"{block}.mlp.experts.{part if part == 'down_proj' else 'gate_up_proj'}"


def matrices_within(parameter: str, names: Iterable[str]) -> Iterator[str]:
    """Those of these tensors, by their names in here, that a parameter of experts consists of."""
    holder, _, own = parameter.rpartition(".")
    parts = parts_of(own)
    for name in names:
        found = expert_of(name) if name.startswith(f"{holder}.") else None
        if found is not None and found[2] in parts:
            yield name


def _renamed(name: str) -> str:
    match = _MIXTRAL.fullmatch(name)
    if match is None:
        return name
    *path, last, kind = match["rest"].split(".")
    return ".".join([match["block"], "mlp", *path, _MIXTRAL_PARTS.get(last, last), kind])


def expert_of(name: str) -> tuple[str, int, str] | None:
    """(path of the block, number of the expert, `gate_proj` and so on) of an expert's matrix by its name in here."""
    match = _ONE.fullmatch(name)
    return None if match is None else (match["block"], int(match["expert"]), match["part"])


def hub_name(model_type: object, name: str) -> str:
    """What files on the hub call a tensor that has this name in here."""
    if model_type != "mixtral":
        return name
    found, names = expert_of(name), {ours: theirs for theirs, ours in _MIXTRAL_PARTS.items()}
    if found is not None:
        block, expert, part = found
        return f"{block}.block_sparse_moe.experts.{expert}.{names[part]}.weight"
    block, gate, _ = name.partition(".mlp.gate.weight")
    return f"{block}.block_sparse_moe.gate.weight" if gate else name

"""Names of the matrices of a mixture's experts, which files have in several ways.

    model.layers.0.mlp.experts.3.gate_proj.weight            (f, hidden)            Qwen3-MoE on the hub; inside here
    model.layers.0.block_sparse_moe.experts.3.w1.weight      (f, hidden)            Mixtral on the hub: w1, w3, w2
    model.layers.0.mlp.experts.gate_up_proj                  (experts, 2f, hidden)  modules of transformers 5
    model.layers.0.mlp.experts.down_proj                     (experts, hidden, f)
    model.layers.0.mlp.experts.gate_up_proj                  (experts, hidden, 2f)  gpt-oss, everywhere: gate's and up's
    model.layers.0.mlp.experts.gate_up_proj_bias             (experts, 2f)          outputs interleaved
    model.layers.0.mlp.experts.down_proj                     (experts, f, hidden)
    model.layers.0.mlp.experts.down_proj_bias                (experts, hidden)

A matrix that lies in a stack is a piece of it, and so is a bias. transformers writes the names of the hub and reads
both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

_STACK = re.compile(r".*\.mlp\.experts\.(gate_up_proj|down_proj)(?P<bias>_bias)?")
_MIXTRAL = re.compile(r"(?P<block>.*)\.block_sparse_moe\.(?P<rest>.+)")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_ONE = re.compile(
    r"(?P<block>.*)\.mlp\.experts\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.(?:weight|bias)"
)


class StackLayout(NamedTuple):
    """How a stack of matrices lies in files and modules."""

    transposed: bool = False  # each is (in, out)
    interleaved: bool = False  # gate's and up's outputs are interleaved; else gate's come before up's


_LAYOUTS = {"gpt_oss": StackLayout(transposed=True, interleaved=True)}


def stack_layout(model_type: object) -> StackLayout:
    """Of the stacks of models of this type."""
    return _LAYOUTS.get(str(model_type), StackLayout())


class ExpertSlice(NamedTuple):
    """A matrix in a stack, or a bias: which expert's, which of its rows, and whether the stack has them as columns."""

    expert: int
    rows: slice
    transposed: bool = False

    def view(self, stack: Tensor) -> Tensor:
        """The matrix or bias, a view of the stack, (experts, out, in), (experts, in, out) or (experts, out)."""
        one = stack[self.expert]
        return (one.T if self.transposed else one)[self.rows]

    def shape(self, stack: tuple[int, ...]) -> tuple[int, ...]:
        """(out, in) of the matrix or (out,) of the bias, from the stack's shape."""
        rows, *columns = stack[:0:-1] if self.transposed else stack[1:]
        return (len(range(*self.rows.indices(rows))), *columns)


def may_hold_experts(name: str) -> bool:
    """Whether a tensor of this name is a stack if it has the dimensions of one; asking costs no file."""
    return _STACK.fullmatch(name) is not None


def split_experts(
    name: str, shape: tuple[int, ...], model_type: object = None
) -> Iterator[tuple[str, ExpertSlice | None]]:
    """What a stored tensor holds: (name inside Backhand, which piece of it) each, None for all of it.

    Args:
        name: as a Hugging Face directory has it.
        model_type: of the model, by which stacks lie in one way or another.
    """
    match = _STACK.fullmatch(name)
    if match is None or len(shape) != (2 if match["bias"] else 3):
        yield _renamed(name), None
        return
    layout, kind = stack_layout(model_type), "bias" if match["bias"] else "weight"
    transposed = layout.transposed and kind == "weight"
    parameter, out_features = name.removesuffix("_bias"), shape[2] if transposed else shape[1]
    for module, piece in expert_slices(parameter, shape[0], out_features, interleaved=layout.interleaved):
        yield f"{module}.{kind}", piece._replace(transposed=transposed)


def expert_parts(parameter: str) -> tuple[str, ...]:
    """Which linear modules of an expert a parameter holds, by the last part of its path."""
    return ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)


def expert_slices(
    parameter: str, experts: int, out_features: int, *, interleaved: bool = False
) -> Iterator[tuple[str, ExpertSlice]]:
    """What a parameter of experts consists of: (path of an expert's linear module, which piece it is) each.

    Args:
        parameter: its path, which ends in `gate_up_proj` or `down_proj`.
        out_features: rows of each expert's matrix in it.
        interleaved: whether the rows of two linear modules are interleaved.
    """
    holder, _, own = parameter.rpartition(".")
    parts = expert_parts(own)
    rows = out_features // len(parts)
    for expert in range(experts):
        for place, part in enumerate(parts):
            apart = slice(place * rows, (place + 1) * rows)
            taken = slice(place, out_features, len(parts)) if interleaved else apart
            yield f"{holder}.{expert}.{part}", ExpertSlice(expert, taken)


def expert_parameter(name: str) -> str | None:
    """Path of the parameter of experts that holds this matrix, given by its name in here; None for any other tensor."""
    found = parse_expert_name(name)
    if found is None or not name.endswith(".weight"):
        return None
    block, _, part = found
    return f"{block}.mlp.experts.{part if part == 'down_proj' else 'gate_up_proj'}"


def expert_matrices(parameter: str, names: Iterable[str]) -> Iterator[str]:
    """Those of these tensors, by their names in here, that a parameter of experts consists of."""
    holder, _, own = parameter.rpartition(".")
    parts = expert_parts(own)
    for name in names:
        found = parse_expert_name(name) if name.startswith(f"{holder}.") and name.endswith(".weight") else None
        if found is not None and found[2] in parts:
            yield name


def _renamed(name: str) -> str:
    match = _MIXTRAL.fullmatch(name)
    if match is None:
        return name
    *path, last, kind = match["rest"].split(".")
    return ".".join([match["block"], "mlp", *path, _MIXTRAL_PARTS.get(last, last), kind])


def parse_expert_name(name: str) -> tuple[str, int, str] | None:
    """(path of the block, number of the expert, `gate_proj` and so on) of an expert's matrix or bias by its name."""
    match = _ONE.fullmatch(name)
    return None if match is None else (match["block"], int(match["expert"]), match["part"])


def hub_name(model_type: object, name: str) -> str:
    """What files on the hub call a tensor that has this name in here, or the stack that it is a piece of."""
    found = parse_expert_name(name)
    if found is not None and stack_layout(model_type).transposed:
        block, _, part = found
        kind = "_bias" if name.endswith(".bias") else ""
        return f"{block}.mlp.experts.{part if part == 'down_proj' else 'gate_up_proj'}{kind}"
    if model_type != "mixtral":
        return name
    names = {ours: theirs for theirs, ours in _MIXTRAL_PARTS.items()}
    if found is not None:
        block, expert, part = found
        return f"{block}.block_sparse_moe.experts.{expert}.{names[part]}.weight"
    block, gate, _ = name.partition(".mlp.gate.weight")
    return f"{block}.block_sparse_moe.gate.weight" if gate else name


def stack_shape(model_type: object, stack: str, members: int, one: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a stack on the hub.

    Args:
        members: how many matrices or biases lie in it.
        one: shape of one of them, (out, in) or (out,).
    """
    parts = len(expert_parts(stack.rpartition(".")[2].removesuffix("_bias")))
    sizes = (one[0] * parts, *one[1:])
    return (members // parts, *(sizes[::-1] if stack_layout(model_type).transposed else sizes))

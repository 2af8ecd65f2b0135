"""Names and layouts of the expert matrices of a mixture in checkpoints.

    model.layers.0.mlp.experts.3.gate_proj.weight            (f, hidden)            Qwen3-MoE on the hub; Backhand
    model.layers.0.block_sparse_moe.experts.3.w1.weight      (f, hidden)            Mixtral on the hub: w1, w3, w2
    model.layers.0.mlp.experts.gate_up_proj                  (experts, 2f, hidden)  modules of transformers 5
    model.layers.0.mlp.experts.down_proj                     (experts, hidden, f)
    model.layers.0.mlp.experts.gate_up_proj                  (experts, hidden, 2f)  gpt-oss, everywhere: gate's and up's
    model.layers.0.mlp.experts.gate_up_proj_bias             (experts, 2f)          outputs interleaved
    model.layers.0.mlp.experts.down_proj                     (experts, f, hidden)
    model.layers.0.mlp.experts.down_proj_bias                (experts, hidden)
    model.layers.0.block_sparse_moe.input_linear.weight      (experts, 2f, hidden)  Granite 4 on the hub
    model.layers.0.block_sparse_moe.output_linear.weight     (experts, hidden, f)

The matrices and biases of all experts are either separate tensors or slices of one stacked tensor. transformers writes
the names of the hub and reads both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

_STACK = re.compile(r".*\.mlp\.experts\.(gate_up_proj|down_proj)(?P<bias>_bias)?")
_MIXTRAL = re.compile(r"(?P<block>.*)\.block_sparse_moe\.(?P<rest>.+)")
_GRANITE = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
    "router.layer.weight": "router.weight",
}
"""Names on the hub → names in transformers, after `block_sparse_moe.`."""
_MIXTRAL_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_ONE = re.compile(
    r"(?P<block>.*)\.mlp\.experts\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.(?:weight|bias)"
)


class StackLayout(NamedTuple):
    """Layout of a stack of matrices in files and modules."""

    transposed: bool = False  # each matrix is (in, out)
    interleaved: bool = False  # outputs of gate and up are interleaved; otherwise gate's come before up's


_LAYOUTS = {"gpt_oss": StackLayout(transposed=True, interleaved=True)}


def stack_layout(model_type: object) -> StackLayout:
    """Return the layout of the stacks in models of this type."""
    return _LAYOUTS.get(str(model_type), StackLayout())


class ExpertSlice(NamedTuple):
    """One matrix or bias in a stack: the expert, its rows, and True if they are columns of the stack."""

    expert: int
    rows: slice
    transposed: bool = False

    def view(self, stack: Tensor) -> Tensor:
        """View the matrix or bias in its stack, (experts, out, in), (experts, in, out) or (experts, out)."""
        matrix = stack[self.expert]
        return (matrix.T if self.transposed else matrix)[self.rows]

    def shape(self, stack: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape (out, in) of the matrix or (out,) of the bias, from the stack's shape."""
        rows, *columns = stack[:0:-1] if self.transposed else stack[1:]
        return (len(range(*self.rows.indices(rows))), *columns)


def may_hold_experts(name: str) -> bool:
    """Return True if a tensor of this name is a stack, provided that it has three dimensions, or two for a bias."""
    return _STACK.fullmatch(_renamed(name)) is not None


def split_experts(
    name: str, shape: tuple[int, ...], model_type: object = None
) -> Iterator[tuple[str, ExpertSlice | None]]:
    """Split a stored tensor into experts: (Backhand name, slice of it), or (Backhand name, None) for all of it.

    Args:
        name: the tensor's name in a Hugging Face directory.
        model_type: the model's type, which determines the layout of stacks.
    """
    name = _renamed(name)
    match = _STACK.fullmatch(name)
    if match is None or len(shape) != (2 if match["bias"] else 3):
        yield name, None
        return
    layout, kind = stack_layout(model_type), "bias" if match["bias"] else "weight"
    transposed = layout.transposed and kind == "weight"
    parameter, out_features = name.removesuffix("_bias"), shape[2] if transposed else shape[1]
    for module, piece in expert_slices(parameter, shape[0], out_features, interleaved=layout.interleaved):
        yield f"{module}.{kind}", piece._replace(transposed=transposed)


def expert_parts(parameter: str) -> tuple[str, ...]:
    """Return the names of an expert's linear modules in a parameter, given the last part of the parameter's path."""
    return ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)


def expert_slices(
    parameter: str, experts: int, out_features: int, *, interleaved: bool = False
) -> Iterator[tuple[str, ExpertSlice]]:
    """Iterate over the matrices of an expert parameter as (path of an expert's linear module, slice).

    Args:
        parameter: path of the parameter, which ends in `gate_up_proj` or `down_proj`.
        out_features: rows of each expert's matrix in the parameter.
        interleaved: True if the rows of the two linear modules are interleaved.
    """
    experts_path, _, last = parameter.rpartition(".")
    parts = expert_parts(last)
    rows = out_features // len(parts)
    for expert in range(experts):
        for index, part in enumerate(parts):
            contiguous = slice(index * rows, (index + 1) * rows)
            taken = slice(index, out_features, len(parts)) if interleaved else contiguous
            yield f"{experts_path}.{expert}.{part}", ExpertSlice(expert, taken)


def expert_parameter(name: str) -> str | None:
    """Return the path of the expert parameter that contains this matrix, or None for any other tensor.

    Args:
        name: the matrix's Backhand name.
    """
    parsed = parse_expert_name(name)
    if parsed is None or not name.endswith(".weight"):
        return None
    block, _, part = parsed
    return f"{block}.mlp.experts.{part if part == 'down_proj' else 'gate_up_proj'}"


def expert_matrices(parameter: str, names: Iterable[str]) -> Iterator[str]:
    """Iterate over the given Backhand names that are matrices of an expert parameter."""
    experts_path, _, last = parameter.rpartition(".")
    parts = expert_parts(last)
    for name in names:
        is_matrix = name.startswith(f"{experts_path}.") and name.endswith(".weight")
        parsed = parse_expert_name(name) if is_matrix else None
        if parsed is not None and parsed[2] in parts:
            yield name


def _renamed(name: str) -> str:
    match = _MIXTRAL.fullmatch(name)
    if match is None:
        return name
    *path, last, kind = _GRANITE.get(match["rest"], match["rest"]).split(".")
    return ".".join([match["block"], "mlp", *path, _MIXTRAL_PARTS.get(last, last), kind])


def parse_expert_name(name: str) -> tuple[str, int, str] | None:
    """Split the name of an expert's matrix or bias into (block's path, expert's number, module such as `gate_proj`).

    Returns None for any other name.
    """
    match = _ONE.fullmatch(name)
    return None if match is None else (match["block"], int(match["expert"]), match["part"])


def hub_name(model_type: object, name: str) -> str:
    """Return the name of a tensor in files on the hub, or the name of the stack that contains it.

    Args:
        name: the tensor's Backhand name.
    """
    parsed = parse_expert_name(name)
    if parsed is not None and stack_layout(model_type).transposed:
        block, _, part = parsed
        kind = "_bias" if name.endswith(".bias") else ""
        return f"{block}.mlp.experts.{part if part == 'down_proj' else 'gate_up_proj'}{kind}"
    if model_type == "granitemoehybrid":
        block, inside, _ = name.partition(".mlp.")
        parameter = expert_parameter(name) or name
        hub = {ours: theirs for theirs, ours in _GRANITE.items()}
        return f"{block}.block_sparse_moe.{hub[parameter.partition('.mlp.')[2]]}" if inside else name
    if model_type != "mixtral":
        return name
    names = {ours: theirs for theirs, ours in _MIXTRAL_PARTS.items()}
    if parsed is not None:
        block, expert, part = parsed
        return f"{block}.block_sparse_moe.experts.{expert}.{names[part]}.weight"
    block, gate, _ = name.partition(".mlp.gate.weight")
    return f"{block}.block_sparse_moe.gate.weight" if gate else name


def stack_shape(model_type: object, stack: str, members: int, one: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a stack in files on the hub.

    Args:
        members: number of matrices or biases in the stack.
        one: shape of one of them, (out, in) or (out,).
    """
    parts = len(expert_parts(_renamed(stack).rpartition(".")[2].removesuffix("_bias")))
    sizes = (one[0] * parts, *one[1:])
    return (members // parts, *(sizes[::-1] if stack_layout(model_type).transposed else sizes))

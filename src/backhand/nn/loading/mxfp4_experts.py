"""Expert matrices in OpenAI's gpt-oss checkpoints: MXFP4 blocks and their scales, in two tensors.

    model.layers.0.mlp.experts.gate_up_proj_blocks   (experts, 2f, hidden / 32, 16)  uint8; gate and up interleaved
    model.layers.0.mlp.experts.gate_up_proj_scales   (experts, 2f, hidden / 32)      uint8
    model.layers.0.mlp.experts.down_proj_blocks      (experts, hidden, f / 32, 16)
    model.layers.0.mlp.experts.down_proj_scales      (experts, hidden, f / 32)

A block is 32 numbers of four bits [OCP Microscaling Formats 1.0, §5.2 and §6.3], each times 2^(scale - 127). In these
files byte i holds number 2i in its lower half and number 2i + 1 in its upper half. In ggml's MXFP4, which the kernels
dequantize and multiply, the scale comes first, and byte i holds numbers i and i + 16. Reordering changes no bit of a
number, and bfloat16 represents every number exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from backhand.kernels.dequantize import block_shape, dequantize
from backhand.kernels.quantized_matrix import StoredRows
from backhand.nn.loading.expert_tensors import ExpertSlice, expert_slices, stack_layout

MXFP4 = 39
"""ggml's type number of MXFP4."""
_PACKED = re.compile(r"(?P<parameter>.*\.mlp\.experts\.(?:gate_up_proj|down_proj))_blocks")
_BLOCK_BYTES = 16


def packed_parameters(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the expert parameters stored in MXFP4: path → (name of the blocks, name of the scales)."""
    available = set(names)
    packed = {}
    for name in sorted(available):
        match = _PACKED.fullmatch(name)
        if match is not None and (scales := f"{match['parameter']}_scales") in available:
            packed[match["parameter"]] = (name, scales)
    return packed


def is_packed_shape(blocks: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    """Return True if tensors of these shapes are blocks and their scales."""
    return len(blocks) == 4 and blocks[3] == _BLOCK_BYTES and scales == blocks[:3]


def packed_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (out, in) of one expert's matrix from the shape of its blocks, (out, in / 32, 16)."""
    rows, groups, _ = blocks
    return rows, groups * block_shape(MXFP4)[0]


def packed_rows(blocks: Tensor, scales: Tensor) -> StoredRows:
    """Copy one expert's blocks, (out, in / 32, 16), and scales, (out, in / 32), into ggml's order."""
    first, second = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).chunk(2, dim=-1)
    stored = torch.cat([scales.unsqueeze(-1), first | second << 4], dim=-1)
    return StoredRows(np.ascontiguousarray(stored.flatten(1).numpy()), MXFP4)


def packed_matrices(parameter: str, blocks: tuple[int, ...], model_type: object) -> Iterator[tuple[str, ExpertSlice]]:
    """Iterate over the matrices of an expert parameter as (Backhand name, slice of the blocks and of the scales)."""
    interleaved = stack_layout(model_type).interleaved
    for module, piece in expert_slices(parameter, blocks[0], blocks[1], interleaved=interleaved):
        yield f"{module}.weight", piece


def unpacked(rows: StoredRows) -> Tensor:
    """Return the matrix, (out, in), in bfloat16, which represents all of its values exactly."""
    return dequantize(rows.blocks, rows.type_id, torch.empty(rows.row_count, rows.columns, dtype=torch.bfloat16))

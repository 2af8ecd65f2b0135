"""The frozen matrix: cases with dense and with quantized weights, and mutants.

Blocks are random bytes, except for their scales, which have a common size. The gguf package's dequantization is the
reference. Products are cut into tiles far smaller than in a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backhand.kernels.dequantize import Bytes, block_shape
from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.ops.frozen_matrix import FrozenLinearGrads, FrozenLinearSaved
from backhand.ops.weight_tiles import FrozenMatrix, column_tiles, frozen_dense, row_tiles
from backhand.verify.mutants import Backward, Mutant, transpose_if_square, wrong
from backhand.verify.scaffold import ROWS, SMALLEST_TILES, Arguments, Draw, Op

# Offsets of the float16 numbers of a block: its scale, then its minimum, if it has them.
_HALVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("F16", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ2_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "BF16": (),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def random_blocks(draw: Draw, name: str, rows: int, columns: int) -> Bytes:
    """Draw blocks of a type by its ggml name, (rows, bytes): random bytes, with scales of ±1/32 to ±1/4."""
    values, size = block_shape(int(gguf.GGMLQuantizationType[name]))
    count = rows * columns // values
    if name == "BF16":
        return draw.normal(rows, columns).bfloat16().view(torch.uint8).numpy()
    blocks = draw.integers(256, count, size).to(torch.uint8)
    for place in _HALVES[name]:
        scales = (1 + draw.integers(8, count).double()) / 32 * (1 - 2 * draw.integers(2, count))
        blocks[:, place : place + 2] = scales.half().view(torch.uint8).view(count, 2)
    return blocks.view(rows, columns // values * size).numpy()


def _drawn_weight(
    draw: Draw, columns: int, parts: list[tuple[str, int]], ordered: bool, columns_ordered: bool
) -> dict[str, Tensor]:
    """Draw a weight of stacked parts (ggml type, rows): bytes and row orders. A part of type `dense` must be alone."""
    if parts[0][0] == "dense":
        return {"dense": draw.normal(parts[0][1], columns).float()}
    stored = {f"blocks {i}": torch.from_numpy(random_blocks(draw, *part, columns)) for i, part in enumerate(parts)}
    orders = [torch.randperm(rows, generator=draw.generator) for _, rows in parts if ordered]
    transposed_weight = [torch.randperm(columns, generator=draw.generator) for _ in parts if columns_ordered]
    stored |= {f"order {i}": order for i, order in enumerate(orders)}
    return stored | {f"column_order {i}": order for i, order in enumerate(transposed_weight)}


def _stored(args: Arguments) -> list[StoredRows]:
    """Return the stored form of each part."""

    def order(name: str, i: int) -> Tensor | None:
        return args[f"{name} {i}"].cpu() if f"{name} {i}" in args else None

    return [
        StoredRows(
            args[f"blocks {i}"].cpu().numpy(),
            int(gguf.GGMLQuantizationType[name]),
            order("order", i),
            order("column_order", i),
        )
        for i, (name, _) in enumerate(args["parts"])
    ]


def _fields(part: StoredRows) -> tuple[Bytes, int, Tensor | None, Tensor | None]:
    return part.blocks, part.type_id, part.order, part.column_order


def _numbers(args: Arguments) -> Tensor:
    """Dequantize the blocks with the gguf package."""
    x: Tensor = args["x"]
    parts = [args["dense"].to(x)] if "dense" in args else []
    for blocks, type_id, order, columns in [] if parts else map(_fields, _stored(args)):
        rows = gguf.dequantize(np.ascontiguousarray(blocks), gguf.GGMLQuantizationType(type_id))
        part = torch.from_numpy(np.array(rows, dtype=np.float32)).to(x)
        part = part if order is None else part[order]
        parts.append(part if columns is None else part[:, columns])
    return torch.cat(parts)


def _stored_weight(args: Arguments, backward: Backward) -> tuple[Tensor, FrozenLinearGrads]:
    x, matrix = args["x"], args.get("dense")
    if matrix is not None:
        matrix = matrix.to(x)
    else:
        matrix = QuantizedMatrix(_stored(args), x.dtype, x.device)
    y, saved = args.call(OP.forward, weight=matrix)
    return y, backward(args["d_y"], saved)


def _baseline(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = functional.linear(x, weight, bias)
    return y if residual is None else y + residual


OP = Op(
    "frozen_linear",
    dict(drawn=_drawn_weight, x="*lead columns", d_y="*lead outputs", bias="outputs") | dict(residual="*lead outputs"),
    dict(lead=ROWS, columns=..., parts=..., bias=False, residual=False, ordered=False, columns_ordered=False)
    | dict(tile_bytes=SMALLEST_TILES),
    baseline=_baseline,
    derived={"weight": _numbers, "outputs": lambda parts: sum(rows for _, rows in parts)},
    runner=_stored_weight,
    compiled=True,
)


CASES = (
    *OP.standard_cases(columns=288, parts=[("Q4_1", 65)], bias=True),
    OP.case("several tiles each way", (9,), 544, [("Q4_0", 130)]),
    OP.case("more rows than columns, in several tiles", (6,), 288, [("Q5_1", 170), ("Q8_0", 135)], bias=True),
    OP.case("more dense rows than columns, in tiles", (9,), 259, [("dense", 270)], residual=True),
    OP.case("minima", (5,), 544, [("Q4_1", 67)], bias=True),
    OP.case("documents, residual", (2, 3), 512, [("Q4_K", 70)], residual=True),
    OP.case(
        "parts of different types", (3, 4), 512, [("Q4_K", 66), ("Q6_K", 9), ("Q5_0", 71)], bias=True, residual=True
    ),
    OP.case("rows in another order", (11,), 544, [("Q8_0", 130), ("Q5_1", 7)], ordered=True),
    OP.case("square weight", (5,), 256, [("Q3_K", 256)]),
    OP.case("one tile", (5,), 512, [("Q2_K", 9)], tile_bytes=None),
    OP.case("dense in tiles", (9,), 544, [("dense", 130)], bias=True),
    OP.case("tiles with as many rows as columns", (9,), 64, [("dense", 130)]),
    OP.case("tiles with as many columns as rows", (9,), 544, [("dense", 256)]),
    OP.case("dense in one", (5,), 37, [("dense", 11)], tile_bytes=None, residual=True),
    OP.case(
        "other types of one block", (3,), 256, [("Q5_K", 3), ("IQ4_XS", 5), ("IQ4_NL", 2), ("F16", 4), ("BF16", 6)]
    ),
    OP.case("by the gguf package", (3,), 512, [("IQ2_XS", 66)]),
    OP.case("by the gguf package, piece by piece", (9,), 512, [("IQ2_XS", 66)], pieces=4 * 512),
    OP.case("columns in another order", (9,), 544, [("Q4_0", 13), ("Q8_0", 70)], columns_ordered=True, pieces=4),
    OP.case("few rows, columns in another order", (3,), 512, [("Q6_K", 9)], columns_ordered=True, pieces=4),
    OP.case("rows and columns in another order", (2,), 544, [("Q5_1", 70)], ordered=True, columns_ordered=True),
    OP.case("dense, threads", (41,), 300, [("dense", 400)], bias=True, tile_bytes=None, threads=3),
    OP.case("blocks, threads", (41,), 512, [("Q4_K", 230), ("Q6_K", 9)], ordered=True, tile_bytes=None, threads=3),
    OP.case("few rows, threads", (3,), 1312, [("Q4_0", 109), ("Q8_0", 6)], residual=True, threads=3),
    OP.case("few rows, longer than a piece", (8,), 1312, [("Q4_0", 9), ("Q8_0", 6)], bias=True, residual=True),
    OP.case("few rows in another order", (2,), 1024, [("Q6_K", 7), ("Q5_K", 5)], ordered=True),
    OP.case("few dense rows of odd width", (3,), 1051, [("dense", 10)], bias=True, residual=True),
    OP.case("dense of odd sizes", (37,), 61, [("dense", 45)], bias=True, residual=True, tile_bytes=None),
    OP.case("dense, outputs of whole blocks", (33,), 64, [("dense", 96)], tile_bytes=None),
    OP.case("dense, sums in parts, several panels", (13,), 1551, [("dense", 231)], bias=True, tile_bytes=None),
    OP.case("dense, gradients' sums in parts", (11,), 35, [("dense", 1539)], residual=True, tile_bytes=None),
    OP.case("blocks, sums in parts", (10,), 1792, [("Q4_K", 37), ("Q8_0", 9)], bias=True, ordered=True),
)


def _reread(name: str, change: Callable[[StoredRows], StoredRows]) -> tuple[Mutant, ...]:
    """Run the right backward with wrongly read parts of a quantized W."""

    def weight(s: FrozenLinearSaved) -> FrozenMatrix:
        right = s.weight
        if isinstance(right, Tensor):
            return right
        return QuantizedMatrix([change(part) for part in right.parts], right.dtype, right.device)

    return OP.perturb(name, "d_x", weight=weight)


def _blocks(name: str, change: Callable[[Bytes, str], None]) -> tuple[Mutant, ...]:
    """Run the right backward with every block changed in place, (blocks, bytes)."""

    def changed(part: StoredRows) -> StoredRows:
        copy = part.blocks.copy()
        change(copy.reshape(-1, block_shape(part.type_id)[1]), gguf.GGMLQuantizationType(part.type_id).name)
        return replace(part, blocks=copy)

    return _reread(name, changed)


def _neighbours_scale(blocks: Bytes, name: str) -> None:
    for place in _HALVES[name][:1]:
        blocks[:, place : place + 2] = np.roll(blocks[:, place : place + 2], 1, axis=0)


def _no_minimum(blocks: Bytes, name: str) -> None:
    for place in _HALVES[name][1:]:
        blocks[:, place : place + 2] = 0


def _nibbles_swapped(blocks: Bytes, name: str) -> None:
    if name in ("Q4_0", "Q4_1", "Q4_K"):
        packed = blocks[:, -(128 if name == "Q4_K" else 16) :]
        packed[:] = (packed << 4) | (packed >> 4)


def _columns(change: Callable[[list[Tensor]], list[Tensor]]) -> Callable[..., Tensor]:
    """Assemble the tiles of d_x wrongly."""
    return lambda g, s: torch.cat(change([g @ frozen_dense(s.weight)[:, tile] for tile in column_tiles(s.weight)]), -1)


def _rows(change: Callable[[list[Tensor]], list[Tensor]]) -> Callable[..., Tensor]:
    """Add up the row tiles' parts of d_x wrongly."""
    return lambda g, s: torch.stack(
        change([g[..., tile] @ frozen_dense(s.weight)[tile] for tile in row_tiles(s.weight)])
    ).sum(0)


def _edges_late(g: Tensor, s: FrozenLinearSaved) -> Tensor:
    """Start every tile but the first one block too late, so that a block of the weight is left out."""
    dense = frozen_dense(s.weight)
    for tile in column_tiles(s.weight)[1:]:
        dense = torch.cat([dense[:, : tile.start], torch.zeros_like(dense[:, :32]), dense[:, tile.start + 32 :]], 1)
    return g @ dense


MUTANTS = (
    wrong("weight transposed", "d_x", lambda g, s: g @ transpose_if_square(frozen_dense(s.weight))),
    _blocks("scale of the block before", _neighbours_scale),
    _blocks("minimum forgotten", _no_minimum),
    _blocks("halves of bytes swapped", _nibbles_swapped),
    _reread("order of rows ignored", lambda part: replace(part, order=None)),
    _reread("order of columns ignored", lambda part: replace(part, column_order=None)),
    _reread(
        "order of columns the other way",
        lambda part: replace(
            part, column_order=part.column_order if part.column_order is None else part.column_order.argsort()
        ),
    ),
    _reread(
        "order of rows the other way",
        lambda part: replace(part, order=part.order if part.order is None else part.order.argsort()),
    ),
    wrong("last column tile missing", "d_x", _columns(lambda tiles: [*tiles[:-1], torch.zeros_like(tiles[-1])])),
    wrong("column tiles in reverse", "d_x", _columns(lambda tiles: tiles[::-1])),
    wrong("block at a tile's edge missing", "d_x", _edges_late),
    wrong("last row tile missing", "d_x", _rows(lambda tiles: tiles[:-1] or [tiles[0] * 0])),
    wrong("first row tile lost by the second", "d_x", _rows(lambda tiles: tiles[1:] or [tiles[0] * 0])),
    wrong("first row tile twice", "d_x", _rows(lambda tiles: [tiles[0], *tiles])),
    wrong("last output missing", "d_x", lambda g, s: g[..., :-1] @ frozen_dense(s.weight)[:-1]),
)

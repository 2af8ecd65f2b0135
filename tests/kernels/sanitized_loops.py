"""Random problems through the loops that take whole documents or a whole decoder, for `sanitized_fuzz`.

Sizes of 0, 1 and odd ones, gaps between rows, and memory that begins at odd addresses and ends with the last number.
What is computed is proved elsewhere: here nothing outside the arrays may be touched, and nothing may become infinite.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from backhand.kernels.builds import Library
from backhand.kernels.library import DOUBLE, INT, INT64, POINTER

DTYPES = ((0, np.float32, np.float32), (1, np.uint16, np.float32), (2, np.float64, np.float64))
"""Number, how numbers are stored, and what is computed in."""
_FEW = (0, 1, 1, 2, 3, 5, 8, 17, 33)
_MATRIX = (POINTER, INT64)
_HEADS = (POINTER, INT64, INT64)


_RANGE = ctypes.CFUNCTYPE(None, INT64, INT64, POINTER)
_MOST_THREADS = 3


@ctypes.CFUNCTYPE(ctypes.c_int32, INT64, INT64, INT64, _RANGE, POINTER)
def parallel_for(begin: int, end: int, grain: int, body: Callable[[int, int, int], None], context: int) -> int:
    """Run the pieces of a range on threads of their own, as torch's loop does where there is torch."""
    step = max(grain, 1, -(-(end - begin) // _MOST_THREADS))
    threads = [
        threading.Thread(target=body, args=(first, min(first + step, end), context))
        for first in range(begin, end, step)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


class Array(NamedTuple):
    """Memory, and where (tokens, heads, width) lie in it: the address, and the distances of tokens and of heads."""

    memory: Any
    place: tuple[int, int, int]

    @property
    def rows(self) -> tuple[int, int]:
        """Of one head: the address, and the distance of rows."""
        return self.place[:2]


class Draw:
    """Draws sizes and arrays."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def size(self, least: int = 0, most: int = 40) -> int:
        """Often a small or an odd one."""
        found = int(self.random.choice(_FEW)) if self.random.random() < 0.6 else int(self.random.integers(0, most))
        return min(max(least, found), most)

    def chance(self) -> bool:
        """True or false."""
        return bool(self.random.random() < 0.5)

    def array(self, dtype: Any, tokens: int, width: int, heads: int = 1, low: float = -1, high: float = 1) -> Array:
        """Numbers between two bounds, with gaps."""
        first, gap, head_gap = (int(number) for number in self.random.integers(0, 4, 3))
        by_head = width + head_gap
        by_token = heads * by_head + gap
        empty = 0 in (tokens, width, heads)
        count = 0 if empty else (tokens - 1) * by_token + (heads - 1) * by_head + width
        numbers = self.random.uniform(low, high, first + count)
        memory = _stored(numbers, dtype)
        return Array(memory, (memory.ctypes.data + first * memory.itemsize, by_token, by_head))

    def segments(self, most: int = 40) -> Any:
        """(3, segments): starts, lengths and parents of documents, which may be empty, or of trees of segments."""
        count, trees = int(self.random.integers(0, 7)), self.chance()
        lengths = np.array([self.size(int(trees), most) for _ in range(count)], np.int64)
        parents, path = [], list[int]()
        for number in range(count):
            path = path[: int(self.random.integers(0, len(path) + 1))] if trees else []
            parents.append(path[-1] if path else -1)
            path.append(number)
        return np.array([np.cumsum(lengths) - lengths, lengths, parents], np.int64).reshape(3, count)


def _stored(numbers: Any, dtype: Any) -> Any:
    if dtype is np.uint16:
        return np.ascontiguousarray((numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    return numbers.astype(dtype)


def _finite(*arrays: Array) -> None:
    for array in arrays:
        memory = array.memory
        if memory.dtype == np.uint16:
            memory = (memory.astype(np.uint32) << 16).view(np.float32)
        assert np.isfinite(memory).all()


def glu(builds: Sequence[Library], draw: Draw) -> None:
    """Gated units of both activations."""
    number, dtype, _ = DTYPES[draw.random.integers(3)]
    rows, n, activation = draw.size(), draw.size(0, 150), int(draw.random.integers(2))
    d_y, gate, up, y, d_gate, d_up = (draw.array(dtype, rows, n, low=-4, high=4) for _ in range(6))
    for build in builds:
        forward = build.function("backhand_glu_forward", (INT, INT, *_MATRIX * 3, INT64, INT64), None)
        forward(number, activation, *gate.rows, *up.rows, *y.rows, rows, n)
        backward = build.function("backhand_glu_backward", (INT, INT, *_MATRIX * 6, INT64, INT64), None)
        again = y.rows if draw.chance() else (None, 0)
        backward(number, activation, *d_y.rows, *gate.rows, *up.rows, *d_gate.rows, *d_up.rows, *again, rows, n)
        _finite(y, d_gate, d_up)


def adapted_glu(builds: Sequence[Library], draw: Draw) -> None:
    """The gated unit's backward with the factors around it, in place or not, of any of them."""
    number, dtype, _ = DTYPES[2 * draw.random.integers(2)]
    rows, n, activation = draw.size(0, 300), draw.size(0, 150), int(draw.random.integers(2))
    d_y, gate, up, d_gate, d_up = (draw.array(dtype, rows, n, low=-4, high=4) for _ in range(5))
    if draw.chance():
        d_gate, d_up = gate, up
    table, held = [*d_y.rows, *gate.rows, *up.rows, *d_gate.rows, *d_up.rows], []
    for _ in range(2):
        rank = draw.size() if draw.chance() else 0
        shapes = (rows, rank), (n, rank), (rows, rank), (n, rank)
        held += [draw.array(dtype, *shape) for shape in shapes]
        table += [each for array in held[-4:] for each in array.rows] + [rank]
    rank = draw.size() if draw.chance() else 0
    held += [draw.array(dtype, rows, rank), draw.array(dtype, rank, n)]
    table += [*held[-2].rows, *held[-1].rows, rank]
    numbers, scalings = np.array(table, np.int64), np.array([0.5, -2.0])
    for build in builds:
        run = build.function("backhand_adapted_glu_backward", (INT, INT, POINTER, POINTER, INT64, INT64), INT)
        assert run(number, activation, numbers.ctypes.data, scalings.ctypes.data, rows, n) == 0
        _finite(d_gate, d_up, *held)


class _Parts:
    """Parts of a stored matrix, each in memory that ends with its last block, as the product takes them."""

    def __init__(self, draw: Draw) -> None:
        wide = draw.random.random() < 0.1
        columns = 256 * int(draw.random.integers(6, 9) if wide else draw.random.integers(0, 3))
        self.held: list[Any] = []
        self.table: list[int] = []
        rows = 0
        for _ in range(int(draw.random.integers(1, 4))):
            type_id, values, size = ((2, 32, 18), (12, 256, 144), (14, 256, 210), (30, 1, 2))[draw.random.integers(4)]
            there = draw.size(0, 60)
            memory = draw.random.integers(0, 256, (there, columns // values * size), np.uint8) & 0x3B
            ids = draw.random.integers(0, there, draw.size(0, 60)) if there and draw.chance() else None
            taken = there if ids is None else len(ids)
            self.held += (memory, ids)
            self.table += (type_id, memory.ctypes.data, memory.shape[1], there)
            self.table += (0 if ids is None else ids.ctypes.data, taken)
            rows += taken
        self.numbers = np.array(self.table, np.int64)
        self.shape = rows, columns


def dense_product(builds: Sequence[Library], draw: Draw) -> None:
    """Products with all that can be added to them, in the room that was asked for; sums in parts now and then."""
    number, dtype, _ = DTYPES[draw.random.integers(3)]
    rows, outputs, inputs = draw.size(0, 80), draw.size(0, 170), draw.size(0, 90)
    if draw.random.random() < 0.1:
        rows, inputs = draw.size(0, 1100), int(draw.random.integers(1500, 1640))
        outputs = draw.size(0, 40)
    turned = draw.chance()
    blocks = _Parts(draw) if draw.chance() else None
    if blocks is not None:
        outputs, inputs = blocks.shape if turned else blocks.shape[::-1]
    x, y, bias = draw.array(dtype, rows, inputs), draw.array(dtype, rows, outputs), draw.array(dtype, 1, outputs)
    if blocks is None:
        w = draw.array(dtype, *((outputs, inputs) if turned else (inputs, outputs)))
        right = (*w.rows, turned, 0, None)
    else:
        right = (None, 0, turned, len(blocks.table) // 6, blocks.numbers.ctypes.data)
    around = y if draw.chance() else draw.array(dtype, rows, outputs)
    residual = around.rows if draw.chance() else (None, 0)
    held: list[Array] = []
    table: list[int] = []
    first, count = 0, int(draw.random.integers(0, 5))
    for _ in range(count):
        first = min(outputs, first + draw.size(0, 9))
        columns, rank, transposed = min(outputs - first, draw.size(0, 70)), draw.size(0, 45), draw.chance()
        h, shrink = draw.array(dtype, rows, rank), draw.array(dtype, rank, inputs)
        factor = draw.array(dtype, *((rank, columns) if transposed else (columns, rank)))
        held.extend((h, factor, shrink))
        table.extend((first, columns, rank, *h.rows, *factor.rows, transposed))
        table.extend(shrink.rows if draw.chance() else (0, 0))
        first += columns
    scalings = (DOUBLE * count)(*draw.random.choice((0.5, 1.0, 0.3, -1.7), count))
    threads = int(draw.random.integers(1, 4))
    types = (INT, *_MATRIX * 2, INT, INT64, POINTER, *_MATRIX * 2, POINTER, INT64, POINTER, POINTER)
    types = (*types, *(INT64,) * 4, POINTER, INT64)
    for build in builds:
        run = build.function("backhand_dense_product", types, INT64)
        given = (
            *(number, *x.rows, *right, *y.rows, *residual, bias.place[0] if draw.chance() else None, count),
            *((INT64 * len(table))(*table), scalings, rows, outputs, inputs, threads),
        )
        needed = run(*given, None, 0)
        room = np.full(needed + 1, 255, np.uint8)  # no numbers, wherever something is read before it is written
        assert run(*given, room.ctypes.data + 1, needed) == 0
        _finite(y, *held)


def causal_conv(builds: Sequence[Library], draw: Draw) -> None:
    """Convolutions as they are, with SiLU, and gated."""
    number, dtype, _ = DTYPES[draw.random.integers(3)]
    mode, channels, taps = int(draw.random.integers(3)), draw.size(0, 70), int(draw.random.integers(1, 9))
    table = draw.segments()
    tokens = int(table[1].sum())
    inputs = 3 * channels if mode == 2 else channels
    x, d_x = draw.array(dtype, tokens, inputs), draw.array(dtype, tokens, inputs)
    y, d_y = draw.array(dtype, tokens, channels), draw.array(dtype, tokens, channels)
    weight, bias = draw.array(dtype, channels, taps), draw.array(dtype, 1, channels)
    where = (table.ctypes.data, table.shape[1], channels, taps)
    given = (*x.rows, *weight.rows, bias.place[0] if draw.chance() else None, *where)
    problem = (INT, INT, *_MATRIX, *_MATRIX, POINTER, POINTER, *(INT64,) * 3)
    for build in builds:
        build.function("backhand_causal_conv_forward", (*problem, *_MATRIX), None)(number, mode, *given, *y.rows)
        backward = build.function("backhand_causal_conv_backward", (*problem, *_MATRIX, *_MATRIX), None)
        backward(number, mode, *given, *d_y.rows, *d_x.rows)
        _finite(y, d_x)


def attention(builds: Sequence[Library], draw: Draw) -> None:
    """Trees of segments, both directions, windows, sinks, shared heads; with saved sums, or the output recomputed."""
    number, dtype, wide = DTYPES[draw.random.integers(3)]
    kv_heads, group, head_dim = (int(draw.random.integers(1, high)) for high in (4, 4, 70))
    table = draw.segments(70)
    tokens = int(table[1].sum())
    window = int(draw.random.integers(1, 20)) if draw.chance() else tokens + 1
    heads = kv_heads * group
    q, output, again, d_y, d_q = (draw.array(dtype, tokens, head_dim, heads) for _ in range(5))
    k, v, d_k, d_v = (draw.array(dtype, tokens, head_dim, kv_heads) for _ in range(4))
    sinks = draw.random.normal(size=heads)
    where = (table.ctypes.data, table.shape[1], heads, kv_heads, head_dim, window)
    problem = (POINTER, *(INT64,) * 5, DOUBLE, POINTER, INT)
    causal = int(bool((table[2] >= 0).any()) or draw.chance())
    given = (*where, 0.3, sinks.ctypes.data if draw.chance() else None, causal)
    nowhere = (None, 0, 0)
    sums = np.zeros((heads, tokens), wide)
    of_queries = (sums.ctypes.data, tokens) if draw.chance() else (None, 0)
    for build in builds:
        forward = build.function("backhand_attention_forward", (INT, *_HEADS * 4, POINTER, INT64, *problem), INT)
        assert forward(number, *q.place, *k.place, *v.place, *output.place, *of_queries, *given) == 0
        backward = build.function("backhand_attention_backward", (INT, *_HEADS * 9, POINTER, INT64, *problem), INT)
        places = [part for x in (q, k, v, d_y, d_q, d_k, d_v) for part in x.place]
        recomputed = again.place if of_queries[0] is None and draw.chance() else nowhere
        y = output.place if of_queries[0] is not None else nowhere
        assert backward(number, *places, *y, *recomputed, *of_queries, *given) == 0
        _finite(output, again, d_q, d_k, d_v)


def gated_delta_rule(builds: Sequence[Library], draw: Draw) -> None:
    """Trees of segments, or documents from states of their own, in the memory that was asked for."""
    number, dtype, wide = DTYPES[draw.random.integers(3)]
    key_heads, group = (int(draw.random.integers(1, 4)) for _ in range(2))
    key_width, value_width = draw.size(1, 24), draw.size(1, 24)
    table = draw.segments()
    tokens, heads = int(table[1].sum()), key_heads * group
    chunk = max(1, min(int(draw.random.choice((1, 3, 8, 64))), int(table[1].max(initial=0))))
    sizes = (INT64 * 5)(key_heads, group, key_width, value_width, chunk)
    small = key_width**-0.5

    def inputs() -> list[Array]:
        return [
            *(draw.array(wide, tokens, key_width, key_heads, -small, small) for _ in range(2)),
            draw.array(dtype, tokens, value_width, heads),
            draw.array(wide, tokens, 1, heads, -1, 0),
            draw.array(dtype, tokens, 1, heads, 0, 1),
        ]

    def places(arrays: Sequence[Array]) -> tuple[Any, Any]:
        distances = [distance for array in arrays for distance in array.place[1:]]
        return (POINTER * 5)(*(array.place[0] for array in arrays)), (INT64 * 10)(*distances)

    given, found = inputs(), inputs()
    output, d_y = (draw.array(dtype, tokens, value_width, heads) for _ in range(2))
    started = bool((table[2] < 0).all()) and draw.chance()
    states = draw.random.uniform(-1, 1, table.shape[1] * heads * key_width * value_width).astype(wide)
    workers = int(draw.random.integers(1, 4))
    where = (POINTER, INT64, POINTER, INT64)
    types = (INT, POINTER, POINTER, POINTER, *_HEADS)
    for build in builds:
        needed = build.function("backhand_gated_delta_rule_memory", (INT, INT, POINTER, POINTER, INT64), INT64)
        for backward in (0, 1):
            memory = np.zeros(workers * needed(number, backward, sizes, table.ctypes.data, table.shape[1]), wide)
            rest = (table.ctypes.data, table.shape[1], memory.ctypes.data, workers)
            if backward:
                run = build.function("backhand_gated_delta_rule_backward", (*types, POINTER, POINTER, *where), None)
                run(number, sizes, *places(given), *d_y.place, *places(found), *rest)
            else:
                run = build.function("backhand_gated_delta_rule_forward", (*types, POINTER, *where), None)
                run(number, sizes, *places(given), *output.place, states.ctypes.data if started else None, *rest)
        _finite(output, *found)


# ---------------------------------------------------------------------------------------------------------------------
# A token of each row through a decoder. The structures are those of nn/decoder/decode_step.py, which needs torch.


def _structure(name: str, **members: Any) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": tuple(members.items())})


def _named(kind: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


_Stored = _structure("_Stored", type=INT64, weight=POINTER, row_bytes=INT64, row_ids=POINTER, outputs=INT64)
_LowRank = _structure("_LowRank", **_named(POINTER, "A B"), **_named(INT64, "rank first outputs"), scaling=DOUBLE)
_Projection = _structure(
    "_Projection",
    parts=POINTER,
    count=INT64,
    adapters=POINTER,
    adapter_count=INT64,
    bias=POINTER,
    ins=INT64,
    outs=INT64,
    apart=INT64,
)
_Layer = _structure(
    "_Layer",
    **_named(_Projection, "input output gate_up down"),
    **_named(POINTER, "norm after_attention mlp_norm after_mlp q_norm k_norm"),
    **_named(POINTER, "cosines sines query_cosines query_sines keys values"),
    **_named(INT64, "pairs window"),
)
_Model = _structure(
    "_Model",
    layers=POINTER,
    **_named(INT64, "count hidden heads kv_heads head_dim width over_heads activation most_ranks places"),
    place_of=POINTER,
    **_named(INT64, "capacity quick_row"),
    **_named(DOUBLE, "eps offset scaling cap multiplier"),
)


def decode_step(builds: Sequence[Library], draw: Draw) -> None:
    """One layer or two of dense numbers, with and without norms, biases, adapters, a window, a cap and turning."""
    number, dtype, wide = DTYPES[draw.random.integers(3)]
    kv_heads, group, head_dim = (int(draw.random.integers(1, high)) for high in (4, 4, 20))
    heads, hidden, width = kv_heads * group, draw.size(1, 60), draw.size(1, 60)
    capacity, rows = draw.size(1, 40), int(draw.random.choice([1, 2, 9, 17, 70]))
    q, k = heads * head_dim, kv_heads * head_dim
    held: list[Any] = []

    def numbers(count: int, low: float = -1, high: float = 1, kind: Any = dtype) -> int:
        held.append(_stored(draw.random.uniform(low, high, count), kind))
        return int(held[-1].ctypes.data)

    def perhaps(make: Callable[[], int]) -> int | None:
        return make() if draw.chance() else None

    def projection(ins: int, outs: int) -> Any:
        parts = (_Stored * 1)(_Stored(-1, numbers(ins * outs, -0.2, 0.2), ins * held[-1].itemsize, None, outs))
        rank = draw.size(1, 9)
        adapters = (_LowRank * 1)(_LowRank(numbers(rank * ins), numbers(rank * outs), rank, 0, outs, 0.5))
        held.extend((parts, adapters))
        ranks.append(rank)
        places = ctypes.addressof(parts), 1, ctypes.addressof(adapters), int(draw.chance())
        return _Projection(*places, perhaps(lambda: numbers(outs)), ins, outs, int(draw.chance()))

    ranks: list[int] = []
    layers = (_Layer * int(draw.random.integers(1, 3)))()
    over_heads, turns = draw.chance(), draw.chance()
    pairs = int(draw.random.integers(1, head_dim // 2 + 1)) if turns and head_dim > 1 else 0
    for number_of, _ in enumerate(layers):
        table = [numbers(rows * pairs, kind=wide) for _ in range(4)]
        layers[number_of] = _Layer(
            projection(hidden, q + 2 * k),
            projection(q, hidden),
            projection(hidden, 2 * width),
            projection(width, hidden),
            *(perhaps(lambda: numbers(hidden)) for _ in range(4)),
            *(
                (numbers(q if over_heads else head_dim), numbers(k if over_heads else head_dim))
                if draw.chance()
                else (None, None)
            ),
            *table,
            *(numbers(rows * k * capacity) for _ in range(2)),
            pairs,
            int(draw.random.integers(1, 12)) if draw.chance() else 0,
        )
    cap = 5.0 if draw.chance() else 0.0
    place_of = draw.random.permutation(rows * capacity)
    model = _Model(
        *(ctypes.addressof(layers), len(layers), hidden, heads, kv_heads, head_dim, width, over_heads),
        *(int(draw.random.integers(2)), max(ranks), rows * capacity, place_of.ctypes.data, capacity),
        *(int(draw.chance()), 1e-5, 0.0, 0.3, cap, 1.0),
    )
    held.append(model)
    for build in builds:
        step = build.function("backhand_decode_step", (INT, POINTER, POINTER, INT64, POINTER, INT64), INT)
        x = draw.array(dtype, 1, rows * hidden)
        positions = draw.random.integers(capacity, size=rows)
        places = ctypes.addressof(model), x.place[0], rows, positions.ctypes.data
        assert step(number, *places, int(draw.random.integers(1, 3))) == 0
        positions[-1] = capacity
        assert step(number, *places, 1) == 1, "there is no room"
        _finite(x)


LOOPS = (glu, adapted_glu, dense_product, causal_conv, attention, gated_delta_rule, decode_step)

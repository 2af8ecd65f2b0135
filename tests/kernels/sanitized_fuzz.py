"""Random blocks and products through builds with sanitizers: run by test_sanitized.py in a process with their runtime.

Arrays are exactly as large as they say, so that a read or a write after their end is noticed, and every build must
unpack to the same bits. No torch here: its libraries do not like the sanitizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from backhand.kernels.builds import Library, library_path, usable
from backhand.kernels.library import DOUBLE, INT, INT64, POINTER
from tests.kernels.sanitized_loops import LOOPS, Draw, parallel_for

TYPES = (INT, POINTER, INT64, INT64, POINTER, INT64, INT64, INT64, POINTER, INT64, INT)
_MATRIX = (POINTER, INT64)
_SIZES = (INT64, INT64, INT64)
_GATHER = (*_MATRIX, *_MATRIX, INT64, POINTER, POINTER, POINTER, INT, INT, INT64, INT64, POINTER, POINTER, DOUBLE)
_BACKWARD = (*_MATRIX, *_MATRIX, *_MATRIX, INT64, POINTER, POINTER, INT, INT, INT64)


def low_rank(builds: list[Library], generator: np.random.Generator, rounds: int) -> None:
    """Products with a factor on matrices of random sizes, with gaps and at odd addresses, in all three dtypes."""

    def matrix(rows: int, n: int, dtype: type) -> tuple[np.ndarray, tuple[int, int]]:
        """Memory that ends with the last number, and where the matrix in it begins."""
        first, row = int(generator.integers(0, 3)), n + int(generator.integers(0, 4))
        memory = np.zeros(first + max(rows - 1, 0) * row + (n if rows else 0), dtype)
        memory[:] = generator.integers(0, 0x4000, memory.size) if dtype is np.uint16 else generator.random(memory.size)
        return memory, (memory.ctypes.data + first * memory.itemsize, row)

    for _ in range(rounds):
        number, dtype = ((0, np.float32), (1, np.uint16), (2, np.float64))[generator.integers(3)]
        wide = np.float64 if dtype is np.float64 else np.float32
        rows, n, rank = (int(generator.integers(0, high)) for high in (300, 150, 40))
        transposed = int(generator.integers(2))
        kept, (v, h, d_h, factor, receiver, rho, weight) = zip(
            matrix(rows, n, dtype),
            matrix(rows, rank, dtype),
            matrix(rows, rank, dtype),
            matrix(*((rank, n) if transposed else (n, rank)), dtype),
            matrix(*((rank, n) if transposed else (n, rank)), wide),
            matrix(1, rows, wide),
            matrix(1, n, dtype),
            strict=True,
        )
        added, layer = (*v, *h, *factor), (INT64 * 7)(0, n, rank, *factor, *receiver)
        norm = (rho[0], weight[0], 1.0) if generator.integers(2) else (None, None, 0.0)
        by_rows = int(generator.integers(2))
        parts = (POINTER * 1)(receiver[0]), (INT64 * 1)(receiver[1]), (INT64 * 1)(rank)
        for build in builds:
            for name, types, arguments in (
                ("down", (*_MATRIX, *_MATRIX, *_MATRIX, *_SIZES), (*v, *factor, *h, rows, n, rank)),
                (
                    "up",
                    (*_MATRIX, *_MATRIX, *_MATRIX, INT, *_SIZES, DOUBLE),
                    (*added, transposed, rows, n, rank, 0.5),
                ),
                ("gather", _GATHER, (*v, *h, 1, *parts, 1, by_rows, rows, n, *norm)),
                (
                    "backward",
                    _BACKWARD,
                    (*v, *h, *d_h, 1, layer, (DOUBLE * 1)(0.5), 1, int(generator.integers(2)), rows),
                ),
            ):
                if name != "up" and transposed == (name == "backward"):
                    continue  # takes lora_B as it is; the others lora_A
                function = build.function(f"backhand_low_rank_{name}", (INT, *types), INT)
                assert function(number, *arguments) == 0
        assert all(np.isfinite(memory).all() for memory in kept if memory.dtype != np.uint16)


def main(folder: Path, rounds: int) -> None:
    builds = [Library(library_path(name, folder)) for name in usable(folder)]
    for build in builds:
        build.function("backhand_set_parallel_for", (POINTER,))(parallel_for)
    low_rank(builds, np.random.default_rng(2), rounds)
    for seed, one_problem in enumerate(LOOPS):
        draw = Draw(seed)
        for _ in range(rounds):
            one_problem(builds, draw)
    room = (INT * 64)()
    count = builds[0].function("backhand_dequantize_types", (POINTER, INT), INT)(room, 64)
    generator = np.random.default_rng(20210617)
    done = 0
    for _ in range(rounds):
        for type_id in room[:count]:
            values, size = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
            rows, blocks = (int(generator.integers(1, high)) for high in (4, 20))
            source = generator.integers(0, 256, rows * blocks * size, dtype=np.uint8)
            first = int(generator.integers(0, blocks))
            expected = int(generator.integers(0, blocks - first + 1))
            ids = generator.integers(-1, rows + 1, int(generator.integers(0, 5))) if generator.random() < 0.5 else None
            n = rows if ids is None else len(ids)
            legal = ids is None or bool(((ids >= 0) & (ids < rows)).all())
            for narrow, dtype in ((0, np.uint32), (1, np.uint16)):
                found = []
                for build in builds:
                    out = np.full(n * expected * values, 77, dtype)
                    status = build.function("backhand_dequantize", TYPES, INT)(
                        *(type_id, source.ctypes.data, blocks * size, rows),
                        *(None if ids is None else ids.ctypes.data, n, first, expected),
                        *(out.ctypes.data, expected * values, narrow),
                    )
                    assert status == (0 if legal else 2), (type_id, status)
                    assert legal or (out == 77).all()
                    found.append(out)
                    done += 1
                assert all((one == found[0]).all() for one in found), type_id
    print(f"{done} calls of {', '.join(build.name for build in builds)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

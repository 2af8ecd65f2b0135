"""Read tensors of damaged files with sanitizer builds: run by test_damaged_gguf.py, with the sanitizers' runtime.

Each file `number-type-rows` is one tensor's bytes, read into memory of exactly its size. No torch here: its libraries
do not like the sanitizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from backhand.kernels.builds import Library, library_path, usable
from backhand.kernels.library import INT, INT64, POINTER

TYPES = (INT, POINTER, INT64, INT64, POINTER, INT64, INT64, INT64, POINTER, INT64, INT)


def main(folder: Path, cases: Path) -> None:
    builds = [Library(library_path(name, folder)) for name in usable(folder)]
    assert builds
    room = (INT * 64)()
    known = set(room[: builds[0].function("backhand_dequantize_types", (POINTER, INT), INT)(room, 64)])
    done = 0
    for case in cases.iterdir():
        _, type_id, rows = (int(part) for part in case.name.split("-"))
        source = np.frombuffer(bytearray(case.read_bytes()), np.uint8).copy()
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
        row_bytes = len(source) // rows
        blocks = row_bytes // size
        for narrow, dtype in ((0, np.uint32), (1, np.uint16)):
            found = []
            for build in builds:
                out = np.zeros(rows * blocks * values, dtype)
                status = build.function("backhand_dequantize", TYPES, INT)(
                    *(type_id, source.ctypes.data, row_bytes, rows, None, rows, 0, blocks),
                    *(out.ctypes.data, blocks * values, narrow),
                )
                assert status == (0 if type_id in known else 1), (case.name, status)
                found.append(out)
            assert all((one == found[0]).all() for one in found), case.name
        done += 1
    print(f"{done} tensors through {', '.join(build.name for build in builds)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Run the kernels of a wheel for another system on this one: the proofs and tests by them, and bits against this one's.

    python tools/foreign_kernels.py --set avx2 --emulator wine dist/backhand-…-win_amd64.whl verify --op glu
    python tools/foreign_kernels.py --emulator 'qemu-aarch64 -L /usr/aarch64-linux-gnu' dist/…-aarch64.whl compare
    python tools/foreign_kernels.py … pytest tests/kernels/test_loops.py

Only what is compiled runs under the emulator (`foreign/caller.cpp`); ops, references and tests are this system's, on
the same memory. `compare` gives random problems and the proofs' cases to these kernels and to this system's: numbers
may differ by their rounding, and are counted where they are the same bits. Any other word is a command of `backhand`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PLACE, ARENA_BYTES = "100000000000", 2**34
"""Where both processes have the file, in hexadecimal. It takes the memory that is written to; Wine maps no more."""


def target_of(wheel: Path) -> str:
    """Zig's name of the system that a wheel is for.

    Args:
        wheel: named as wheels are.
    """
    from hatch_build import TARGETS

    tag = wheel.stem.rpartition("-")[2]
    return next(triple for triple, _, _, platform in TARGETS.values() if platform == tag)


def library_of(wheel: Path, name: str, folder: Path) -> Path:
    """The kernels of a wheel for one instruction set, unpacked.

    Args:
        wheel: with kernels in it.
        name: of the instruction set.
        folder: to write to.
    """
    with zipfile.ZipFile(wheel) as archive:
        wanted = f"backhand_{name}.so", f"backhand_{name}.dll"
        (member,) = (path for path in archive.namelist() if path.rpartition("/")[2] in wanted)
        return Path(archive.extract(member, folder))


def compiled(folder: Path, wheel: Path) -> tuple[Path, Path]:
    """The allocator for this system, and the caller for the wheel's.

    Args:
        folder: to write to.
        wheel: for another system.
    """
    zig, here = (sys.executable, "-m", "ziglang"), ROOT / "tools" / "foreign"
    arena, caller = folder / "arena.so", folder / "caller.exe"
    plain = ("-O2", "-fPIC", "-shared", "-fno-builtin")
    subprocess.run([*zig, "cc", *plain, str(here / "arena.c"), "-o", str(arena)], check=True)
    strict = ("-std=c++17", "-O1", "-s", "-fno-exceptions", "-fno-rtti")
    made = folder / "caller.o"
    target = ("-target", target_of(wheel))
    subprocess.run([*zig, "c++", *target, *strict, "-c", str(here / "caller.cpp"), "-o", str(made)], check=True)
    subprocess.run([*zig, "cc", *target, "-s", str(made), "-o", str(caller)], check=True)
    return arena, caller


def main() -> int:
    """The command line of this file."""
    from backhand.kernels.build import library_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--set", default="baseline", help="the instruction set")
    parser.add_argument("--emulator", default="", help="what runs the other system's programs")
    parser.add_argument("--against", type=Path, help="this system's wheel, to compare with; else what is built here")
    parser.add_argument("--ours", help="this system's instruction set, to compare with; else that of the same name")
    parser.add_argument("what", nargs=argparse.REMAINDER, help="compare, pytest FILES, or a command of backhand")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, tempfile.NamedTemporaryFile(dir="/dev/shm") as arena_file:
        folder = Path(scratch)
        library = library_of(options.wheel, options.set, folder / "theirs")
        arena, caller = compiled(folder, options.wheel)
        name = options.ours or options.set
        ours = library_of(options.against, name, folder) if options.against else library_path(name)
        os.truncate(arena_file.name, ARENA_BYTES)
        served = [*shlex.split(options.emulator), str(caller), str(library), arena_file.name, PLACE]
        added = {
            "LD_PRELOAD": str(arena),
            "BACKHAND_ARENA": arena_file.name,
            "BACKHAND_ARENA_PLACE": PLACE,
            "BACKHAND_FOREIGN": json.dumps({"name": options.set, "command": served}),
            "BACKHAND_AGAINST": str(ours),
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(ROOT),
        }
        first, *rest = options.what or ["compare"]
        if first == "pytest":
            command = ["-m", "pytest", "-p", "tools.foreign.kernels", "-p", "no:cacheprovider", *rest]
        elif first == "compare":
            command = ["-m", "tools.foreign.compare", *rest]
        else:
            command = ["-c", "import tools.foreign.kernels; from backhand.cli.main import main; main()", first, *rest]
        return subprocess.run([sys.executable, *command], env={**os.environ, **added}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

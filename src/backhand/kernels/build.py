"""Compile the library: every C++ file of `native/`, into one shared object per instruction set.

The wheel's build hook (`hatch_build.py`), `make kernels` and the sanitizer test run this file directly. It needs the
standard library only and imports nothing of the package.

    python src/backhand/kernels/build.py [--all] [--sanitize] [--force]

By default the instruction sets of this processor are compiled; with `--all`, and for a wheel that others install, every
instruction set. A shared object is compiled again only if a source, a flag or the compiler has changed, which a digest
next to it records. A stamp next to it records its sources, its size and its own digest; it is opened only if these
match. Without a compiler nothing is built, one line says so, and everything is computed by torch.

The sources are plain C++ without headers of Python or torch, so that one build serves every version of both.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "native"
BUILT = HERE / "lib"

# Contracted or reordered sums would differ between instruction sets. In addition, fast-math makes older compilers flush
# subnormal numbers in the whole process. No strict aliasing, since two bfloat16 are read as one number of 32 bits.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"),
    *("-fno-rtti", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type"),
)
_SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd", "-mprefer-vector-width=512")

# The flags of each instruction set by the machine's name, the simplest first. Its name is part of the shared object's.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "baseline": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512bf16": (*_AVX512, "-mavx512bf16"),
        "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    },
    # Every 64-bit ARM processor has NEON, and many have products of pairs of bfloat16.
    "aarch64": {"baseline": (), "neon_bf16": ("-march=armv8.2-a+bf16",)},
}
# Windows grants no AMX registers to the request in `library.cpp`. No Mac has AMX or AVX-512's bfloat16.
_LEFT_OUT = {"win32": ("amx",), "darwin": ("avx512bf16", "amx")}
_SAME_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}


def machine() -> str:
    """Return the processor's family, by one name for all systems."""
    name = platform.machine().lower()
    return _SAME_MACHINE.get(name, name)


class Toolchain(NamedTuple):
    """A C++ compiler and the platform that it compiles for."""

    command: tuple[str, ...]
    machine: str  # the processor's family
    system: str  # as in `sys.platform`
    link: tuple[str, ...]  # the command that links
    spelling: Mapping[str, str] = MappingProxyType({})  # this compiler's names of the instruction sets' flags


def find_compiler() -> str | None:
    """Return the C++ compiler: $CXX, else the first of g++, c++ and clang++ on the path."""
    requested = os.environ.get("CXX")
    for name in (requested,) if requested else ("g++", "c++", "clang++"):
        compiler = shutil.which(name)
        if compiler is not None:
            return compiler
    return None


def library_path(name: str, folder: Path = BUILT, system: str = sys.platform) -> Path:
    """Return the path of an instruction set's shared object."""
    return folder / f"backhand_{name}.{'dll' if system == 'win32' else 'so'}"


def sources_digest() -> str | None:
    """Return the SHA-256 of the C++ files, or None if there are none, which an installed package permits."""
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    parts = [part for path in files for part in (path.name, path.read_text(encoding="utf-8"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest() if files else None


def fault(name: str, folder: Path = BUILT, system: str = sys.platform) -> str | None:
    """Return why a shared object must not be opened; None if it matches its stamp, or does not exist.

    A library built from other sources has other functions. A truncated one ends the process when it is opened or later.
    """
    path, here = library_path(name, folder, system), sources_digest()
    if not path.exists():
        return None
    try:
        sources, stated, digest = stamp_path(name, folder).read_text(encoding="ascii").split()
        size, data = int(stated), path.read_bytes()
    except (OSError, ValueError):
        return "it has no stamp that can be read"
    if len(data) != size:
        return f"it has {len(data):,} bytes, and had {size:,}"
    if hashlib.sha256(data).hexdigest() != digest:
        return "its bytes differ from those that were built"
    return None if here in (None, sources) else "it was built from other sources"


def stamp_path(name: str, folder: Path = BUILT) -> Path:
    """Return the path of the stamp, which holds the sources' digest and the shared object's size and digest."""
    return folder / f"backhand_{name}.stamp"


def _stamp(name: str, folder: Path, system: str) -> None:
    data = library_path(name, folder, system).read_bytes()
    stamp = f"{sources_digest()} {len(data)} {hashlib.sha256(data).hexdigest()}\n"
    stamp_path(name, folder).write_text(stamp, encoding="ascii")


def processor_runs(library: Path) -> list[str]:
    """Return the instruction sets of this processor, the simplest first, by asking any of the shared objects.

    Raises:
        OSError: the file is not there, or is no library of this system.
    """
    bits = ctypes.CDLL(str(library)).backhand_processor()
    sets = INSTRUCTION_SETS.get(machine(), ("baseline",))
    return [name for place, name in enumerate(sets) if place == 0 or bits >> (place - 1) & 1]


def build(
    folder: Path = BUILT,
    *,
    every: bool = False,
    sanitize: bool = False,
    force: bool = False,
    toolchain: Toolchain | None = None,
) -> list[str]:
    """Compile what has changed, and return the instruction sets that are built, the simplest first.

    An instruction set that the compiler does not know is left out, with its first error on standard error.

    Args:
        folder: where the shared objects go.
        every: compile for all processors, not only for this one.
        sanitize: compile with the address and the undefined-behaviour sanitizer.
        force: compile even if nothing has changed.
        toolchain: a compiler for another system, which builds every instruction set; None for this system's compiler.

    Raises:
        FileNotFoundError: there is no compiler.
        RuntimeError: the sources do not compile at all.
    """
    every = every or toolchain is not None
    if toolchain is None:
        compiler = find_compiler()
        if compiler is None:
            raise FileNotFoundError("no C++ compiler found (g++, c++, clang++ or $CXX)")
        plain = ("-static-libgcc", "-Wl,--as-needed") if sys.platform == "linux" and not sanitize else ()
        toolchain = Toolchain((compiler,), machine(), sys.platform, (compiler, *plain))
    sets, unsupported = INSTRUCTION_SETS.get(toolchain.machine, {"baseline": ()}), _LEFT_OUT.get(toolchain.system, ())
    selected = {name: flags for name, flags in sets.items() if name not in unsupported}
    folder.mkdir(parents=True, exist_ok=True)
    if not every and len(selected) > 1:
        runs = _asked_processor(toolchain.command, folder)
        selected = {name: flags for name, flags in selected.items() if name in runs}
    with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        jobs = {
            name: workers.submit(_build_one, toolchain, name, flags, folder, sanitize, force)
            for name, flags in selected.items()
        }
        complaints = {name: job.result() for name, job in jobs.items()}
    if complaints["baseline"] is not None:
        raise RuntimeError(f"{' '.join(toolchain.command)} cannot compile the library:\n{complaints['baseline']}")
    for name, complaint in complaints.items():
        if complaint is not None:
            library_path(name, folder, toolchain.system).unlink(missing_ok=True)  # of older sources
            print(f"kernels: left out {name}: {complaint.strip().splitlines()[0]}", file=sys.stderr)
    return [name for name, complaint in complaints.items() if complaint is None]


def _asked_processor(compiler: tuple[str, ...], folder: Path) -> list[str]:
    """Return `processor_runs` of a build of one small file, or all sets if it does not compile."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        asking = Path(scratch) / "asking.so"
        defines = ("-O0", '-DBACKHAND_ISA=""', "-shared")
        command = [*compiler, *FLAGS, *defines, str(SOURCES / "library.cpp"), "-o", str(asking)]
        done = subprocess.run(command, capture_output=True, check=False)
        return list(INSTRUCTION_SETS[machine()]) if done.returncode else processor_runs(asking)


def _build_one(
    toolchain: Toolchain, name: str, flags: tuple[str, ...], folder: Path, sanitize: bool, force: bool
) -> str | None:
    """Build one shared object; return None, or the compiler's message if it failed."""
    flags = tuple(toolchain.spelling.get(flag, flag) for flag in flags)
    command = [*toolchain.command, *FLAGS, *flags, *(_SANITIZERS if sanitize else ()), f'-DBACKHAND_ISA="{name}"']
    sources = sorted(SOURCES.glob("*.cpp"))
    digest = _digest(toolchain.command, command, [*sources, *SOURCES.glob("*.h")])
    target, stamp = library_path(name, folder, toolchain.system), folder / f"backhand_{name}.digest"
    up_to_date = target.exists() and stamp.exists() and stamp.read_text() == digest
    if up_to_date and not force and fault(name, folder, toolchain.system) is None:
        return None
    stamp.unlink(missing_ok=True)
    stamp_path(name, folder).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Written elsewhere and moved, so that a process that has mapped the old file keeps it.
        fresh, objects = Path(scratch) / target.name, [Path(scratch) / f"{source.stem}.o" for source in sources]
        steps = [[*command, "-c", str(source), "-o", str(made)] for source, made in zip(sources, objects, strict=True)]
        checks = _SANITIZERS if sanitize else ()
        for step in (*steps, [*toolchain.link, *checks, "-shared", *map(str, objects), "-o", str(fresh)]):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                return done.stderr or f"status {done.returncode}"
            if done.stderr:
                print(done.stderr, end="", file=sys.stderr)
        fresh.replace(target)
    stamp.write_text(digest)
    _stamp(name, folder, toolchain.system)
    return None


def _digest(compiler: tuple[str, ...], command: list[str], files: list[Path]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [version, *command]
    for path in sorted(files):
        parts += [path.name, path.read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description="Compile Backhand's loops.")
    parser.add_argument("--all", action="store_true", help="for every processor, not only this one")
    parser.add_argument("--sanitize", action="store_true", help="with sanitizers, into lib/sanitized")
    parser.add_argument("--force", action="store_true", help="whether or not something has changed")
    options = parser.parse_args()
    try:
        folder = BUILT / "sanitized" if options.sanitize else BUILT
        build(folder, every=options.all, sanitize=options.sanitize, force=options.force)
    except FileNotFoundError as error:
        print(f"kernels: {error}; everything works through torch, slower", file=sys.stderr)


if __name__ == "__main__":
    main()

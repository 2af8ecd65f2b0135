"""Compile the library: every C++ file of `native/`, one shared object an instruction set.

Run by the wheel's build hook (`hatch_build.py`), by `make kernels` and by the sanitizer test, always as a file of its
own: the standard library is all it needs, and nothing of the package is imported.

    python src/backhand/kernels/build.py [--all] [--sanitize] [--force]

Compiled is what this processor runs; with `--all`, and for a wheel that others install, every instruction set. A shared
object is compiled again only when a source, a flag or the compiler has changed, which a digest beside it says. A stamp
beside it names the sources it was compiled from and its own size and digest: it is opened only as it was made.
Without a compiler nothing is built, one line says so, and everything computes through torch.

All of it is plain C++ without headers of Python or torch, so that one build serves every version of both.
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

# Contracted or reordered sums would differ between instruction sets; fast-math would, besides, make older compilers
# flush subnormal numbers in the whole process. Two bfloat16 side by side are read as one number of 32 bits.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"),
    *("-fno-rtti", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type"),
)
_SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd", "-mprefer-vector-width=512")

# The flags of each instruction set by the machine's name, the plainest first. Its name is that of the shared object.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "baseline": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512bf16": (*_AVX512, "-mavx512bf16"),
        "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    },
    # NEON belongs to every 64-bit ARM processor, the products of pairs of bfloat16 to many.
    "aarch64": {"baseline": (), "neon_bf16": ("-march=armv8.2-a+bf16",)},
}
# Windows hands out no AMX registers to who asks as `library.cpp` does; no Mac has them, nor AVX-512's bfloat16.
_LEFT_OUT = {"win32": ("amx",), "darwin": ("avx512bf16", "amx")}
_SAME_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}


def machine() -> str:
    """The processor's family, by one name for all systems."""
    name = platform.machine().lower()
    return _SAME_MACHINE.get(name, name)


class Toolchain(NamedTuple):
    """A C++ compiler's command, the processor's family and system (`sys.platform`) it compiles for, and what links.

    `spelling`: the flags of instruction sets that it has by another name.
    """

    command: tuple[str, ...]
    machine: str
    system: str
    link: tuple[str, ...]
    spelling: Mapping[str, str] = MappingProxyType({})


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, else the first that is there of those usual on this system."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "c++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return found
    return None


def library_path(name: str, folder: Path = BUILT, system: str = sys.platform) -> Path:
    """Where the shared object of an instruction set lies."""
    return folder / f"backhand_{name}.{'dll' if system == 'win32' else 'so'}"


def sources_digest() -> str | None:
    """SHA-256 of the C++ files; None where they are not there, as beside an installed library they need not be."""
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    parts = [part for path in files for part in (path.name, path.read_text(encoding="utf-8"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest() if files else None


def fault(name: str, folder: Path = BUILT, system: str = sys.platform) -> str | None:
    """Why a shared object that is there must not be opened; None where it is as its stamp says, or is not there.

    One of other sources has other functions; a part of one ends the process when it is opened, or later.
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
        return "its bytes are others than were built"
    return None if here in (None, sources) else "it was built from other sources"


def stamp_path(name: str, folder: Path = BUILT) -> Path:
    """What was built: digest of the sources, bytes and digest of the shared object."""
    return folder / f"backhand_{name}.stamp"


def _stamp(name: str, folder: Path, system: str) -> None:
    data = library_path(name, folder, system).read_bytes()
    stamp = f"{sources_digest()} {len(data)} {hashlib.sha256(data).hexdigest()}\n"
    stamp_path(name, folder).write_text(stamp, encoding="ascii")


def processor_runs(library: Path) -> list[str]:
    """The instruction sets that this processor has, the plainest first, as a shared object of any of them says.

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
    """Compile what has changed; returns the instruction sets that are there afterwards, the plainest first.

    An instruction set that the compiler does not know is left out, with its first complaint on standard error.

    Args:
        folder: where the shared objects go.
        every: for other processors too, not only what this one runs.
        sanitize: with the address and the undefined-behaviour sanitizer in them.
        force: compile whether or not something has changed.
        toolchain: for another system, then every instruction set; None for this one's compiler.

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
    sets, never = INSTRUCTION_SETS.get(toolchain.machine, {"baseline": ()}), _LEFT_OUT.get(toolchain.system, ())
    wanted = {name: flags for name, flags in sets.items() if name not in never}
    folder.mkdir(parents=True, exist_ok=True)
    if not every and len(wanted) > 1:
        runs = _asked_processor(toolchain.command, folder)
        wanted = {name: flags for name, flags in wanted.items() if name in runs}
    with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        jobs = {
            name: workers.submit(_build_one, toolchain, name, flags, folder, sanitize, force)
            for name, flags in wanted.items()
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
    """`processor_runs` by the one small file that asks; all of them where it does not compile, which will say so."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        asking = Path(scratch) / "asking.so"
        defines = ("-O0", '-DBACKHAND_ISA=""', "-shared")
        command = [*compiler, *FLAGS, *defines, str(SOURCES / "library.cpp"), "-o", str(asking)]
        done = subprocess.run(command, capture_output=True, check=False)
        return list(INSTRUCTION_SETS[machine()]) if done.returncode else processor_runs(asking)


def _build_one(
    toolchain: Toolchain, name: str, flags: tuple[str, ...], folder: Path, sanitize: bool, force: bool
) -> str | None:
    """None once the shared object is there, else what the compiler said."""
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
        # Written elsewhere and moved: a process that has the old one mapped keeps it.
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
    """The command line of this file."""
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

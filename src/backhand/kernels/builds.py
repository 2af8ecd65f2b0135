"""Which build of the compiled library is in use: loaded once, for the widest instruction set of this processor.

    BACKHAND_KERNELS=auto|none|baseline|avx2|avx512|avx512bf16|amx|neon_bf16      which build

where auto is the widest, and none is torch alone. What takes a kernel of it is `library`'s.

Kernels run on torch's own threads: libtorch_cpu exports the plain C function torch_parallel_for, whose pointer is
handed over when the library is loaded, so that no second thread pool is in the process. What reads files by the library
needs no torch, so that it is imported where it is used.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from backhand.errors import ArtifactError, UsageError
from backhand.kernels.build import BUILT, fault, library_path, processor_runs
from backhand.words import show_notes

VARIABLE = "BACKHAND_KERNELS"
BUILDS = ("baseline", "avx2", "avx512", "avx512bf16", "amx", "neon_bf16")
"""The plainest first, x86-64's before ARM's; each needs what those before it of its family need."""


class Library:
    """One build of the library, loaded.

    Args:
        path: of the shared object.

    Attributes:
        name: its instruction set.

    Raises:
        OSError: the file is not there, or is no library of this system.
    """

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.CDLL(str(path))
        self._functions: dict[str, Any] = {}
        name: bytes = self.function("backhand_instruction_set", (), ctypes.c_char_p)()
        self.name = name.decode()

    def function(self, name: str, types: Sequence[type[Any]], result: type[Any] | None = None) -> Any:
        """The C function of this name; other Python threads run while it does.

        Args:
            name: as exported.
            types: of its arguments.
            result: of what it returns, None for void.
        """
        found = self._functions.get(name)
        if found is None:
            found = self._functions[name] = getattr(self._handle, name)
            found.argtypes, found.restype = tuple(types), result
        return found


def library() -> Library | None:
    """The build in use, or None where everything goes through torch."""
    return IN_USE.get()()


@contextmanager
def using(build: Library | None) -> Iterator[None]:
    """Use this build, or none, inside; for tests and benchmarks."""
    before = IN_USE.set(lambda: build)
    try:
        yield
    finally:
        IN_USE.reset(before)


@functools.cache
def load(name: str, folder: Path = BUILT) -> Library:
    """A build by name, with torch's threads.

    Raises:
        OSError: it is not there.
    """
    loaded = Library(library_path(name, folder))
    loaded.function("backhand_set_parallel_for", (ctypes.c_void_p,))(_torch_parallel_for())
    return loaded


BUILDER = Path(__file__).with_name("build.py")


def remedy(build: Path = BUILDER) -> str:
    """What builds the kernels here, where there is a C++ compiler: an installed package has no Makefile."""
    in_a_tree = (build.parents[3] / "Makefile").is_file()
    return "`make kernels`" if in_a_tree else f"`python {shlex.quote(str(build))}`"


@functools.cache
def usable(folder: Path = BUILT) -> tuple[str, ...]:
    """The builds that are there and that this processor can run, the plainest first, up to what VARIABLE names."""
    if not _is_whole("baseline", folder):
        return ()
    try:
        able = processor_runs(library_path("baseline", folder))
    except OSError:
        return ()
    if (named := os.environ.get(VARIABLE)) in able:
        able = able[: able.index(named) + 1]
    return tuple(name for name in able if name == "baseline" or _is_whole(name, folder))


def _is_whole(name: str, folder: Path) -> bool:
    """Whether a build is there as it was made; says so where it is there and is not."""
    wrong = fault(name, folder)
    if wrong is not None and os.environ.get("LOCAL_RANK", "0") == "0":  # one of a run's processes says it
        instead = "torch computes" if name == "baseline" else "plainer ones compute"
        show_notes([f"the compiled kernels for {name} are not used: {wrong}; {instead}, until {remedy()}"])
    return wrong is None and library_path(name, folder).exists()


def describe() -> str:
    """One line: which kernels run, and why not the compiled ones where they do not."""
    wanted = os.environ.get(VARIABLE, "auto")
    found = library()
    if found is not None:
        return f"compiled kernels: {found.name}" + ("" if wanted == "auto" else f" ({VARIABLE}={wanted})")
    if wanted == "none":
        return f"compiled kernels: none ({VARIABLE}=none); everything goes through torch, slower"
    if (wrong := fault("baseline")) is not None:
        return f"compiled kernels: none ({wrong}: {remedy()}); everything goes through torch, slower"
    return f"compiled kernels: none (not built for this machine: {remedy()}); everything goes through torch, slower"


@functools.cache
def chosen() -> Library | None:
    """The build that the environment asks for; the widest one unless it does."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "none":
        return None
    if wanted not in ("auto", *BUILDS):
        raise UsageError(
            f"{VARIABLE}={wanted} names no build of the compiled kernels",
            next_step=f"set it to one of auto, none, {', '.join(BUILDS)}, or unset it",
        )
    able = usable()
    if wanted == "auto":
        return load(able[-1]) if able else None
    if wanted not in able:
        raise ArtifactError(
            f"the compiled kernels for {wanted} cannot be used",
            where=VARIABLE,
            why=f"here are: {', '.join(able) or 'none'}",
            next_step=f"run {remedy()}, or unset {VARIABLE}",
        )
    return load(wanted)


IN_USE: ContextVar[Callable[[], Library | None]] = ContextVar("in_use", default=chosen)
"""What gives the build here and now: the choice, or what `using` has put in its place."""


def _torch_parallel_for() -> int | None:
    """The address of torch's parallel loop, None where this torch does not export it."""
    import torch

    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    try:
        handle = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(handle.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@contextmanager
def torch_form() -> Iterator[None]:
    """Inside, every op takes torch's form."""
    with using(None):
        yield


def kernels_available() -> bool:
    """Whether ops take kernels at all."""
    return library() is not None

"""Choose and load the build of the compiled library: the widest instruction set of this processor by default.

    BACKHAND_KERNELS=auto|none|baseline|avx2|avx512|avx512bf16|amx|neon_bf16

where auto is the widest, and none uses torch alone. `kernels.library` decides which calls take a kernel.

Kernels run on torch's own threads: libtorch_cpu exports the plain C function torch_parallel_for. Its pointer is passed
to the library when it is loaded, so that there is no second thread pool in the process. Code that reads files by the
library does not need torch, so torch is imported only where it is used.
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
"""The builds, the simplest first, x86-64 before ARM. Each requires what the builds before it in its family require."""


class Library:
    """One build of the library, loaded.

    Args:
        path: the shared object.

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
        """Return the C function of this name; other Python threads run while it does.

        Args:
            name: its exported name.
            types: the types of its arguments.
            result: the type of its result, None for void.
        """
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = getattr(self._handle, name)
            function.argtypes, function.restype = tuple(types), result
        return function


def library() -> Library | None:
    """Return the build in use, or None if torch computes everything."""
    return IN_USE.get()()


@contextmanager
def using(build: Library | None) -> Iterator[None]:
    """Inside, use this build, or none; for tests and benchmarks."""
    before = IN_USE.set(lambda: build)
    try:
        yield
    finally:
        IN_USE.reset(before)


@functools.cache
def load(name: str, folder: Path = BUILT) -> Library:
    """Load a build by name, with torch's threads.

    Raises:
        OSError: it is not there.
    """
    loaded = Library(library_path(name, folder))
    loaded.function("backhand_set_parallel_for", (ctypes.c_void_p,))(_torch_parallel_for())
    return loaded


BUILDER = Path(__file__).with_name("build.py")


def remedy(build: Path = BUILDER) -> str:
    """Return the command that builds the kernels; an installed package has no Makefile."""
    in_a_tree = (build.parents[3] / "Makefile").is_file()
    return "`make kernels`" if in_a_tree else f"`python {shlex.quote(str(build))}`"


@functools.cache
def usable(folder: Path = BUILT) -> tuple[str, ...]:
    """Return the existing builds that this processor can run, the simplest first, up to the one that VARIABLE names."""
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
    """Return True if a build exists and matches its stamp; print a note if it exists and does not match."""
    wrong = fault(name, folder)
    if wrong is not None and os.environ.get("LOCAL_RANK", "0") == "0":  # only one of a run's processes prints it
        instead = "torch computes" if name == "baseline" else "plainer ones compute"
        show_notes([f"the compiled kernels for {name} are not used: {wrong}; {instead}, until {remedy()}"])
    return wrong is None and library_path(name, folder).exists()


def describe() -> str:
    """Describe in one line which kernels run, and why the compiled ones do not."""
    setting = os.environ.get(VARIABLE, "auto")
    build = library()
    if build is not None:
        return f"compiled kernels: {build.name}" + ("" if setting == "auto" else f" ({VARIABLE}={setting})")
    if setting == "none":
        return f"compiled kernels: none ({VARIABLE}=none); everything goes through torch, slower"
    if (wrong := fault("baseline")) is not None:
        return f"compiled kernels: none ({wrong}: {remedy()}); everything goes through torch, slower"
    return f"compiled kernels: none (not built for this machine: {remedy()}); everything goes through torch, slower"


@functools.cache
def chosen() -> Library | None:
    """Load the build that the environment names, else the widest one."""
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
"""A function that returns the current build: `chosen`, or the one that `using` has set."""


def _torch_parallel_for() -> int | None:
    """Return the address of torch's parallel loop, or None if this torch does not export it."""
    import torch

    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    try:
        handle = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(handle.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@contextmanager
def torch_form() -> Iterator[None]:
    """Inside, every op uses torch's form."""
    with using(None):
        yield


def kernels_available() -> bool:
    """Return True if there is a build for ops to use."""
    return library() is not None

"""Another system's kernels in tests of this one: each call goes to a process that has them open, under an emulator.

What the process of the tests allocates lies in one shared file (arena.c), which the other one (caller.cpp) has mapped
at the same place, so that a call is a name and numbers. A plugin of pytest: with BACKHAND_FOREIGN set, every test that
takes kernels takes those. `tools/foreign_kernels.py` starts it.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
from collections.abc import Sequence
from typing import Any

from backhand.kernels import builds
from backhand.kernels.builds import Library
from backhand.kernels.library import DOUBLE

VARIABLE = "BACKHAND_FOREIGN"
"""JSON: `name` of the instruction set, `command` that serves its library."""
_MOST_VALUES = 64
_REQUEST = struct.Struct(f"<56sQ{_MOST_VALUES}q")


class ForeignLibrary(Library):
    """A library that another process has open.

    Args:
        name: its instruction set.
        command: starts the process.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self._functions = name, {}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.calls: dict[str, int] = {}

    def function(self, name: str, types: Sequence[type[Any]], result: type[Any] | None = None) -> Any:
        """Return the function, with the interface of a library of this system."""
        doubles = sum(1 << place for place, kind in enumerate(types) if kind is DOUBLE)
        assert not doubles & 0xF, "Windows has the first four in registers"
        assert len(types) <= _MOST_VALUES

        def call(*arguments: Any) -> Any:
            assert len(arguments) == len(types)
            values = [_number(kind, value) for kind, value in zip(types, arguments, strict=True)]
            values += [0] * (_MOST_VALUES - len(values))
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(_REQUEST.pack(name.encode(), doubles, *values))
            self._process.stdin.flush()
            answer = self._process.stdout.read(8)
            if len(answer) < 8:
                raise RuntimeError(f"{name}: the process of the kernels ended with {self._process.wait()}")
            self.calls[name] = self.calls.get(name, 0) + 1
            return None if result is None else result.from_buffer_copy(answer).value

        return call


def _number(kind: Any, value: Any) -> int:
    """A value of the call as 64 bits: a number, an address, or a double."""
    if kind is DOUBLE:
        return int.from_bytes(struct.pack("<d", value), "little", signed=True)
    if isinstance(value, ctypes.Array | ctypes.Structure):
        return ctypes.addressof(value)
    if hasattr(value, "_obj"):  # ctypes.byref
        return ctypes.addressof(value._obj)
    if isinstance(value, ctypes._SimpleCData):
        value = value.value
    return 0 if value is None else int(value)


def put_in_place() -> ForeignLibrary:
    """From now on these are the kernels of this process."""
    wanted = json.loads(os.environ[VARIABLE])
    library = ForeignLibrary(wanted["name"], wanted["command"])
    vars(builds).update(
        usable=lambda _folder=None: (library.name,), load=lambda _name, _folder=None: library, chosen=lambda: library
    )
    builds.IN_USE.set(lambda: library)
    return library


if VARIABLE in os.environ:
    IN_PLACE = put_in_place()

    def pytest_terminal_summary(terminalreporter: Any) -> None:
        """Print the number of calls of each kernel."""
        for name, count in sorted(IN_PLACE.calls.items()):
            terminalreporter.write_line(f"{name} {count}")

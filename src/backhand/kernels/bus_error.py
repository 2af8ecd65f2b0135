"""A bus error at a mapped file ends the process with a message and an exit code.

If a file is cut short while it is mapped, or its disk fails, the next read of a missing page is a SIGBUS: in a kernel,
in torch, in NumPy, on any thread. Checking the file's size before each read would leave the time between the check and
the read, so a signal handler decides; it costs nothing until then. It cannot raise, since the read has no value and the
thread may be anywhere. `nn.loading.mapped_file` finds damage without a bus error at every step: a changed byte, or
zeros after a new end within its page.

The handler is in C (native/bus_error.cpp) and does nothing but write and exit. Without the compiled library it is a
Python function called through ctypes: the faulting thread takes the interpreter's lock, which a computing thread has
released, or holds itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any

from backhand.errors import ArtifactError
from backhand.kernels.builds import library
from backhand.kernels.library import INT, INT64, POINTER

_WATCH = ("backhand_watch_mapping", (POINTER, INT64, INT, POINTER, POINTER), INT)
_FORGET = ("backhand_forget_mapping", (INT,))

_lock = threading.Lock()


def watch_mapping(owner: object, address: int, length: int, descriptor: int, path: str) -> Callable[[], object]:
    """Until the owner is freed, report a bus error in this mapping as an error that names the file, with exit code 4.

    Args:
        owner: the object that holds the mapping and the descriptor; it is not referenced here.
        address: the mapping's first byte.
        length: bytes of the mapping, and of the file when it was mapped.
        descriptor: the open file.
        path: the file's path, for the message.

    Returns:
        a function that ends the watch before the owner is freed.
    """
    cut_short = ctypes.create_string_buffer(
        _text(path, f"it was cut short while it was in use; it had {length:,} bytes")
    )
    unreadable = ctypes.create_string_buffer(_text(path, "its disk, or the network it comes over, has failed"))
    build = library()
    if build is None:
        _in_python(descriptor, length, cut_short.value, unreadable.value)
        return weakref.finalize(owner, _watched.pop, descriptor, None)
    with _lock:
        place: int = build.function(*_WATCH)(address, length, descriptor, cut_short, unreadable)
    if place < 0:  # no handler; the checks at every step remain
        return weakref.finalize(owner, lambda: None)

    def forget(_texts: tuple[Any, Any]) -> None:
        with _lock:
            build.function(*_FORGET)(place)

    return weakref.finalize(owner, forget, (cut_short, unreadable))


def _text(path: str, why: str) -> bytes:
    error = ArtifactError(
        f"{path} can no longer be read",
        why=why,
        next_step="fetch the file again; a run goes on from its last checkpoint with --resume",
    )
    return f"\nerror: {error}\n".encode(errors="replace")


# Without the compiled library.


_watched: dict[int, tuple[int, bytes, bytes]] = {}
"""The file's length when it was mapped, and the two messages, by descriptor."""
_handlers: list[Any] = []


def _in_python(descriptor: int, length: int, cut_short: bytes, unreadable: bytes) -> None:
    _watched[descriptor] = (length, cut_short, unreadable)
    if _handlers or not hasattr(signal, "SIGBUS"):
        return
    system = ctypes.CDLL(None)
    system.signal.argtypes, system.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_bus_error)
    _handlers.append(handler)  # referenced until the process ends
    system.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))


def _on_bus_error(_number: int) -> None:
    """Report the file that is shorter than when it was mapped, since the address is not known here."""
    unreadable = b"\nerror: a bus error outside all mapped files\n"
    for descriptor, (length, cut_short, text) in list(_watched.items()):
        unreadable = text
        if os.fstat(descriptor).st_size < length:
            os.write(2, cut_short)
            os._exit(ArtifactError.exit_code)
    os.write(2, unreadable)
    os._exit(ArtifactError.exit_code)

"""File layers that fail, kill the process, or lose what was not synced: what a checkpoint must survive."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backhand.files import FileLayer

CALLS = tuple(name for name in vars(FileLayer) if not name.startswith("_"))


class InterceptedFiles(FileLayer):
    """Calls `before(number, name, arguments)` ahead of every call, counted from 1."""

    def __init__(self, before: Callable[[int, str, tuple[Any, ...]], None] | None = None) -> None:
        self.count = 0
        self.names: list[str] = []
        self.before = before or (lambda number, name, arguments: None)


def _intercepted(name: str) -> Callable[..., Any]:
    original = getattr(FileLayer, name)

    def call(self: InterceptedFiles, *arguments: Any) -> Any:
        self.count += 1
        self.names.append(name)
        self.before(self.count, name, arguments)
        return original(self, *arguments)

    return call


for _name in CALLS:
    setattr(InterceptedFiles, _name, _intercepted(_name))


def half_written(name: str, arguments: tuple[Any, ...]) -> None:
    """Do to the disk what a call that is cut off may do: a write leaves half of its bytes, a close closes."""
    if name == "write":
        descriptor, data = arguments
        os.write(descriptor, data[: len(data) // 2])
    if name == "close":
        os.close(arguments[0])


def failing(number: int, code: int, *, forever: bool = False) -> InterceptedFiles:
    """The call of this number fails with this errno, and with `forever` every later one but closing and removing too.

    A failing write leaves half of its bytes, as a full disk does.
    """

    def before(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        later = forever and count > number and name not in ("close", "remove_file", "remove_directory")
        if count != number and not later:
            return
        half_written(name, arguments)
        raise OSError(code, os.strerror(code))

    return InterceptedFiles(before)


def killing(number: int) -> InterceptedFiles:
    """SIGKILL just before the call of this number; before a write, half of its bytes are written."""

    def before(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == number:
            half_written(name, arguments)
            os.kill(os.getpid(), signal.SIGKILL)

    return InterceptedFiles(before)


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - whatever it is, the child must not run the tests that follow
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass
class _Write:
    """A file being written: its path when opened, its bytes, and how many of them were synced."""

    path: Path
    data: bytearray
    synced: int = 0


class LosingFiles(FileLayer):
    """Does everything, and remembers it, so that `states_after_power_loss` can tell what might be left.

    The model: bytes of a file that were not synced are missing; a name that was created, changed or removed in a
    directory that was not synced since may be as before or as after, each name by itself, so that renames reorder.
    While `losing` is false nothing is kept, as outside of the save that a test looks at.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open: dict[int, _Write] = {}
        self.files: dict[Path, _Write] = {}
        self.losing = True
        # Names changed since their directory was synced: (directory, step of the change, undo).
        self.pending: list[tuple[Path, Callable[[Path], None]]] = []
        self.count = 0
        self.snapshots: list[Path] = []
        self.store: Path | None = None

    def snapshot_every_call_into(self, store: Path) -> None:
        """From now on, keep what each possible power loss would leave, one directory each, below `store`."""
        self.store = store

    def _snapshot(self) -> None:
        if self.store is None or not self.losing:
            return
        self.count += 1
        # Nothing of what is pending happened; all of it; only the newest; all but the newest: reordered.
        pending = list(self.pending)
        for label, lost in (
            ("none", []),
            ("all", pending),
            ("newest", pending[-1:]),
            ("oldest", pending[:1]),
            ("all-but-newest", pending[:-1]),
        ):
            copy = self.store / f"{self.count:03}-{label}"
            shutil.copytree(self.root, copy)
            for file in self.files.values():
                self._lose_bytes(copy, file)
            for _, undo in reversed(lost):
                undo(copy)
            self.snapshots.append(copy)

    def _lose_bytes(self, copy: Path, file: _Write) -> None:
        place = copy / file.path.relative_to(self.root)
        if file.synced < len(file.data) and place.exists():
            place.write_bytes(bytes(file.data[: file.synced]))

    def _here(self, path: Path, copy: Path) -> Path:
        return copy / path.relative_to(self.root)

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.pending.append((path.parent, lambda copy: shutil.rmtree(self._here(path, copy), ignore_errors=True)))
        self._snapshot()

    def open_new(self, path: Path) -> int:
        descriptor = super().open_new(path)
        self.open[descriptor] = self.files[path] = _Write(path, bytearray())
        self.pending.append((path.parent, lambda copy: self._here(path, copy).unlink(missing_ok=True)))
        self._snapshot()
        return descriptor

    def open_to_append(self, path: Path) -> int:
        existed = path.exists()
        descriptor = super().open_to_append(path)
        if path not in self.files:
            data = path.read_bytes()
            self.files[path] = _Write(path, bytearray(data), len(data))
        self.open[descriptor] = self.files[path]
        if not existed:
            self.pending.append((path.parent, lambda copy: self._here(path, copy).unlink(missing_ok=True)))
            self._snapshot()
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        written = super().write(descriptor, data)
        self.open[descriptor].data += data[:written]
        self._snapshot()
        return written

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        file = self.open[descriptor]
        file.synced = len(file.data)
        self._snapshot()

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        del self.open[descriptor]

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.pending = [(directory, undo) for directory, undo in self.pending if directory != path]
        self._snapshot()

    def rename(self, source: Path, target: Path) -> None:
        before = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        for path in list(self.files):
            if path == source or source in path.parents:
                file = self.files.pop(path)
                file.path = target / path.relative_to(source)
                self.files[file.path] = file

        def undo(copy: Path) -> None:
            there, back = self._here(target, copy), self._here(source, copy)
            if there.exists() and not back.exists() and back.parent.is_dir():
                there.rename(back)
            if before is not None and there.parent.is_dir():
                there.write_bytes(before)

        self.pending.append((target.parent, undo))
        self._snapshot()

    def remove_file(self, path: Path) -> None:
        data = path.read_bytes()
        super().remove_file(path)
        self.files.pop(path, None)

        def undo(copy: Path) -> None:
            if self._here(path, copy).parent.is_dir():
                self._here(path, copy).write_bytes(data)

        self.pending.append((path.parent, undo))
        self._snapshot()

    def remove_directory(self, path: Path) -> None:
        super().remove_directory(path)

        def undo(copy: Path) -> None:
            if self._here(path, copy).parent.is_dir():
                self._here(path, copy).mkdir(exist_ok=True)

        self.pending.append((path.parent, undo))
        self._snapshot()

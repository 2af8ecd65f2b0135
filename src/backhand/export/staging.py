"""An output that is written and proved beside its place, and put there in one step or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backhand.adapters.atomic_files import make_directory, resource_error, sync_directory
from backhand.errors import UsageError


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A path of the same name in a folder of its own beside `output`; what stands there at the end becomes `output`.

    Whatever ends the block by an exception, a failed proof among them, leaves neither `output` nor the folder.

    Raises:
        UsageError: `output` exists, or lies below a file.
        ResourceError: disk full, not writable, file-size limit.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link, which is then refused
    make_directory(output.parent)
    folder = output.parent / f".{output.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # left by a process of the same number that was killed
        folder.mkdir()
        yield folder / output.name
        _sync(folder / output.name)
        if output.is_symlink() or output.exists():
            raise UsageError(f"{output} exists", where="output", why="it was made while this command ran")
        (folder / output.name).rename(output)
        sync_directory(output.parent)
    except OSError as error:
        raise resource_error("cannot be written", output, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or a directory with all that is in it, is on the disk. Raises OSError."""
    if path.is_dir():
        for child in path.iterdir():
            _sync(child)
        sync_directory(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())

"""A directory for a new adapter: not there yet, or empty, or to be replaced."""

from __future__ import annotations

from pathlib import Path

from backhand.errors import UsageError


def check_new_directory(directory: Path, *, overwrite: bool) -> None:
    """Refuse, before anything is computed, to write where something else is.

    Raises:
        UsageError: it is a file, or holds something and is not to be overwritten.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError("this is a file, not a directory", where=str(directory))
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            "holds something already", where=str(directory), next_step="name another directory, or give --overwrite"
        )

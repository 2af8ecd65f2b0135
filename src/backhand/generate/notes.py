"""What a person should know, and a program reading standard output should not."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def show_notes(notes: Iterable[str]) -> None:
    """A line each on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)

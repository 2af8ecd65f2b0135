"""What a person should know, and a program reading standard output should not."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def show_notes(notes: Iterable[str]) -> None:
    """A line each on standard error."""
    for note in notes:
        print(labelled(note), file=sys.stderr)


def labelled(note: str) -> str:
    """The line for a note; what was done by force is louder."""
    return f"{'WARNING' if ' by force: ' in note else 'note'}: {note}"

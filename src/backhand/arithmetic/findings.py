"""What a command leaves of its findings: a table or JSON on the terminal, JSON and a picture in a directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from backhand.adapters.atomic_files import make_directory, write_atomically
from backhand.generate.notes import show_notes


def leave_findings(
    name: str,
    summary: Mapping[str, object],
    print_tables: Callable[[], None],
    picture: Callable[[], bytes],
    *,
    as_json: bool,
    plot: bool,
    output: Path | None,
    notes: Iterable[str] = (),
    keep_summary: bool = True,
) -> None:
    """Print, and write `<name>.json` and `<name>.png`.

    Args:
        name: of the command.
        summary: every number.
        print_tables: prints what people read.
        picture: draws it; called only if it is wanted.
        as_json: print the summary in place of the tables.
        plot: write the picture, to `output` or the current directory.
        output: directory for the picture and the summary; None for neither.
        notes: for standard error.
        keep_summary: whether the summary goes into `output`, too.

    Raises:
        UsageError: `output` is a file.
        ResourceError: it cannot be written.
    """
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    written = []
    if output is not None and keep_summary:
        make_directory(output)
        write_atomically(output / f"{name}.json", text.encode())
        written.append(output / f"{name}.json")
    if plot:
        path = (output or Path()) / f"{name}.png"
        write_atomically(path, picture())
        written.append(path)
    show_notes(notes)
    if as_json:
        sys.stdout.write(text)
        return
    print_tables()
    for path in written:
        print(f"written: {path}")

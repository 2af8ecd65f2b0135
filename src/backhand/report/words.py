"""Numbers as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import PurePath

from backhand.report.run_record import is_number
from backhand.words import duration

NOT_KNOWN = "–"


def figure(value: object) -> str:
    """A number with four significant digits; other values as they are, None as a dash."""
    if value is None:
        return NOT_KNOWN
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.4g}"


def percent(value: object) -> str:
    """A share as a percentage."""
    return f"{value:.1%}" if is_number(value) else NOT_KNOWN


def time_taken(seconds: object) -> str:
    """A time for people, or a dash where it is not known."""
    return duration(seconds) if is_number(seconds) else NOT_KNOWN


def moment(text: object) -> str:
    """A time in ISO form as `24 November 2026, 22:11 UTC`; any other text as it is."""
    try:
        when = datetime.fromisoformat(str(text)).astimezone(UTC)
    except (ValueError, OverflowError):
        return str(text)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def place(source: object) -> str:
    """`valid.jsonl, row 3` for `/data/valid.jsonl:3`; a place of another form as it is."""
    file, colon, number = str(source).rpartition(":")
    return f"{PurePath(file).name}, row {number}" if colon and number.isdecimal() and file else str(source)

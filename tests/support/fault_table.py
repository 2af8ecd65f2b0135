"""The table of docs/reliability.md, which tests hold against what they try themselves."""

from __future__ import annotations

from functools import cache
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


@cache
def rows() -> dict[str, tuple[int, str, str]]:
    """By fault: cases tried, outcome, and the test that tries them."""
    found: dict[str, tuple[int, str, str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[1].isdigit():
            assert cells[0] not in found, f"{cells[0]} occurs twice in {PAGE.name}"
            found[cells[0]] = (int(cells[1]), cells[2], cells[3].strip("`"))
    return found


def documented(fault: str) -> int:
    """How many cases of a fault the page says are tried."""
    return rows()[fault][0]

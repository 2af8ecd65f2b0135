"""Find text that was decoded with the wrong encoding."""

from __future__ import annotations

import re

_REPLACEMENT = "\ufffd"


_SUSPECTS = re.compile(r"[^\x00-\x7f]{2,}")


def find_mojibake(text: str) -> str | None:
    """Return an excerpt of `text` that looks wrongly decoded, or None.

    The excerpt surrounds the replacement character, or is a run of characters of Windows-1252 whose bytes are valid
    UTF-8: `Ã©` was é, `â€™` was ’. Correct text hardly ever contains such a run of two or more characters.
    """
    if text.isascii():
        return None
    if _REPLACEMENT in text:
        place = text.index(_REPLACEMENT)
        return text[max(0, place - 10) : place + 10]
    for match in _SUSPECTS.finditer(text):
        try:
            match[0].encode("cp1252").decode("utf-8")
        except UnicodeError:
            continue
        return match[0]
    return None

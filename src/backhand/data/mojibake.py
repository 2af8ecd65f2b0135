"""Text that was read with the wrong encoding at some time before it came here."""

from __future__ import annotations

import re

_REPLACEMENT = "\ufffd"
_SUSPECTS = re.compile(r"[^\x00-\x7f]{2,}")


def find_mojibake(text: str) -> str | None:
    """A piece of `text` that looks wrongly decoded, or None.

    It is the replacement character, or a run of characters that Windows-1252 can write and whose bytes then make sense
    as UTF-8: `Ã©` was é, `â€™` was ’. Proper text of two and more such characters hardly ever does.
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

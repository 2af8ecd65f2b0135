"""Text from standard input, which is to be UTF-8: a model's tokenizer takes nothing else."""

from __future__ import annotations

from collections.abc import Callable

from backhand.errors import DataError


def read_text(read: Callable[[], str], what: str) -> str:
    """What `read` takes from standard input.

    Args:
        read: may raise UnicodeDecodeError, or let bytes through as lone surrogates: Python does the one or the other
            as the locale says.
        what: the name of the text, for the error.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        text = read()
        text.encode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) & 0xFF
    else:
        return text
    raise DataError(
        f"{what} is not UTF-8",
        where="standard input",
        why=f"byte 0x{byte:02x} in it is none of UTF-8",
        next_step="convert it first, for example with iconv -f latin1 -t utf-8",
    )

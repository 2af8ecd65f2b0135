"""Text from a stream of tokens: never half a character, and never a part of what may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# Tokens at least that are decoded again to the left of new ones: tokenizers treat the first of a text in their own way.
CONTEXT_TOKENS = 4


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Tokens to text, bytes that are no UTF-8 as U+FFFD."""
        ...


def decode(tokenizer: Decodes, token_ids: Sequence[int]) -> str:
    """All tokens to text, control tokens left out, nothing tidied up."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Tokens in, text out as soon as it is certain; the parts put together are the decoded whole, up to a stop string.

    Args:
        tokenizer: decodes.
        stop: strings that end the text; they are not part of it.

    Attributes:
        text: everything given out so far.
        stopped: whether a stop string was met; nothing comes after it.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(string for string in stop if string)
        # Tokens whose text has been given out, in units that each ended with a whole character.
        self._context: list[list[int]] = []
        self._pending: list[int] = []
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token; return the text that has become certain, often "" and sometimes several tokens' worth."""
        if self.stopped:
            return ""
        self._pending.append(token_id)
        decoded = self._decode_pending()
        if decoded.endswith(REPLACEMENT):
            # Perhaps the first bytes of a character whose others are still to come.
            return ""
        self._context.append(self._pending)
        self._pending = []
        while sum(map(len, self._context[1:])) >= CONTEXT_TOKENS:
            del self._context[0]
        return self._release(decoded, final=False)

    def finish(self) -> str:
        """The end: what was held back, unfinished characters as U+FFFD."""
        if self.stopped:
            return ""
        return self._release(self._decode_pending() if self._pending else "", final=True)

    def _decode_pending(self) -> str:
        context = [token_id for unit in self._context for token_id in unit]
        before = decode(self._tokenizer, context)
        return decode(self._tokenizer, context + self._pending)[len(before) :]

    def _release(self, new: str, *, final: bool) -> str:
        self._held += new
        ends = [at for at in (self._held.find(string) for string in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            certain, self._held = self._held[: min(ends)], ""
        else:
            kept = 0 if final else self._possible_stop()
            certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self.text += certain
        return certain

    def _possible_stop(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._stop):
                return length
        return 0

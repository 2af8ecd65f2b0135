"""Text to token ids with the place of each token, where only the template may write control tokens.

A tokenizer turns the characters `<|im_end|>` into the control token wherever they stand, so a user who types them ends
his own turn. `protect` therefore breaks them apart in everything that comes from data, with a mark behind their first
character: a private-use character that the text does not hold. A second copy of the tokenizer knows the mark as a
token of its own; it splits there, as it does at every such token, and the mark's id is taken out again. What is left
decodes to the user's own text and holds no control token. Text without such characters, which is nearly all text, goes
through the tokenizer itself. (A tokenizer that puts a space before every piece, as some sentencepiece ones do, puts
one at the break too.)

The same mark, put between a prompt and its answer, keeps a token from straddling the two: at generation the prompt ends
there too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backhand.data.rows import strings_of
from backhand.errors import ArtifactError, DataError, short_reason

TokenIds = npt.NDArray[np.int32]
LONGEST_TEXT = 2**23
_FIRST_MARK, _LAST_MARK = 0xE000, 0xF8FF
"""The private use area of Unicode's basic plane."""


@dataclass(frozen=True)
class EncodedText:
    """Token ids and where in the text each stands."""

    input_ids: TokenIds  # (tokens,) int32
    # (tokens,) int32, one behind the last character of each token. (Starts are not kept: some tokenizers move them past
    # white space.)
    ends: npt.NDArray[np.int32]


class TextEncoder:
    """A tokenizer that can be told which of the control tokens in a text count as such.

    Args:
        tokenizer: a transformers tokenizer that stands on the `tokenizers` library.
        template: source of the chat template in use; the added tokens that it writes, such as `<tool_call>`, are
            control tokens for `protect` as well.

    Attributes:
        special: matches every special token of the tokenizer.
        eos_id: id of the end-of-sequence token, or None.
        prefix_ids: what the tokenizer puts before every text, usually nothing or the begin-of-sequence token.

    Raises:
        ArtifactError: the tokenizer does not stand on the `tokenizers` library.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ArtifactError(
                f"{type(tokenizer).__name__} is not a fast tokenizer",
                where="tokenizer",
                why="the place of each token in the text is needed, which only the tokenizers library gives",
            )
        self._backend = backend
        if backend.truncation is not None or backend.padding is not None or backend.encode_special_tokens:
            self._backend = _copy(backend)
        self._marked_backends: dict[str, tuple[Any, int]] = {}
        added = tokenizer.added_tokens_decoder
        special = {token.content: index for index, token in added.items() if token.special and len(token.content) > 1}
        written = {
            token.content
            for token in added.values()
            if template and token.content in template and token.content.strip() and len(token.content) > 1
        }
        self.special = _any_of(special)
        self._breaks_special = _starts_of(special)
        self._breaks_written = _starts_of(written | special.keys())
        self._written = _any_of(written | special.keys())
        unknown = getattr(backend.model, "unk_token", tokenizer.unk_token)
        # A tokenizer with a token for unknown characters may write that one for any text.
        self._guarded_ids = frozenset(index for token, index in special.items() if token != unknown)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.eos: str | None = tokenizer.eos_token
        self.bos: str | None = tokenizer.bos_token
        self.prefix_ids = _prefix_ids(self._backend)

    def mark_for(self, *values: object) -> str | None:
        """A mark that stands nowhere in `values`, if any of their strings has to be protected; else None."""
        if not any(map(self._written.search, strings_of(values))):
            return None
        return unused_mark(strings_of(values))

    def protect(self, value: Any, mark: str | None, *, written: bool) -> Any:
        """`value` with every control token in its strings broken apart by `mark`; None leaves it as it is.

        Args:
            value: a string, or lists and tables with strings in them.
            written: also break what the template writes without its being special (`<tool_call>`, `<think>`). An
                assistant's own text may hold these.
        """
        if mark is None:
            return value
        pattern = self._breaks_written if written else self._breaks_special
        return _map_strings(value, lambda text: pattern.sub(rf"\g<0>{mark}", text))

    def encode_plain(self, documents: Sequence[Any]) -> list[Any]:
        """For each document without a mark what `encode` takes as `encoding`, made at once on all cores; else None."""
        plain = [document.mark is None and len(document.text) <= LONGEST_TEXT for document in documents]
        texts = [document.text for document, is_plain in zip(documents, plain, strict=True) if is_plain]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [next(encodings) if is_plain else None for is_plain in plain]

    def encode(
        self, text: str, *, source: str, mark: str | None = None, breaks: Sequence[int] = (), encoding: Any = None
    ) -> EncodedText:
        """Token ids of `text` without the mark; control tokens that are not protected count as such.

        Args:
            text: with marks in it, if `mark` is given.
            breaks: places in `text` that no token may straddle.
            encoding: of the text, from `encode_plain`.

        Raises:
            DataError: a control token comes about that is not written in the text, because the tokenizer rewrites it.
        """
        if len(text) > LONGEST_TEXT:
            raise DataError(
                f"this row makes a text of {len(text):,} characters; up to {LONGEST_TEXT:,} can be made tokens at once",
                where=source,
                why="a tokenizer takes some three hundred bytes a character",
                next_step="cut it into several rows",
            )
        if mark is None and not breaks:
            encoding = encoding or self._backend.encode(text, add_special_tokens=False)
            input_ids = _token_ids(encoding.ids)
            ends = _ends(encoding.offsets)
        else:
            input_ids, ends = self._encode_marked(text, mark, breaks)
        expected = sum(1 for _ in self.special.finditer(text))
        if sum(map(self._guarded_ids.__contains__, input_ids.tolist())) > expected:
            raise DataError(
                "a control token comes about that is not written in the row",
                where=source,
                why="the tokenizer rewrites some of its characters (full-width or combining forms) into it",
            )
        return EncodedText(input_ids, ends)

    def _encode_marked(
        self, text: str, mark: str | None, breaks: Sequence[int]
    ) -> tuple[TokenIds, npt.NDArray[np.int32]]:
        mark = mark or unused_mark([text])
        pieces = [text[start:end] for start, end in zip((0, *breaks), (*breaks, len(text)), strict=True)]
        backend, mark_id = self._marked_backend(mark)
        encoding = backend.encode(mark.join(pieces), add_special_tokens=False)
        input_ids = _token_ids(encoding.ids)
        ends = _ends(encoding.offsets)
        for place in breaks:
            ends[ends > place] -= 1
        kept = input_ids != mark_id
        return input_ids[kept], ends[kept]

    def _marked_backend(self, mark: str) -> tuple[Any, int]:
        if mark not in self._marked_backends:
            from tokenizers import AddedToken

            backend = _copy(self._backend)
            backend.add_special_tokens([AddedToken(mark, special=True, normalized=False)])
            self._marked_backends[mark] = backend, backend.token_to_id(mark)
        return self._marked_backends[mark]


def _token_ids(ids: Sequence[int]) -> TokenIds:
    """As an array. Raises ArtifactError: one is larger than any vocabulary."""
    try:
        return np.array(ids, dtype=np.int32)
    except OverflowError:
        raise ArtifactError(
            f"a token has the number {max(ids):,}",
            where="tokenizer",
            why="no model has so many",
            next_step="take the tokenizer that the model came with",
        ) from None


def unused_mark(texts: Iterable[str]) -> str:
    """The first private-use character that stands in none of `texts`. Raises DataError: all 6400 of them do."""
    used = {character for text in texts if not text.isascii() for character in text}
    for code in range(_FIRST_MARK, _LAST_MARK + 1):
        if chr(code) not in used:
            return chr(code)
    raise DataError("the row uses every private-use character of Unicode, and none is left as a mark")


def _copy(backend: Any) -> Any:
    from tokenizers import Tokenizer

    try:
        copy = Tokenizer.from_str(backend.to_str())
    except Exception as error:  # tokenizers raises bare Exception
        raise ArtifactError(
            "the tokenizer contradicts itself: what it writes cannot be read again",
            where="tokenizer.json",
            why=short_reason(error),
            next_step="save it again with the library that made it, or take the model's own from where it comes from",
        ) from error
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = False
    return copy


def _ends(offsets: list[tuple[int, int]]) -> npt.NDArray[np.int32]:
    return np.array(offsets, dtype=np.int32).reshape(-1, 2)[:, 1].copy()


def _prefix_ids(backend: Any) -> tuple[int, ...]:
    """What the post-processor puts before a text: the ids before those that the text has on its own."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    extra = len(whole) - len(plain)
    before = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:before])


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(re.escape(token) for token in longest_first) or r"(?!)")


def _starts_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of every occurrence, overlapping ones too."""
    return re.compile(f"(?=(?:{_any_of(tokens).pattern}))[\\s\\S]")


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value

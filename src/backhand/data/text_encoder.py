"""Encode text to token ids with the position of each token. Only the template may write control tokens.

A tokenizer encodes the characters `<|im_end|>` as the control token wherever they occur, so a user who types them would
end the turn. Therefore `protect` inserts a mark after the first character of each control token in text from data. The
mark is a private-use character that does not occur in the text. A second copy of the tokenizer has the mark as a
special token and splits the text there; the id of the mark is removed afterwards. The remaining ids decode to the
user's text and contain no control token. Nearly all text contains no such characters, and is encoded by the tokenizer
itself.
Sentencepiece tokenizers that put a space before every piece also put one at the mark.

The same mark between a prompt and its answer prevents a token from crossing the boundary, because at generation the
prompt ends there too.

The library needs a third of its time to count the characters before each token. Many tokenizers need none of that for
ASCII text: the texts of the tokens, one after the other, are the text itself, and their lengths give the positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from string import punctuation
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from backhand.data.raw_rows import strings_of
from backhand.errors import ArtifactError, DataError, short_reason

TokenIds = npt.NDArray[np.int32]
LONGEST_TEXT = 2**23
_GROUP_CHARACTERS = 2**17
"""Texts of this many characters are encoded at once. A tokenizer needs some 300 bytes per character."""
_FIRST_MARK, _LAST_MARK = 0xE000, 0xF8FF
"""The private-use area of Unicode's basic plane."""
_PROBES = (" ", "  Two  words,\n\n  and\t1'm \n done ", "".join(f"a{mark}\n" for mark in punctuation))
"""Texts for which tokenizers that trim white space from the positions of tokens return other positions."""


@dataclass(frozen=True)
class EncodedText:
    """Token ids and their positions in the text."""

    input_ids: TokenIds  # (tokens,) int32
    # (tokens,) int32, index after the last character of each token. Starts are not stored, because some tokenizers
    # move them past white space.
    ends: npt.NDArray[np.int32]


class PairTokens(NamedTuple):
    """The ids that the tokenizer puts around two texts."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    # number of ids of `between` with token type 0; the ids after them have type 1. None if all types are 0, or the
    # tokenizer returns none
    of_first: int | None


class TextEncoder:
    """A tokenizer with control over which control tokens in a text are encoded as such.

    Args:
        tokenizer: a transformers tokenizer that is based on the `tokenizers` library.
        template: source of the chat template. The added tokens that it contains, such as `<tool_call>`, are
            control tokens for `protect` too.

    Attributes:
        special: matches every special token of the tokenizer.
        eos_id: id of the end-of-sequence token, or None.
        prefix_ids, suffix_ids: ids that the tokenizer puts before and after every text. Usually none, or the
            begin-of-sequence token before it.

    Raises:
        ArtifactError: the tokenizer is not based on the `tokenizers` library.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ArtifactError(
                f"{type(tokenizer).__name__} is not a fast tokenizer",
                where="tokenizer",
                why="only the tokenizers library returns the position of each token in the text, which is needed",
            )
        self._backend = backend
        if backend.truncation is not None or backend.padding is not None or backend.encode_special_tokens:
            self._backend = _copy(backend)
        self._has_types = "token_type_ids" in tokenizer.model_input_names
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
        # A tokenizer may write its token for unknown characters for any text, so that token is not guarded.
        self._guarded_ids = frozenset(index for token, index in special.items() if token != unknown)
        self._text_of = cache(lambda token: str(self._backend.decode([token], skip_special_tokens=False)))
        self.eos_id: int | None = tokenizer.eos_token_id
        self.eos: str | None = tokenizer.eos_token
        self.bos: str | None = tokenizer.bos_token
        self.prefix_ids, self.suffix_ids = _ids_around(self._backend)

    @cached_property
    def pair_tokens(self) -> PairTokens:
        """The ids around the two texts of a pair. Raises ArtifactError if the tokenizer changes the texts."""
        one, other = (self._backend.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
        pair = self._backend.encode("a", "b", add_special_tokens=True)
        first = len(self.prefix_ids)
        second = next((i for i in range(first + len(one), len(pair.ids)) if pair.ids[i : i + len(other)] == other), -1)
        if pair.ids[: first + len(one)] != [*self.prefix_ids, *one] or second < 0:
            raise ArtifactError(
                "the tokenizer does not encode two texts one after the other",
                where="tokenizer",
                why="a cross-encoder reads a query and a document together",
                next_step="use a model whose tokenizer has a template for pairs",
            )
        begin, end = first + len(one), second + len(other)
        types = pair.type_ids[begin:]
        of_first = types.index(1) if self._has_types and 1 in types else None
        return PairTokens(self.prefix_ids, tuple(pair.ids[begin:second]), tuple(pair.ids[end:]), of_first)

    def mark_for(self, *values: object) -> str | None:
        """Return a mark that does not occur in `values` if any of their strings needs protection; else None."""
        strings = strings_of(values)
        return unused_mark(strings) if any(map(self._written.search, strings)) else None

    def protect(self, value: Any, mark: str | None, *, template_tokens: bool) -> Any:
        """Break every control token in the strings of `value` with `mark`; None leaves the value unchanged.

        Args:
            value: a string, or lists and tables with strings in them.
            template_tokens: also break tokens that the template writes but that are not special (`<tool_call>`,
                `<think>`). An assistant's own text may contain these.
        """
        if mark is None:
            return value
        pattern = self._breaks_written if template_tokens else self._breaks_special
        return _map_strings(value, lambda text: pattern.sub(rf"\g<0>{mark}", text))

    def encode_plain(self, documents: Sequence[Any]) -> list[EncodedText | None]:
        """Encode documents at once, on all cores. Those with a mark, and those that `encode` refuses, get None."""
        encoded: list[EncodedText | None] = [None] * len(documents)
        plain = {n: one.text for n, one in enumerate(documents) if one.mark is None and len(one.text) <= LONGEST_TEXT}
        joining = {n: text for n, text in plain.items() if text.isascii()} if self._joins_tokens else {}
        encodings = self._backend.encode_batch_fast([*joining.values()], add_special_tokens=False)
        for (number, text), encoding in zip(joining.items(), encodings, strict=True):
            encoded[number] = self._joined(encoding.ids, text)
        others = {number: text for number, text in plain.items() if encoded[number] is None}
        encodings = self._backend.encode_batch([*others.values()], add_special_tokens=False)
        for (number, text), encoding in zip(others.items(), encodings, strict=True):
            one = _encoded_text(encoding)
            encoded[number] = None if self._has_unwritten(one, text) else one
        return encoded

    @cached_property
    def _joins_tokens(self) -> bool:
        """True if the positions of tokens in ASCII text follow from the texts of the tokens."""
        for probe in _PROBES:
            encoded = _encoded_text(self._backend.encode(probe, add_special_tokens=False))
            joined = self._joined(encoded.input_ids.tolist(), probe)
            if joined is None or not np.array_equal(joined.ends, encoded.ends):
                return False
        return True

    def _joined(self, ids: Sequence[int], text: str) -> EncodedText | None:
        """Return the tokens with their ends if their own texts make up `text`, else None."""
        parts = [*map(self._text_of, ids)]
        if "".join(parts) != text:
            return None
        return EncodedText(_token_ids(ids), np.fromiter(accumulate(map(len, parts)), np.int32, len(parts)))

    def _has_unwritten(self, encoded: EncodedText, text: str) -> bool:
        """Return True if there are more control tokens than `text` contains."""
        return sum(map(self._guarded_ids.__contains__, encoded.input_ids.tolist())) > len(self.special.findall(text))

    def encode_in_groups(self, documents: Iterable[Any]) -> Iterator[EncodedText | None]:
        """Yield the result of `encode_plain` for each document, with bounded memory."""
        group: list[Any] = []
        characters = 0
        for document in documents:
            group.append(document)
            characters += len(document.text)
            if characters > _GROUP_CHARACTERS:
                yield from self.encode_plain(group)
                group, characters = [], 0
        yield from self.encode_plain(group)

    def ids_of(self, texts: Sequence[str]) -> list[TokenIds]:
        """Encode texts on all cores. Control tokens in them are encoded as such, and none is added around them."""
        return [_token_ids(one.ids) for one in self._backend.encode_batch_fast([*texts], add_special_tokens=False)]

    def encode(self, text: str, *, source: str, mark: str | None = None, breaks: Sequence[int] = ()) -> EncodedText:
        """Return the token ids of `text` without the mark. Unprotected control tokens are encoded as such.

        Args:
            text: text, with marks in it if `mark` is given.
            breaks: places in `text` that no token may cross.

        Raises:
            DataError: the tokenizer turns other characters into a control token.
        """
        if len(text) > LONGEST_TEXT:
            raise too_long(len(text), source)
        if mark is None and not breaks:
            encoded = _encoded_text(self._backend.encode(text, add_special_tokens=False))
        else:
            encoded = self._encode_marked(text, mark, breaks)
        if self._has_unwritten(encoded, text):
            raise DataError(
                "the row contains no control token, but its encoding does",
                where=source,
                why="the tokenizer turns some characters (full-width or combining forms) into a control token",
            )
        return encoded

    def _encode_marked(self, text: str, mark: str | None, breaks: Sequence[int]) -> EncodedText:
        mark = mark or unused_mark([text])
        pieces = [text[start:end] for start, end in zip((0, *breaks), (*breaks, len(text)), strict=True)]
        backend, mark_id = self._marked_backend(mark)
        encoded = _encoded_text(backend.encode(mark.join(pieces), add_special_tokens=False))
        for place in breaks:
            encoded.ends[encoded.ends > place] -= 1
        kept = encoded.input_ids != mark_id
        return EncodedText(encoded.input_ids[kept], encoded.ends[kept])

    def _marked_backend(self, mark: str) -> tuple[Any, int]:
        if mark not in self._marked_backends:
            from tokenizers import AddedToken

            backend = _copy(self._backend)
            backend.add_special_tokens([AddedToken(mark, special=True, normalized=False)])
            self._marked_backends[mark] = backend, backend.token_to_id(mark)
        return self._marked_backends[mark]


def _token_ids(ids: Sequence[int]) -> TokenIds:
    """Return the ids as an array. Raises ArtifactError: an id is larger than any vocabulary."""
    try:
        return np.array(ids, dtype=np.int32)
    except OverflowError:
        raise ArtifactError(
            f"a token has the id {max(ids):,}",
            where="tokenizer",
            why="no model has that many tokens",
            next_step="use the tokenizer of the model",
        ) from None


def too_long(characters: int, source: str) -> DataError:
    """Return the error for a text of more than `LONGEST_TEXT` characters."""
    return DataError(
        f"this row makes a text of {characters:,} characters; at most {LONGEST_TEXT:,} can be encoded at once",
        where=source,
        why="a tokenizer needs some three hundred bytes per character",
        next_step="divide it into several rows",
    )


def unused_mark(texts: Iterable[str]) -> str:
    """Return the first private-use character that occurs in none of `texts`. Raises DataError if all 6400 occur."""
    used = {character for text in texts if not text.isascii() for character in text}
    for code in range(_FIRST_MARK, _LAST_MARK + 1):
        if chr(code) not in used:
            return chr(code)
    raise DataError("the row uses every private-use character of Unicode, so none is left as a mark")


def _copy(backend: Any) -> Any:
    from tokenizers import Tokenizer

    try:
        copy = Tokenizer.from_str(backend.to_str())
    except Exception as error:  # tokenizers raises bare Exception
        raise ArtifactError(
            "the tokenizer is inconsistent: its saved form cannot be loaded",
            where="tokenizer.json",
            why=short_reason(error),
            next_step="save it again with the library that made it, or download the model's tokenizer again",
        ) from error
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = False
    return copy


def _encoded_text(encoding: Any) -> EncodedText:
    return EncodedText(_token_ids(encoding.ids), np.array([end for _, end in encoding.offsets], np.int32))


def _ids_around(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor puts before a text, and after it."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    extra = len(whole) - len(plain)
    before = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:before]), tuple(whole[before + len(plain) :])


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(re.escape(token) for token in longest_first) or r"(?!)")


def _starts_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for the first character of every occurrence, including overlapping ones."""
    return re.compile(f"(?=(?:{_any_of(tokens).pattern}))[\\s\\S]")


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value

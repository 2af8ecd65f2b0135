"""The kinds of row that reading makes of all forms: what a row is, whatever its columns were called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backhand.data.messages import Conversation


@dataclass(frozen=True)
class Completion:
    """A prompt and what is to follow it."""

    # prompt, completion: as the row has them; completion is None where the row only asks
    prompt: str
    completion: str | None
    separator: str  # stands between them where no chat template does
    system: str | None  # a system message of the row's own
    source: str


@dataclass(frozen=True)
class PlainText:
    """A whole document, every token of which is supervised."""

    text: str
    source: str


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first better than the second: prompt and answer each."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion
    source: str


@dataclass(frozen=True)
class Labelled:
    """A prompt and an answer that is desirable or not."""

    answer: Conversation | Completion
    desirable: bool
    source: str


@dataclass(frozen=True)
class Asked:
    """A prompt, the answers to which are rewarded."""

    question: Conversation | Completion  # as it is rendered
    prompt: Any  # as reward functions are given it: text, or a list of messages
    columns: Mapping[str, Any]  # all others of the row, by name
    source: str  # where the row stands

    @property
    def reference(self) -> str | None:
        """What the row itself says that the answer is, if it says so in a column of a usual name."""
        found = next((self.columns[name] for name in REFERENCES if self.columns.get(name) is not None), None)
        return None if found is None else str(found)


REFERENCES = ("answer", "completion", "response", "output", "solution", "ground_truth", "target")
"""Columns in which the right answer to a prompt is looked for, in this order."""

OneText = Conversation | Completion | PlainText
Row = OneText | Pair | Labelled | Asked
Purpose = Literal["answers", "pairs", "labels", "prompts"]
"""What rows are read for: answers to learn, pairs of answers, answers with a label, or prompts to answer."""


def texts_of(row: Row) -> tuple[OneText, ...]:
    """What of a row is rendered, each by itself; the first is what it asks, where one answers it."""
    if isinstance(row, Pair):
        return row.chosen, row.rejected
    return (row.answer if isinstance(row, Labelled) else row.question if isinstance(row, Asked) else row,)


def has_empty_answer(row: Row) -> bool:
    """Whether a row that should teach an answer teaches none: nothing but white space in whatever would carry loss.

    Of a pair, whether one side is so.
    """
    return not isinstance(row, Asked) and any(map(_says_nothing, texts_of(row)))


def _says_nothing(text: OneText) -> bool:
    if isinstance(text, PlainText):
        return False
    if isinstance(text, Completion):
        return text.completion is not None and not text.completion.strip()
    replies = [message for message, carries in zip(text.messages, text.supervised, strict=True) if carries]
    return bool(replies) and not any(
        message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content", "").strip()
        for message in replies
    )

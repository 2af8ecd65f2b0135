"""Raw rows of files, and the types of rows that they are read into."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from backhand.data.raw_rows import strings_of
from backhand.errors import DataError

Message = dict[str, Any]
"""A message for a chat template: role, content (always text), and tool_calls, name, tool_call_id, reasoning_content."""


class Row:
    """A row of a file. Each kind of rows has classes of its own.

    Attributes:
        kind: name of the kind whose `RowKind.encoder` encodes the row.
        reads_all_columns: True if no column of the row is left unread.
        source: location of the row.
    """

    kind: ClassVar[str] = "answers"
    reads_all_columns: ClassVar[bool] = False
    source: str

    @property
    def parts(self) -> tuple[OneText, ...]:
        """The texts that are rendered separately. The first contains the prompt, if the row has one."""
        raise NotImplementedError

    @property
    def empty_answers(self) -> list[int]:
        """The indices of parts whose answer contains only white space."""
        return [place for place, text in enumerate(self.parts) if _says_nothing(text)]

    @property
    def has_reference_reply(self) -> bool:
        """True if a good answer to the prompt resembles the row's own."""
        return True


class RowFacts(Protocol):
    """Facts of a row that its loss, its rewards or its scores read in addition to the tokens."""

    @property
    def has_targets(self) -> bool:
        """True if supervised tokens are targets, not places of hidden states or placeholders for answers."""
        ...

    @property
    def key(self) -> str:
        """Everything that the loss depends on, for digests."""
        ...

    def placeholders(self, documents: int) -> int:
        """Return the number of tokens at the end of each of the row's documents that are no part of a text."""
        ...

    def shown(self, documents: Sequence[Any]) -> list[tuple[Any, str]]:
        """Return the documents that show the row, each with a label or ""."""
        ...


@dataclass(frozen=True)
class Conversation(Row):
    """Messages of a conversation, and the mask of those that carry loss."""

    messages: tuple[Message, ...]  # as the chat template reads them
    supervised: tuple[bool, ...]  # per message, True for an assistant turn that carries loss
    # descriptions of functions that the model may call, as the chat template reads them
    tools: tuple[Mapping[str, Any], ...] | None
    source: str
    context: str = ""  # name of the context of the teacher, see `data.context`; empty if rows do not name it

    @property
    def parts(self) -> tuple[OneText, ...]:
        return (self,)

    @classmethod
    def of(cls, messages: Sequence[Message], source: str) -> Conversation:
        """Return a conversation without tools in which every assistant turn carries loss."""
        return cls(tuple(messages), tuple(message["role"] == "assistant" for message in messages), None, source)


@dataclass(frozen=True)
class Completion(Row):
    """A prompt and its completion."""

    # prompt, completion: unchanged from the row; completion is None if the row has only a prompt
    prompt: str
    completion: str | None
    separator: str  # between prompt and completion if there is no chat template
    system: str | None  # the row's own system message
    source: str
    context: str = ""  # as for `Conversation`

    @property
    def parts(self) -> tuple[OneText, ...]:
        return (self,)


@dataclass(frozen=True)
class PlainText(Row):
    """A document of which every token is supervised."""

    text: str
    source: str

    @property
    def parts(self) -> tuple[OneText, ...]:
        return (self,)


@dataclass(frozen=True)
class Pair(Row):
    """Two answers to one prompt, each with the prompt. The first answer is better than the second."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion
    source: str

    kind = "pairs"

    @property
    def parts(self) -> tuple[OneText, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True)
class UnpairedRow(Row):
    """A prompt with one answer and its label: desirable or undesirable."""

    answer: Conversation | Completion
    desirable: bool
    source: str

    kind = "labels"

    @property
    def parts(self) -> tuple[OneText, ...]:
        return (self.answer,)

    @property
    def has_reference_reply(self) -> bool:
        return self.desirable


@dataclass(frozen=True)
class PromptRow(Row):
    """A prompt whose sampled answers are rewarded."""

    question: Conversation | Completion  # to be rendered
    prompt: Any  # for reward functions: text, or a list of messages
    columns: Mapping[str, Any]  # all other columns of the row by name
    source: str  # location of the row

    kind = "prompts"
    reads_all_columns = True  # reward functions are given every column
    has_targets = False

    @property
    def parts(self) -> tuple[OneText, ...]:
        return (self.question,)

    @property
    def empty_answers(self) -> list[int]:
        return []

    @property
    def key(self) -> str:
        return json.dumps([self.prompt, self.columns], sort_keys=True, default=str)

    def placeholders(self, documents: int) -> int:  # noqa: ARG002
        return 1

    def shown(self, documents: Sequence[Any]) -> list[tuple[Any, str]]:
        return [(document, "") for document in documents]

    @property
    def reference(self) -> str | None:
        """The row's reference answer: the first column of `REFERENCES` that is not null, or None."""
        value = next((self.columns[name] for name in REFERENCES if self.columns.get(name) is not None), None)
        return None if value is None else str(value)


@dataclass(frozen=True)
class EmbeddingRow(Row):
    """Texts whose vectors are compared, or one text."""

    # anchor, positive and hard negatives, or both texts of a scored pair
    texts: tuple[str, ...]
    score: float | None  # similarity of a scored pair; None for other rows
    source: str
    label: str | None = None  # label of a single text, which belongs to the texts with the same label; else None

    kind = "embeddings"

    @property
    def parts(self) -> tuple[OneText, ...]:
        return tuple(PlainText(text, self.source) for text in self.texts)


class TextIdentities(NamedTuple):
    """Digests and score of the texts of a row of embeddings, which its loss reads in addition to the vectors."""

    texts: tuple[int, ...]  # a digest of each text, without its prompt
    score: float | None  # as in `EmbeddingRow`
    label: int | None = None  # a digest of the label of both texts; None for rows without labels

    @property
    def has_targets(self) -> bool:
        return False

    @property
    def key(self) -> str:
        return repr(self)

    def placeholders(self, documents: int) -> int:  # noqa: ARG002
        return 1

    def shown(self, documents: Sequence[Any]) -> list[tuple[Any, str]]:
        return [(document, "" if self.score is None else f"score {self.score:g}") for document in documents]


@dataclass(frozen=True)
class RankingRow(Row):
    """A query with documents to rank."""

    query: str
    documents: tuple[str, ...]
    targets: tuple[float, ...]  # relevance of each document; empty for documents to score
    source: str
    listed: bool = False  # True if the row has a list of documents

    kind = "rankings"

    @property
    def parts(self) -> tuple[OneText, ...]:
        return tuple(PlainText(text, self.source) for text in (self.query, *self.documents))


class RankedTexts(NamedTuple):
    """Digests and targets of a row of rankings, which its loss and its scores read."""

    query: int  # a digest of the query
    documents: tuple[int, ...]  # a digest of each document
    targets: tuple[float, ...]  # as in `RankingRow`

    @property
    def has_targets(self) -> bool:
        return False

    @property
    def key(self) -> str:
        return repr(self)

    def placeholders(self, documents: int) -> int:
        return 0 if self._answered(documents) else 1

    def shown(self, documents: Sequence[Any]) -> list[tuple[Any, str]]:
        """Return each document once, not with both answers."""
        labels = (f"relevance {target:g}" for target in self.targets)
        return list(zip(documents[:: 1 + self._answered(len(documents))], labels, strict=False))

    def _answered(self, documents: int) -> bool:
        """Return True if each text has two documents, which end in yes and in no."""
        return documents == 2 * len(self.targets)


@dataclass(frozen=True)
class ClassRow(Row):
    """A text with its label, several labels or a number; the label is None for a text to classify."""

    text: str
    label: str | float | tuple[str, ...] | None
    source: str

    kind = "classes"

    @property
    def parts(self) -> tuple[OneText, ...]:
        return (PlainText(self.text, self.source),)


@dataclass(frozen=True, slots=True)
class ClassLabel:
    """The label of a text: a name, the names of all labels that apply, or a number."""

    value: str | float | tuple[str, ...]
    text: str = field(default="", compare=False, repr=False)  # beginning of the text, which tokens may not give again

    @property
    def has_targets(self) -> bool:
        return False

    @property
    def key(self) -> str:
        return repr(self)

    def placeholders(self, documents: int) -> int:  # noqa: ARG002
        return 1

    def shown(self, documents: Sequence[Any]) -> list[tuple[Any, str]]:
        return [(document, ", ".join(self.names) or "no label") for document in documents]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the labels that apply."""
        if isinstance(self.value, tuple):
            return self.value
        return (f"{self.value:g}" if isinstance(self.value, float) else self.value,)


REFERENCES = ("answer", "completion", "response", "output", "solution", "ground_truth", "target")
"""Columns that may contain the reference answer to a prompt, in order of precedence."""

TEMPLATE_PLACES = ("{prompt}", "{privileged_context}")
"""Places of a row's prompt and of its demonstration in a template of the teacher's prompt, named as in TRL."""

OneText = Conversation | Completion | PlainText
Purpose = str
"""Use of rows: answers to learn, pairs of answers, answers with a label, prompts to answer, questions about a state
with their answers, texts to compare, queries with documents of known relevance, or texts with the label that a
classification head learns; answers to evaluate, with a label if the rows have one; states to decide, texts whose
vectors are computed, or queries with documents to score."""
PoolingName = Literal["mean", "cls", "last"]
RankingLossName = Literal["pointwise", "listwise", "listnet"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""Use of the logits of a classification head, named as in transformers: one label, several labels, or a number."""
SINGLE: ProblemType = "single_label_classification"
MULTI: ProblemType = "multi_label_classification"
NUMBER: ProblemType = "regression"

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""Instruction of Qwen3-Reranker for a task that is not described otherwise."""


def characters_of(text: OneText) -> int:
    """Return the number of characters that a row gives to the chat template or the tokenizer."""
    if isinstance(text, PlainText):
        return len(text.text)
    if isinstance(text, Conversation):
        return sum(map(len, strings_of((text.messages, text.tools))))
    return len(text.system or "") + len(text.prompt) + len(text.completion or "")


def with_answer(row: OneText, answer: str) -> dict[str, Any]:
    """Return the columns of a row with this answer instead of its own last reply.

    Raises:
        DataError: the row is plain text.
    """
    if isinstance(row, Completion):
        columns = {"prompt": row.prompt, "completion": answer}
        return columns if row.system is None else {"system": row.system, **columns}
    if isinstance(row, Conversation):
        asked = list(row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages)
        columns_of = {"messages": [*asked, {"role": "assistant", "content": answer}]}
        return columns_of if row.tools is None else {**columns_of, "tools": list(row.tools)}
    raise DataError(
        "a row of plain text has no place for an answer",
        where=row.source,
        next_step="write the rows as prompt, or as messages",
    )


def system_of(row: Row, default: str | None) -> str | None:
    """Return the system message that a row is rendered with, or None.

    Args:
        default: system message for rows without their own.
    """
    text = row.parts[0]
    if isinstance(text, PlainText):
        return None
    if isinstance(text, Completion):
        return text.system or default
    system = [message["content"] for message in text.messages[:1] if message["role"] == "system"]
    return next((content for content in system if isinstance(content, str)), None) if system else default


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

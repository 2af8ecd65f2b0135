"""Prompts of the teacher in distillation: a context in front of every prompt, or a demonstration in it.

The context of all rows is a text or a list of messages. Contexts that rows choose by name are a JSON object, which maps
names to such texts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from backhand.data.chat import Document
from backhand.data.data_report import TruncationStats
from backhand.data.document_encoder import DocumentEncoder, prompt_examples
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example
from backhand.data.messages import read_turns
from backhand.data.options import DataOptions
from backhand.data.rows import TEMPLATE_PLACES, Completion, Conversation, Message, OneText, PlainText, Row
from backhand.errors import DataError, UsageError, short_reason
from backhand.reading import MAX_SETTINGS_BYTES, read_plain
from backhand.words import name_list, nearest_names, shorten

_LONGEST_NAME = 255
"""Largest number of characters of a context that is taken for the name of a file if no such file exists."""


def context_text(context: str) -> str:
    """Return the text of the option `context`: the contents of the file, or the option itself if it is a text.

    Contents end with a newline, so that the result of a returned text is the text itself, also if it is one word.

    Raises:
        UsageError: it is one word, and no readable file has this name; or the file is empty.
    """
    if is_directory(context):
        raise UsageError(
            f"{shorten(context)!r} is a directory, and one context is needed here",
            where="context",
            next_step="name one of its files",
        )
    if not _is_file(context) and (len(context) > _LONGEST_NAME or "\n" in context or " " in context.strip()):
        return context
    return read_context(Path(context))


def read_context(path: Path) -> str:
    """Return the contents of a file of a context, with a newline at the end.

    Raises:
        UsageError: the file cannot be read, or is empty.
    """
    try:
        text = read_plain(path, MAX_SETTINGS_BYTES).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        near = nearest_names(path.name, _files_next_to(path), count=1, cutoff=0.7)
        raise UsageError(
            f"{shorten(str(path))!r} is neither a readable file nor a text of several words",
            where="context",
            why=short_reason(error),
            next_step=f"did you mean {path.parent / near[0]}?"
            if near
            else "name a file in UTF-8, or give the prompt itself",
        ) from None
    if not text:
        raise UsageError("the file is empty", where=f"context, {path}", next_step="write the prompt into it")
    return f"{text}\n"


def _files_next_to(path: Path) -> list[str]:
    """Return the names of the other files in the folder of a path, or [] if it cannot be read."""
    try:
        return sorted(file.name for file in path.parent.iterdir() if file != path)
    except (OSError, ValueError):
        return []


def _is_file(context: str) -> bool:
    """Return True if a context is the name of a file."""
    try:
        return Path(context).is_file()
    except (OSError, ValueError):  # a text that is too long for a name
        return False


def is_directory(context: str) -> bool:
    """Return True if a context is the name of a directory."""
    try:
        return Path(context).is_dir()
    except (OSError, ValueError):  # a text that is too long for a name
        return False


def context_files(directory: str) -> dict[str, Path]:
    """Return the files of a directory of contexts by their names without suffix, sorted. Hidden files are left out.

    Raises:
        UsageError: there is no file, or two names differ only in their suffix.
    """
    files: dict[str, Path] = {}
    for path in sorted(path for path in Path(directory).iterdir() if not path.name.startswith(".")):
        if path.stem in files:
            raise UsageError(
                f"{files[path.stem].name} and {path.name} have the same name without suffix",
                where=f"context, {directory}",
                next_step="rename one of them",
            )
        files[path.stem] = path
    if not files:
        raise UsageError("the directory has no files", where=f"context, {directory}", next_step="write prompts into it")
    return files


def named_contexts(context: str) -> str:
    """Return the contexts that rows name, as a JSON object of texts by file name: of a directory, or as given.

    Raises:
        UsageError: it is no directory, or a file in it cannot be read or is empty.
    """
    if "\n" in context and _is_json_object(context):  # the result of an earlier call, which a run stores
        return context
    if not is_directory(context):
        raise UsageError(
            f"{shorten(context)!r} is no directory, in which each row could name a file",
            where="context",
            next_step="give a directory of contexts, or leave out --context-column",
        )
    texts = {path.name: read_context(path) for path in context_files(context).values()}
    return f"{json.dumps(texts, ensure_ascii=False)}\n"


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


_LIKE_MESSAGES = re.compile(r'\s*(\[\s*\{\s*"|\{\s*"(messages|role)"\s*:)')
"""The beginning of a text that is meant as messages in JSON."""


def context_messages(text: str) -> tuple[Message, ...]:
    """Return the messages of a context: those of a JSON list of messages or of a row, else one system message.

    Raises:
        DataError: a message of the list is malformed, or the JSON is.
    """
    listed: object = None
    if text.lstrip().startswith("[") or _LIKE_MESSAGES.match(text):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError) as error:
            if _LIKE_MESSAGES.match(text):
                raise DataError(
                    "the context begins as messages in JSON, and is no valid JSON",
                    where="context",
                    why=short_reason(error),
                    next_step="correct the JSON; a text that is no list of messages must not begin like one",
                ) from None
    if isinstance(listed, dict):
        listed = listed.get("messages", [listed])
    if isinstance(listed, list):
        return tuple(message for message, _ in read_turns("context", listed, "context"))
    return ({"role": "system", "content": text.strip()},)


def with_context(row: Row, context: tuple[Message, ...]) -> OneText:
    """Return a row with the context in front. A system message of the row continues that of the context.

    Raises:
        DataError: the row is plain text, pairs or decisions.
    """
    alone = len(context) == 1 and context[0]["role"] == "system"
    if isinstance(row, Completion):
        if alone:  # without a chat template, a system message is joined to the prompt
            text = context[0]["content"]
            return replace(row, system=text if row.system is None else f"{text}\n\n{row.system}")
        messages: list[Message] = [] if row.system is None else [{"role": "system", "content": row.system}]
        messages.append({"role": "user", "content": row.prompt})
        if row.completion is not None:
            messages.append({"role": "assistant", "content": row.completion})
        row = Conversation.of(messages, row.source)
    if not isinstance(row, Conversation):
        what = "plain text" if isinstance(row, PlainText) else "this form"
        raise DataError(
            f"a row of {what} has no prompt that the context could be in front of",
            where=row.source,
            next_step="write the rows as prompt and completion, or as messages",
        )
    front, own, carries = list(context), row.messages, row.supervised
    if own[0]["role"] == "system":
        text = own[0]["content"]
        if front[0]["role"] == "system":
            front[0] = {**front[0], "content": f"{front[0]['content']}\n\n{text}"}
        else:
            front.insert(0, own[0])
        own, carries = own[1:], carries[1:]
    return replace(row, messages=(*front, *own), supervised=(*(False for _ in front), *carries))


def with_demonstration(row: Row, template: str) -> OneText:
    """Return the prompt of a row with its answer as a demonstration, as the template says, and without the answer.

    Raises:
        DataError: the row has no prompt that an answer follows.
    """
    if isinstance(row, Completion) and row.completion is not None:
        return replace(row, prompt=_filled(template, row.prompt, row.completion), completion=None)
    if isinstance(row, Conversation) and [one["role"] for one in row.messages[-2:]] == ["user", "assistant"]:
        *before, asked, answer = row.messages
        asked = {**asked, "content": _filled(template, asked["content"], answer["content"])}
        return replace(row, messages=(*before, asked), supervised=(*row.supervised[:-2], False))
    raise DataError(
        "the row has no demonstration, which is an answer to its last prompt",
        where=row.source,
        next_step="write the rows as prompt and completion, or as messages that end with user and assistant",
    )


def _filled(template: str, prompt: str, demonstration: str) -> str:
    values = dict(zip(TEMPLATE_PLACES, (prompt, demonstration), strict=True))
    places = "|".join(map(re.escape, values))
    return re.sub(places, lambda place: values[place[0]], template)


@dataclass(frozen=True)
class TeacherPrompts:
    """The prompts that the teacher reads: with a context, or with the row's own answer as a demonstration."""

    # see `context_messages`, or with a column `named_contexts`; None for demonstrations
    context: str | None = None
    column: str | None = None  # in which each row names its context; None if all rows have the same
    template: str = ""  # see `with_demonstration`
    sampled: bool = False  # True if answers are sampled later, so that rows are prompts

    @cached_property
    def _contexts(self) -> dict[str, tuple[Message, ...]]:
        if self.context is None:
            return {}
        texts: dict[str, str] = {"": self.context} if self.column is None else json.loads(self.context)
        return {name: context_messages(text) for name, text in texts.items()}

    @cached_property
    def _file_names(self) -> dict[str, str]:
        """The file name of each context by its name without suffix."""
        return {Path(name).stem: name for name in self._contexts}

    def encoder(self, renderer: RowRenderer, options: DataOptions) -> DocumentEncoder:
        """Return the encoder of rows for both the model and the teacher."""
        return _TaughtEncoder(renderer, options, self)

    def of(self, row: Row) -> OneText:
        """Return the row as the teacher reads it. Raises DataError if the row has not the necessary form."""
        if self.context is None:
            return with_demonstration(row, self.template)
        name = row.context if isinstance(row, Completion | Conversation) else ""
        messages = self._contexts.get(name) or self._contexts.get(self._file_names.get(name, name))
        if messages is None:
            near = nearest_names(name, self._file_names)
            raise DataError(
                f"there is no context {shorten(name)!r}",
                where=row.source,
                why=f"the contexts are {name_list(self._file_names)}",
                next_step=f"did you mean {' or '.join(near)}?" if near else None,
            )
        return with_context(row, messages)


class _TaughtEncoder(DocumentEncoder):
    """Make examples with a second document, `rejected`, which is the teacher's."""

    def __init__(self, renderer: RowRenderer, options: DataOptions, teacher: TeacherPrompts) -> None:
        super().__init__(renderer, options)
        self._teacher = teacher

    def documents(self, row: Row) -> list[list[Document]]:
        texts = row.parts[0], self._teacher.of(row)
        if self._teacher.sampled:
            return [[self.renderer.prompt(text)[0]] for text in texts]
        return [self.renderer.documents(text) for text in texts]

    def examples(self, row: Row, parts: list[list[Example]], stats: TruncationStats) -> list[Example]:
        if self._teacher.sampled:
            both = prompt_examples(row.source, [part[0] for part in parts], self.options, stats)
            return [replace(student, rejected=teacher) for student, teacher in zip(both[::2], both[1::2], strict=True)]
        examples = []
        for student, teacher in zip(*parts, strict=True):
            if len(teacher) > self.options.max_length:
                stats.drop(row.source, len(teacher))
                continue
            answer, expected = (example.input_ids[example.supervised] for example in (student, teacher))
            if not np.array_equal(answer, expected):
                raise DataError(
                    "the answer is rendered differently with the context in front",
                    where=row.source,
                    why="the chat template writes other text into a reply if there is a system message",
                    next_step="leave out the row, or give a chat template (--chat-template) that does not",
                )
            examples += [replace(one, rejected=teacher) for one in self.truncated(row, [student], stats)]
        return examples

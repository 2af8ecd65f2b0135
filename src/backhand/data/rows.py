"""Rows: as they stand in files, and what each is, whatever its columns were called; conversations in every form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from backhand.errors import DataError
from backhand.words import shorten


@dataclass(frozen=True)
class RawRow:
    """One row of a file."""

    values: Mapping[str, Any]  # column name to value, as the file has it (JSON types)
    # where it stands, and no other row: `file:line`, `name row N` where there are no lines, both where several rows
    # share a line
    source: str


@dataclass
class BadRows:
    """What happens at a malformed row: with `skip_bad` it is counted, without it the error is raised."""

    skip_bad: bool = False  # count instead of raising
    count: int = 0
    empty_lines: int = 0  # lines of nothing but white space so far
    errors: list[DataError] = field(default_factory=list)  # the first few of them
    keep: int = 5
    # the first in the file that is being read; whoever begins another one sets it to None
    first_of_file: DataError | None = None

    def add(self, error: DataError) -> None:
        """Raise `error`, or count it."""
        if not self.skip_bad:
            if error.next_step is None:
                remedy = "correct the row, or leave bad rows out with --skip-bad"
                error.next_step = f"{remedy}; `backhand lint` names every such row at once"
            raise error
        self.count += 1
        self.first_of_file = self.first_of_file or error
        if len(self.errors) < self.keep:
            self.errors.append(error)


def checked_row(values: object, source: str, *, not_utf8: bool = False) -> RawRow:
    """A row whose values are a table of well-formed text.

    Args:
        not_utf8: halves of surrogate pairs stand for bytes that are not UTF-8 (Python's surrogateescape).

    Raises:
        DataError: not a table with names, or a string that no tokenizer can read.
    """
    if not isinstance(values, Mapping):
        raise DataError(
            f"this row is {describe(values)}, not a table of names and values",
            where=source,
            next_step='write each row as an object, such as {"prompt": "…", "completion": "…"}',
        )
    for text in strings_of(values):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            if not_utf8:
                raise latin1_error(source)
            raise DataError(
                f"{shorten(text)!r} holds half of a surrogate pair, which is not a character",
                where=source,
                why="\\ud800 to \\udfff only mean something in pairs; one half was cut off",
            )
    return RawRow(values, source)


def latin1_error(source: str, byte: int | None = None) -> DataError:
    """The error for a line that is not UTF-8."""
    shown = "" if byte is None else f" (byte 0x{byte:02x})"
    return DataError(
        f"this line is not UTF-8{shown}; it looks like Latin-1 or Windows-1252",
        where=source,
        next_step="convert the file: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW, or leave such rows out with --skip-bad",
    )


def strings_of(value: object) -> Iterator[str]:
    """Every string inside `value`, names of tables included, without recursion."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict | Mapping):  # dict alone is what nearly all are, and quick to tell
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)


def describe(value: object) -> str:
    """The JSON type of `value` in words, with a short look at it, for errors."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, str):
        return f"the text {shorten(value)!r}"
    if isinstance(value, int | float):
        return f"the number {shorten(repr(value))}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "a table"
    return f"a value of type {type(value).__name__}"


# What a row is. A conversation comes from the forms files hold it in: OpenAI's messages, ShareGPT's, tool calls.


Message = dict[str, Any]
"""What a chat template reads: role, content (always text), and tool_calls, name, tool_call_id, reasoning_content."""

ROLES = ("system", "user", "assistant", "tool")

_OTHER_NAMES = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}

_KEPT = ("tool_calls", "name", "tool_call_id", "reasoning_content")
_OTHER_THOUGHTS = ("thinking", "reasoning")
"""Names under which rows hold text that is `reasoning_content` elsewhere."""


@dataclass(frozen=True)
class Conversation:
    """Messages with what carries loss."""

    messages: tuple[Message, ...]  # as the chat template reads them
    supervised: tuple[bool, ...]  # for each message, whether it is an assistant turn that carries loss
    # descriptions of functions the model may call, as the chat template reads them
    tools: tuple[Mapping[str, Any], ...] | None
    source: str

    @classmethod
    def of(cls, messages: Sequence[Message], source: str) -> Conversation:
        """Without tools, every assistant turn of which carries loss."""
        return cls(tuple(messages), tuple(message["role"] == "assistant" for message in messages), None, source)


def read_conversation(column: str, value: object, values: Mapping[str, Any], source: str) -> Conversation:
    """A conversation from the column that holds its messages; `tools` and `system` are read from their own columns.

    Args:
        value: a list of messages, or the same as JSON text (as CSV files hold it).

    Raises:
        DataError: names the message and what is wrong with it.
    """
    turns = read_turns(column, value, source)
    system = values.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"system is {describe(system)}, not text", where=source)
    if system and turns[0][0]["role"] != "system":
        turns.insert(0, ({"role": "system", "content": system}, False))
    return Conversation(
        messages=tuple(message for message, _ in turns),
        supervised=tuple(supervised for _, supervised in turns),
        tools=_read_tools(values, source),
        source=source,
    )


def read_turns(column: str, value: object, source: str) -> list[tuple[Message, bool]]:
    """The messages of a list, each with whether it carries loss.

    Raises:
        DataError: names the message and what is wrong with it.
    """
    if isinstance(value, str):
        value = _json_text(value, column, source)
    if not isinstance(value, list):
        raise DataError(f"{column} is {describe(value)}, not a list of messages", where=source)
    if not value:
        raise DataError(f"{column} is an empty list", where=source)
    return [_read_message(f"{column}[{i}]", item, source) for i, item in enumerate(value)]


def _read_message(name: str, item: object, source: str) -> tuple[Message, bool]:
    if not isinstance(item, Mapping):
        raise DataError(f"{name} is {describe(item)}, not a message with role and content", where=source)
    role_key, content_key = ("role", "content") if item.get("role") is not None else ("from", "value")
    if content_key == "value" and "value" not in item and "content" in item:
        content_key = "content"
    role = item.get(role_key)
    if not isinstance(role, str):
        raise DataError(f"{name} has no role", where=source, next_step=f"a role is one of {', '.join(ROLES)}")
    if role == "function_call":
        call = _json_text(item.get(content_key), f"{name}.{content_key}", source)
        return {"role": "assistant", "content": "", "tool_calls": [_read_call(name, call, source)]}, True
    role = _OTHER_NAMES.get(role.lower(), role.lower())
    if role not in ROLES:
        raise DataError(
            f"{name} has the unknown role {item[role_key]!r}",
            where=source,
            next_step=f"a role is one of {', '.join(ROLES)}",
        )
    message: Message = {"role": role}
    for key in _KEPT:
        if item.get(key) is not None:
            message[key] = item[key]
    thoughts = (item[key] for key in _OTHER_THOUGHTS if isinstance(item.get(key), str))
    if "reasoning_content" not in message and (found := next(thoughts, None)) is not None:
        message["reasoning_content"] = found
    legacy = item.get("function_call")  # OpenAI's older form of one call
    calls = message.pop("tool_calls", None) or (None if legacy is None else [legacy])
    if calls:
        if not isinstance(calls, list):
            raise DataError(f"{name}.tool_calls is {describe(calls)}, not a list", where=source)
        message["tool_calls"] = [_read_call(f"{name}.tool_calls[{i}]", call, source) for i, call in enumerate(calls)]
    message["content"] = _read_content(f"{name}.{content_key}", item.get(content_key), source, optional=bool(calls))
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in message and not isinstance(message[key], str):
            raise DataError(f"{name}.{key} is {describe(message[key])}, not text", where=source)
    return message, role == "assistant" and _read_weight(name, item.get("weight"), source)


def _read_content(name: str, content: object, source: str, *, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return ""
        raise DataError(f"{name} is missing", where=source)
    if not isinstance(content, list):
        raise DataError(f"{name} is {describe(content)}, not text", where=source)
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise DataError(f"{name}[{i}] is {describe(part)}, not a part with its type", where=source)
        if part.get("type", "text") != "text":
            raise DataError(f"{name}[{i}] is of type {part['type']!r}; only text can be trained on here", where=source)
        if not isinstance(part.get("text"), str):
            raise DataError(f"{name}[{i}].text is {describe(part.get('text'))}, not text", where=source)
        texts.append(part["text"])
    return "".join(texts)


def _read_weight(name: str, weight: object, source: str) -> bool:
    if weight is None:
        return True
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise DataError(f"{name}.weight is {describe(weight)}; it may be 0 (no loss) or 1", where=source)
    return bool(weight)


def _read_call(name: str, call: object, source: str) -> Message:
    """A tool call as templates read it: `arguments` is a table, not the JSON text in which OpenAI's form holds it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{name} is not a tool call with the name of a function", where=source)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json_text(arguments, f"{name}.function.arguments", source) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{name}.function.arguments is {describe(arguments)}, not a table", where=source)
    read: Message = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    if isinstance(call.get("id"), str):
        read["id"] = call["id"]
    return read


def _read_tools(values: Mapping[str, Any], source: str) -> tuple[Mapping[str, Any], ...] | None:
    column = "tools" if values.get("tools") is not None else "functions"
    tools = values.get(column)
    if isinstance(tools, str):
        tools = _json_text(tools, column, source) if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{column} is {describe(tools)}, not a list of function descriptions", where=source)
    if column == "functions":
        tools = [{"type": "function", "function": tool} for tool in tools]
    return tuple(tools)


def _json_text(value: object, name: str, source: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is {describe(value)}, which is not valid JSON", where=source, why=str(error)) from None


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


def system_of(row: Row, given: str | None) -> str | None:
    """The system message that a row is rendered with; None where it is rendered without.

    Args:
        given: what rows have that bring none of their own.
    """
    text = texts_of(row)[0]
    if isinstance(text, PlainText):
        return None
    if isinstance(text, Completion):
        return text.system or given
    own = [message["content"] for message in text.messages[:1] if message["role"] == "system"]
    return next((content for content in own if isinstance(content, str)), None) if own else given


def empty_answers(row: Row) -> list[int]:
    """Return which answers of a row hold nothing but white space: 0 for the first, 1 for the rejected one of a pair."""
    return [] if isinstance(row, Asked) else [place for place, text in enumerate(texts_of(row)) if _says_nothing(text)]


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

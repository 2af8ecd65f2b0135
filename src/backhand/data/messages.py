"""Read conversations from the forms in which files store them: OpenAI's messages, ShareGPT's turns, tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from backhand.data.raw_rows import TABLE, describe
from backhand.data.rows import Conversation, Message
from backhand.errors import DataError

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
"""Other names of `reasoning_content` in rows."""


def read_conversation(column: str, value: object, values: Mapping[str, Any], source: str) -> Conversation:
    """Read a conversation from its column of messages, and from the columns `tools` and `system`.

    Args:
        value: a list of messages, or JSON text of one, as in CSV files.

    Raises:
        DataError: a message is malformed; the error names it.
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
    """Return the messages of a list, each with True if it carries loss.

    Raises:
        DataError: a message is malformed; the error names it.
    """
    if isinstance(value, str):
        value = _json_text(value, column, source)
    if not isinstance(value, list):
        raise DataError(f"{column} is {describe(value)}, not a list of messages", where=source)
    if not value:
        raise DataError(f"{column} is an empty list", where=source)
    return [_read_message(f"{column}[{i}]", item, source) for i, item in enumerate(value)]


def _read_message(name: str, item: object, source: str) -> tuple[Message, bool]:
    if not isinstance(item, TABLE):
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
    if "reasoning_content" not in message and (text := next(thoughts, None)) is not None:
        message["reasoning_content"] = text
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
    """Return a tool call as templates read it: `arguments` is a table instead of OpenAI's JSON text."""
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

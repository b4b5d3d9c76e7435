"""Convert conversations in OpenAI's or ShareGPT's format to messages in OpenAI's format.

Example:
    >>> read([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    >>> first_user_message(_)
    'Hi'
"""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections.abc import Callable
from typing import Any

from llmctl.config.base import hint
from llmctl.config.errors import RequestError
from llmctl.config.text_input import parse_json

Message = dict[str, Any]
"""Message with the keys "role" (system, user, assistant or tool), "content" (text), and further keys of chat
templates."""

NAMES = ("messages", "conversations")
"""Names that the column of conversations may have in a source."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "function": "tool"}  # fmt: skip
"""Map from roles in OpenAI's format to roles in chat templates, such as `developer` to `system`."""
SENDERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
           "function_call": "assistant", "function": "tool", "tool": "tool", "observation": "tool"}  # fmt: skip
"""Map from senders in ShareGPT's format to roles in chat templates, such as `human` to `user`. The sender
`function_call` writes a tool call as JSON."""


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages with roles."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        return False
    return all({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys() for m in value)


def read(value: Any, clean: Callable[[str], str] = str, *, answered: bool = True) -> list[Message]:
    """Convert a conversation to messages in OpenAI's format, which chat templates read.

    Keys without a value are dropped. The text parts of a message are joined. The arguments of tool calls,
    which data sets often store as text, become JSON data. A message with "weight" 0 does not count in the loss. The
    default weight 1 is dropped.

    Args:
        value: Conversation in a cell of the data, in OpenAI's or ShareGPT's format.
        clean: Function that is applied to every text of a message.
        answered: Whether at least one message must be the assistant's, as in training.

    Raises:
        RequestError: If the value is no conversation. If a role is unknown. If a message is empty. If a weight is
            neither 0 nor 1. If `answered` is true and no message is the assistant's.
    """
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        kind = f"a list of {type(value[0]).__name__}" if isinstance(value, list) else type(value).__name__
        raise RequestError(f"holds {kind}, not a list of messages")
    if not value:
        raise RequestError("holds a conversation without messages")
    found = [_message(m, f"message {number}", clean) for number, m in enumerate(value, 1)]
    if answered and all(m["role"] != "assistant" for m in found):
        raise RequestError("holds a conversation in which the assistant says nothing, so there is nothing to learn")
    return found


def read_tools(value: Any) -> list[Any] | None:
    """Return the tool descriptions in a cell as a list of JSON objects; None if the cell is empty.

    Args:
        value: Value of a cell: the list, or the list as JSON text.

    Raises:
        RequestError: If the value is anything else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as e:
            raise RequestError(f"holds tools that are not JSON ({e})") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RequestError("must hold a list of tools, each a JSON object")
    return [_without_nulls(tool, f"tool {number}") for number, tool in enumerate(value, 1)]


def first_user_message(messages: list[Message]) -> str:
    """Return the user's first message, or the first message if no message is the user's.

    The hash of this text determines whether the conversation is for training, validation or test.
    """
    said = [m["content"] for m in messages if m["role"] == "user"] or [messages[0]["content"]]
    return said[0]


def as_json_text(messages: list[Message], tools: list[Any] | None) -> str:
    """Return the conversation and its tools as one JSON text. Two conversations with equal texts are duplicates."""
    return json.dumps([messages, tools], ensure_ascii=False, sort_keys=True)


def _message(given: dict[str, Any], where: str, clean: Callable[[str], str]) -> Message:
    shared = "from" in given and "role" not in given
    name, text, roles = ("from", "value", SENDERS) if shared else ("role", "content", ROLES)
    said = given.get(name)
    if not isinstance(said, str) or said.strip().lower() not in roles:
        known = ", ".join(roles)
        close = hint(said, list(roles)) if isinstance(said, str) else ""
        raise RequestError(f"{where} has the {'sender' if shared else 'role'} {said!r}{close} (known: {known})")
    said = said.strip().lower()
    content = _text(given.get(text), where)
    rest = {} if shared else {k: v for k, v in given.items() if k not in (name, text)}
    more = _without_nulls(rest, where)
    if said == "function_call":
        content, more = "", {"tool_calls": [_written_call(content, where)]}
    if "tool_calls" in more:
        more = {**more, "tool_calls": _tool_calls(more["tool_calls"], where)}
        if not more["tool_calls"]:
            del more["tool_calls"]
    if "weight" in more:
        more = {k: v for k, v in more.items() if k != "weight" or not _counts_in_loss(v, where)}
    out = {"role": roles[said], "content": content, **more}
    if out["role"] in ("user", "assistant") and not content.strip() and "tool_calls" not in out:
        raise RequestError(f"{where} ({out['role']}) is empty")
    return _mapped(out, clean)


def _counts_in_loss(weight: Any, where: str) -> bool:
    """Return whether a message with this weight counts in the loss."""
    if weight not in (0, 1):
        raise RequestError(f"{where} has the weight {weight!r}; it must be 0 (context only) or 1")
    return bool(weight)


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [p.get("text") if isinstance(p, dict) and p.get("type", "text") == "text" else None for p in parts]
    if not all(isinstance(t, str) for t in texts):
        odd = next(p for p, t in zip(parts, texts, strict=True) if not isinstance(t, str))
        kind = f"a part of type {odd['type']!r}" if isinstance(odd, dict) and "type" in odd else type(odd).__name__
        raise RequestError(f"{where} holds {kind}, not text")
    return "".join(str(t) for t in texts)


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Return the tool calls of a message, with their arguments as JSON data instead of text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{where}: tool_calls must be a list of objects")
    return [{**c, "function": _call(c["function"])} if isinstance(c.get("function"), dict) else c for c in calls]


def _call(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            return {**function, "arguments": parse_json(arguments)}
        except ValueError:  # a call that the model got wrong stays as it is
            pass
    return function


def _written_call(text: str, where: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as e:
        raise RequestError(f"{where} (function_call) is not JSON ({e})") from None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise RequestError(f'{where} (function_call) must read {{"name": …, "arguments": {{…}}}}')
    return {"type": "function", "function": found}


def _without_nulls(value: Any, where: str) -> Any:
    """Remove keys whose value is null, because columnar files add such keys.

    Dates, times and decimal numbers become text, because JSON and templates do not support these types.

    Args:
        value: Value of a message or a tool.
        where: Beginning of an error message.

    Raises:
        RequestError: If a value is of another type that JSON does not support.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {k: _without_nulls(v, f"{where}: {k}") for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(v, where) for v in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (datetime.timedelta, decimal.Decimal, uuid.UUID)):
        return str(value)
    raise RequestError(f"{where} holds {type(value).__name__}, which is no JSON data")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return [_mapped(v, change) for v in value] if isinstance(value, list) else value

"""One message of the data in the form chat templates read: names, text, thinking, tool calls.

Light: no Jinja. Which of it a template prints is the template's affair (`masking.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import RowError

Ranges = tuple[tuple[int, int], ...]
"""[first, last) characters."""

# How models that think out loud mark it in plain text -> how they mark the answer then.
_THINKING = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")


@dataclass(frozen=True)
class Message:
    """What a template gets, and what the data says of training on it."""

    properties: dict[str, Any]
    """`role`, `content`, and whatever else there is."""
    trained: bool | None = None
    """None: the data does not say."""
    details: Mapping[str, Ranges] | None = None
    """Property -> its learnt characters; None: the data does not say."""


def without_nulls(value: Any) -> Any:
    """Data without null properties: columnar files write a property that is not there as null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def decoded(value: Any, what: str) -> Any:
    """JSON text as data (CSV and some Parquet files hold it so); data as it is.

    Raises:
        RowError: for text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"{what} holds text that is not JSON ({error})") from error


def text_of(value: Any) -> tuple[Any, Ranges | None]:
    """A property as text, and its learnt characters where parts of it have flags of their own.

    A list of text parts is one text, as templates print it. A list with other parts (images) stays
    a list, for templates that read lists.
    """
    if not isinstance(value, (list, tuple)) or not all(map(_is_text, value)):
        return value, None
    texts = [part if isinstance(part, str) else _text(part) for part in value]
    flags = [_flag(part) for part in value]
    if all(flag is None for flag in flags):
        return "".join(texts), None
    ranges, at = [], 0
    for text, flag in zip(texts, flags, strict=True):
        if text and flag is not False:
            ranges.append((at, at + len(text)))
        at += len(text)
    return "".join(texts), tuple(ranges)


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, Mapping)
        and part.get("type", "text") == "text"
        and isinstance(_text(part), str)
    )


def _text(part: Mapping[str, Any]) -> Any:
    return next((part[key] for key in ("text", "content", "value") if part.get(key)), "")


def _flag(part: Any) -> bool | None:
    if not isinstance(part, Mapping):
        return None
    flag = part.get("train", part.get("weight"))
    return None if flag is None else bool(flag)


def detail_ranges(value: Any, what: str) -> Ranges:
    """The learnt characters that a list of {begin_offset, end_offset, train} names.

    `end_offset` is the last character itself, as in Axolotl's examples.

    Raises:
        RowError: for anything else.
    """
    given = decoded(value, what)
    if not isinstance(given, Sequence) or not all(map(_is_detail, given)):
        raise RowError(
            f"{what} must be a list of {{begin_offset, end_offset, train}}, the offsets counted "
            f"from 0 and the first not behind the last, not {str(value)[:60]!r}"
        )
    learnt, others = (
        sorted((d["begin_offset"], d["end_offset"] + 1) for d in given if bool(d["train"]) == flag)
        for flag in (True, False)
    )
    if any(start < stop and first < last for first, stop in learnt for start, last in others):
        raise RowError(f"{what} says both of some characters: its ranges overlap")
    return tuple(learnt)


def _is_detail(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and "train" in value
        and all(type(value.get(key)) is int for key in ("begin_offset", "end_offset"))
        and 0 <= value["begin_offset"] <= value["end_offset"] + 1
    )


def split_thinking(content: str) -> tuple[str, str] | None:
    """The thinking at the beginning of a text, and the answer behind it; None without any.

    Text before the thinking is not thrown away (Axolotl does): such a text is left whole.
    """
    for opening, closing in _THINKING:
        before, opened, inner = content.partition(opening)
        thinking, closed, answer = inner.partition(closing)
        if opened and closed and not before.strip():
            answer = answer.lstrip()
            _, opened, inner = answer.partition(_SOLUTION[0])
            solution, closed, _ = inner.partition(_SOLUTION[1])
            return thinking.strip(), solution.strip() if opened and closed else answer
    return None


def tool_calls(value: Any, number: int) -> list[Any]:
    """The calls of a message. Their arguments stay in the form the data has (`toolcalls.py`)."""
    calls = decoded(value, f"`tool_calls` of message {number}")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"`tool_calls` of message {number} must be a list of objects")
    return calls


def call_in_text(text: str, number: int) -> list[dict[str, Any]]:
    """The calls that a message of ShareGPT's role `function_call` holds as JSON."""
    found = decoded(text, f"message {number} (function_call)")
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"message {number} (function_call) must hold a name and arguments as JSON")
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": call.get("arguments", {})},
        }
        for call in calls
    ]


def tool_list(value: Any, column: str, wrap: bool = False) -> tuple[Any, ...] | None:
    """Descriptions of tools, with parameters opened where the data holds them as JSON text.

    Args:
        wrap: put bare functions (ShareGPT's form) into `{type: function, function: ...}`.

    Raises:
        RowError: when it is no list.
    """
    tools = decoded(value, f"column {column!r}") if value else None
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise RowError(f"column {column!r} must hold a list, not {str(tools)[:60]!r}")
    return tuple(_tool(tool, column, wrap) for tool in tools) or None


def _tool(tool: Any, column: str, wrap: bool) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    if wrap and "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": tool}
    function = tool.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("parameters"), str):
        parameters = decoded(function["parameters"], f"column {column!r}")
        return {**tool, "function": {**function, "parameters": parameters}}
    return tool

"""`type: chat_template`: a list of messages, some trained, for a chat template to render."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regrow.tasks.prepare.example import Conversation, RowError, no_such_column
from regrow.tasks.prepare.templates import template_text

# Names of the roles in the data -> the names chat templates know (Axolotl's defaults).
_ROLES = {"human": "user", "gpt": "assistant"}
# ShareGPT's form of a message, recognised where the recipe names no properties.
_SHAREGPT = {"role": "from", "content": "value"}
_PLAIN = {"role": "role", "content": "content"}


@dataclass(frozen=True)
class Options:
    """Where messages and their properties are, and which of them are trained."""

    messages: str = "messages"
    properties: Mapping[str, str] = field(default_factory=lambda: dict(_PLAIN))
    """Name the template uses -> name in the data."""
    roles: Mapping[str, str] = field(default_factory=lambda: dict(_ROLES))
    """Role in the data -> role the template knows; others stay as they are."""
    roles_to_train: tuple[str, ...] = ("assistant",)
    train_on_inputs: bool = False
    train_on_eos: str = "turn"
    train_on_eot: str = "turn"
    eot_tokens: tuple[str, ...] = ()
    chat_template: str | None = None
    """Jinja text for this dataset; None: the recipe's, else the tokenizer's own."""

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give."""
        whole = dataset.train_on_inputs
        roles = _roles(dataset.roles)
        return cls(
            messages=dataset.field_messages,
            properties=_PLAIN | dict(dataset.message_property_mappings or {}),
            roles=roles,
            roles_to_train=tuple(sorted({roles.get(r) or r for r in dataset.roles_to_train})),
            train_on_inputs=bool(recipe.train_on_inputs if whole is None else whole),
            train_on_eos=dataset.train_on_eos,
            train_on_eot=dataset.train_on_eot or dataset.train_on_eos,
            eot_tokens=tuple(recipe.eot_tokens),
            chat_template=template_text(dataset.chat_template, dataset.chat_template_jinja),
        )


def _roles(given: Mapping[str, Sequence[str]] | None) -> dict[str, str]:
    named = {name: role for role, names in (given or {}).items() for name in names}
    return _ROLES | named


def read(row: Mapping[str, Any], options: Options) -> Conversation:
    """The messages of a row, in the form chat templates read.

    Raises:
        RowError: when there are no messages where the options say, or one of them is malformed.
    """
    raw = _messages(row, options.messages)
    properties = _properties(raw, options.properties)
    messages = tuple(_message(m, i, properties, options.roles) for i, m in enumerate(raw))
    system = row.get("system")
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    trained = tuple(message["role"] in options.roles_to_train for message in messages)
    return Conversation(messages, trained, _tools(row.get("tools")))


def _messages(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    if column not in row and column == "messages" and "conversations" in row:
        column = "conversations"
    if column not in row:
        raise no_such_column(row, column, "field_messages")
    value = _decoded(row[column], f"column {column!r}")
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RowError(f"column {column!r} must hold a list of messages, not {str(value)[:60]!r}")
    return value


def _properties(raw: list[Mapping[str, Any]], given: Mapping[str, str]) -> Mapping[str, str]:
    plain = {name: given.get(name) for name in _PLAIN} == _PLAIN
    if plain and raw and all("role" not in m and set(_SHAREGPT.values()) <= set(m) for m in raw):
        return {**given, **_SHAREGPT}
    return given


def _message(
    raw: Mapping[str, Any], number: int, properties: Mapping[str, str], roles: Mapping[str, str]
) -> dict[str, Any]:
    renamed = {name: raw[key] for name, key in properties.items() if raw.get(key) is not None}
    rest = {k: v for k, v in raw.items() if k not in properties.values() and v is not None}
    message: dict[str, Any] = {**rest, **renamed}
    if not isinstance(message.get("role"), str):
        raise RowError(
            f"message {number} has no role: it has {', '.join(map(repr, raw))}, and the role is "
            f"looked for in {properties['role']!r}. Set `message_property_mappings`"
        )
    message["role"] = roles.get(message["role"], message["role"])
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], number)
    message["content"] = _content(message, number, properties["content"])
    return message


def _content(message: Mapping[str, Any], number: int, key: str) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    if isinstance(content, list):
        raise RowError(f"message {number} has parts that are not text; only text can be trained on")
    if not isinstance(content, str):
        there = ", ".join(map(repr, message))
        raise RowError(
            f"message {number} has no text in {key!r} (it has {there}). "
            "Set `message_property_mappings`"
        )
    return content


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _tool_calls(calls: Any, number: int) -> list[Any]:
    """Calls with their arguments opened: templates print the object, not text that holds JSON."""
    calls = _decoded(calls, f"`tool_calls` of message {number}")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"`tool_calls` of message {number} must be a list of objects")
    return [_opened(call, number) for call in calls]


def _opened(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _opened(function, number)}
    if "arguments" not in call:
        return dict(call)
    if call["arguments"] == "":  # how some APIs write a call without arguments
        return {**call, "arguments": {}}
    return {**call, "arguments": _decoded(call["arguments"], f"tool call of message {number}")}


def _tools(value: Any) -> tuple[Any, ...] | None:
    value = _decoded(value, "column 'tools'") if value else None
    if value is not None and not isinstance(value, list):
        raise RowError(f"column 'tools' must hold a list, not {str(value)[:60]!r}")
    return tuple(value) if value else None


def _decoded(value: Any, what: str) -> Any:
    """JSON text as data (CSV and some Parquet files hold it so); data as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"{what} holds text that is not JSON ({error})") from error

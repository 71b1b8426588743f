"""`type: chat_template`: a list of messages, some trained, for a chat template to render."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regrow.tasks.prepare import messages as forms
from regrow.tasks.prepare.example import Conversation, RowError, no_such_column
from regrow.tasks.prepare.formats.wording import trains_on_inputs
from regrow.tasks.prepare.messages import Message
from regrow.tasks.prepare.templates import template_text

KIND = "sft"

# Names of the roles in the data -> the names chat templates know (Axolotl's defaults).
_ROLES = {"human": "user", "gpt": "assistant"}
# ShareGPT's further roles in data with tools (LLaMA-Factory's demo data has them): calls as JSON
# text, and what the tools gave. Known where the recipe names no roles.
_CALLS, _RESULTS = "function_call", "observation"
# ShareGPT's form of a message, recognised where the recipe names no properties.
_SHAREGPT = {"role": "from", "content": "value"}
_PLAIN = {"role": "role", "content": "content"}


@dataclass(frozen=True)
class Options:
    """Where messages and their properties are, and which of them are trained."""

    messages: str = "messages"
    system: str = "system"
    """Column with a system text for rows whose first message is none."""
    tools: str = "tools"
    properties: Mapping[str, str] = field(default_factory=lambda: dict(_PLAIN))
    """Name the template uses -> name in the data."""
    roles: Mapping[str, str] | None = None
    """Role in the data -> role the template knows; others stay as they are. None: the usual."""
    roles_to_train: tuple[str, ...] = ("assistant",)
    train_on_inputs: bool = False
    """Messages of all roles are trained."""
    training: str | None = None
    """Property of a message that says whether it is trained."""
    training_detail: str | None = None
    """Property of a message that says which of its characters are."""
    thinking: str = "reasoning_content"
    """Where `split_thinking` puts the thinking."""
    split_thinking: bool = False
    drop_system_message: bool = False
    default_system_message: str | None = None
    """For rows that have no system message."""
    train_on_eos: str = "turn"
    train_on_eot: str = "turn"
    eot_tokens: tuple[str, ...] = ()
    chat_template_kwargs: str = "{}"
    """JSON object of further variables for the template."""
    chat_template: str | None = None
    """Jinja text for this dataset; None: the recipe's, else the tokenizer's own."""

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give."""
        roles = _roles(dataset.roles)
        known = _ROLES if roles is None else roles
        return cls(
            messages=dataset.field_messages,
            system=dataset.field_system or "system",
            tools=dataset.field_tools,
            properties=_PLAIN | dict(dataset.message_property_mappings or {}),
            roles=roles,
            roles_to_train=tuple(sorted({known.get(r) or r for r in dataset.roles_to_train})),
            train_on_inputs=trains_on_inputs(dataset, recipe),
            training=dataset.message_field_training,
            training_detail=dataset.message_field_training_detail,
            thinking=dataset.template_thinking_key,
            split_thinking=dataset.split_thinking,
            drop_system_message=dataset.drop_system_message,
            default_system_message=recipe.default_system_message,
            train_on_eos=dataset.train_on_eos,
            train_on_eot=dataset.train_on_eot or dataset.train_on_eos,
            eot_tokens=tuple(recipe.eot_tokens),
            chat_template_kwargs=json.dumps(recipe.chat_template_kwargs, sort_keys=True),
            chat_template=template_text(dataset.chat_template, dataset.chat_template_jinja),
        )


def _roles(given: Mapping[str, Sequence[str]] | None) -> dict[str, str] | None:
    if not given:
        return None
    return {name: role for role, names in given.items() for name in names}


def read(row: Mapping[str, Any], options: Options) -> Conversation:
    """The messages of a row, in the form chat templates read.

    Raises:
        RowError: when there are no messages where the options say, or one of them is malformed.
    """
    raw = _messages(row, options.messages)
    sharegpt = _is_sharegpt(raw, options.properties)
    properties = {**options.properties, **_SHAREGPT} if sharegpt else options.properties
    messages = [_message(m, i, properties, options) for i, m in enumerate(raw)]
    messages = _with_system(messages, row, options)
    return Conversation(
        tuple(message.properties for message in messages),
        tuple(_trained(message, options) for message in messages),
        forms.tool_list(forms.without_nulls(row.get(options.tools)), options.tools, sharegpt),
        {i: m.details for i, m in enumerate(messages) if m.details is not None},
    )


def _messages(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    if column not in row and column == "messages" and "conversations" in row:
        column = "conversations"
    if column not in row:
        raise no_such_column(row, column, "field_messages")
    value = forms.decoded(row[column], f"column {column!r}")
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RowError(f"column {column!r} must hold a list of messages, not {str(value)[:60]!r}")
    return value


def _is_sharegpt(raw: list[Mapping[str, Any]], given: Mapping[str, str]) -> bool:
    if not raw or "role" in raw[0] or any(given.get(key) != key for key in _PLAIN):
        return False
    return all("role" not in m and set(_SHAREGPT.values()) <= set(m) for m in raw)


def _with_system(
    messages: list[Message], row: Mapping[str, Any], options: Options
) -> list[Message]:
    """The messages with the row's or the recipe's system text, or without any."""
    if not messages:
        return messages
    first = messages[0].properties["role"] == "system"
    system = None if first else row.get(options.system)
    if options.drop_system_message:
        return messages[1:] if first else messages
    if not isinstance(system, str) and not first:
        system = options.default_system_message
    if system is None:
        return messages
    return [Message({"role": "system", "content": system}), *messages]


def _trained(message: Message, options: Options) -> bool:
    if message.trained is not None:
        return message.trained
    if message.details is not None:
        return any(message.details.values())
    return options.train_on_inputs or message.properties["role"] in options.roles_to_train


def _message(
    raw: Mapping[str, Any], number: int, properties: Mapping[str, str], options: Options
) -> Message:
    role, content = raw.get(properties["role"]), raw.get(properties["content"])
    known = _ROLES if options.roles is None else options.roles
    plain = len(raw) == 2 and len(properties) == 2 and not options.split_thinking
    if plain and type(role) is str and type(content) is str and role not in (_CALLS, _RESULTS):
        return Message({"role": known.get(role, role), "content": content})
    message = _renamed(forms.without_nulls(raw), properties)
    if not isinstance(message.get("role"), str):
        raise RowError(
            f"message {number} has no role: it has {', '.join(map(repr, raw))}, and the role is "
            f"looked for in {properties['role']!r}. Set `message_property_mappings`"
        )
    message["role"] = known.get(message["role"], message["role"])
    trained, details = _flags(message, number, options)
    details |= _texts(message, (*properties, options.thinking))
    _call_tools(message, number, options)
    _require_text(message, number, properties["content"])
    if options.split_thinking:
        _split_thinking(message, number, options, bool(details))
    return Message(message, trained, details or None)


def _split_thinking(message: dict[str, Any], number: int, options: Options, detailed: bool) -> None:
    if message["role"] != "assistant" or not isinstance(message["content"], str):
        return
    thought = forms.split_thinking(message["content"])
    if thought is not None and detailed:
        raise RowError(
            f"message {number} says which of its characters are trained, and `split_thinking` "
            "would move them; put the thinking into a property of its own"
        )
    if thought is not None:
        message[options.thinking], message["content"] = thought


def _renamed(raw: Mapping[str, Any], properties: Mapping[str, str]) -> dict[str, Any]:
    """The message with the names templates use, its role and content first."""
    renamed = {name: raw[key] for name, key in properties.items() if key in raw}
    rest = {k: v for k, v in raw.items() if k not in properties.values() and k not in renamed}
    return {**renamed, **rest}


def _flags(
    message: dict[str, Any], number: int, options: Options
) -> tuple[bool | None, dict[str, forms.Ranges]]:
    """What the message says of training on it, taken out of it."""
    trained = message.pop(options.training, None) if options.training else None
    detail = message.pop(options.training_detail, None) if options.training_detail else None
    if trained is not None and not isinstance(trained, (bool, int, float)):
        raise RowError(f"message {number}: {options.training!r} must be true or false")
    if detail is None:
        return None if trained is None else bool(trained), {}
    what = f"{options.training_detail!r} of message {number}"
    return None if trained is None else bool(trained), {
        "content": forms.detail_ranges(detail, what)
    }


def _texts(message: dict[str, Any], names: Sequence[str]) -> dict[str, forms.Ranges]:
    """Makes texts of properties given as lists of text parts; returns what their flags say."""
    details = {}
    for name in names:
        if name in message and name != "role":
            message[name], ranges = forms.text_of(message[name])
            details |= {name: ranges} if ranges is not None else {}
    return details


def _call_tools(message: dict[str, Any], number: int, options: Options) -> None:
    """Tool calls as templates read them, whichever way the data writes them."""
    if "tool_calls" in message:
        message["tool_calls"] = forms.tool_calls(message["tool_calls"], number)
    if options.roles is not None or not isinstance(message.get("content"), str):
        return
    if message["role"] == _CALLS:
        calls = forms.call_in_text(message["content"], number)
        message |= {"role": "assistant", "content": "", "tool_calls": calls}
    elif message["role"] == _RESULTS:
        message["role"] = "tool"


def _require_text(message: dict[str, Any], number: int, key: str) -> None:
    content = message.get("content")
    others = any(value for name, value in message.items() if name not in ("role", "content"))
    if content is None and message["role"] == "assistant" and others:
        message["content"] = ""  # tool calls or thinking alone
    elif not isinstance(content, (str, list)):
        there = ", ".join(map(repr, message))
        raise RowError(
            f"message {number} has no text in {key!r} (it has {there}). "
            "Set `message_property_mappings`"
        )

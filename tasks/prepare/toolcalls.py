"""Tool calls in the form a chat template prints: arguments as an object, or as JSON text.

Most templates turn an object into JSON; some (DeepSeek V3's) print the arguments as text, and calls
only where the content is null. Data has either. The template is asked once which it needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.rendering import ChatTemplate

_Call = Mapping[str, Any]
_TEXT = "regrow asks"
_ARGUMENTS = {"key": _TEXT}


@dataclass(frozen=True)
class CallForm:
    """How a template wants messages that call tools."""

    printed: bool
    """Whether it prints calls at all."""
    as_text: bool = False
    """Arguments as JSON text, not as an object."""
    no_content: str | None = ""
    """What stands for the content of a message without any: an empty text, or null."""
    beside_content: bool = True
    """Whether calls are printed beside content."""

    @classmethod
    def of(cls, template: ChatTemplate) -> CallForm:
        """The form, found with a call of its own."""
        for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS)):
            for content in ("", None):
                text = _trial(template, arguments, content)
                # An object that Python wrote is not JSON: the template meant to be given text.
                if text is not None and _TEXT in text and str(_ARGUMENTS) not in text:
                    beside = _trial(template, arguments, "words")
                    both = beside is not None and _TEXT in beside
                    return cls(True, isinstance(arguments, str), content, both)
        return cls(False)

    def apply(self, message: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        """The message in this form.

        Raises:
            RowError: when its calls would not be printed, or their arguments are no JSON where an
                object is needed.
        """
        calls = message.get("tool_calls")
        if not isinstance(calls, Sequence) or isinstance(calls, str) or not calls:
            return message
        content = message.get("content") or self.no_content
        if not self.printed or (content and not self.beside_content):
            beside = " beside its content" if self.printed else ""
            raise RowError(
                f"message {number} calls tools, which the chat template does not print{beside}. "
                "Choose a template that does, such as the model's own (`tokenizer_default`), or "
                "mend the row"
            )
        form = _text if self.as_text else _object
        converted = [_converted(call, number, form) for call in calls]
        return {**message, "content": content, "tool_calls": converted}


def _converted(call: _Call, number: int, form: Callable[[Any, int], Any]) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _converted(inner, number, form)}
    if "arguments" not in call:
        return dict(call)
    return {**call, "arguments": form(call["arguments"], number)}


def _text(arguments: Any, number: int) -> str:
    if isinstance(arguments, str):
        return arguments or "{}"
    return json.dumps(arguments, ensure_ascii=False)


def _object(arguments: Any, number: int) -> Any:
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}  # how some APIs write a call without arguments
    try:
        return json.loads(arguments)
    except json.JSONDecodeError as error:
        raise RowError(
            f"tool call of message {number} holds text that is not JSON ({error}): "
            f"{arguments[:60]!r}. Mend the row"
        ) from error


def _trial(template: ChatTemplate, arguments: Any, content: str | None) -> str | None:
    """A dialogue with one call, rendered; None when the template refuses it."""
    function = {"name": "f", "arguments": arguments}
    # Mistral's templates want an id of nine letters.
    call = {"id": "call00000", "type": "function", "function": function}
    result = {"role": "tool", "name": "f", "tool_call_id": "call00000", "content": "1"}
    dialogue = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        result,
        {"role": "assistant", "content": "1"},
    ]
    try:
        return template.render(dialogue)
    except RowError:
        return None

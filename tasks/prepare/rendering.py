"""Chat templates rendered in a sandbox, as Transformers renders them, but the same on every day.

The environment follows the published contract for chat templates (Transformers documentation,
"Chat templates"): trimmed blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that
does not escape for HTML, and the `{% generation %}` mark, which is read and needs no effect here:
masks come from probing the template (`masking.py`), which is exact without the author's help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.sandbox import Sandbox
from regrow.tasks.stage import StageError

_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template's own code can raise."""


class ChatTemplate:
    """A compiled template with the special tokens it may print.

    Args:
        text: Jinja.
        special: `bos_token`, `eos_token`, ... as the template sees them.

    Raises:
        StageError: when the text is not valid Jinja.
    """

    def __init__(self, text: str, special: Mapping[str, Any]) -> None:
        self.text = text
        self._special = dict(special)
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.template(text)
        except jinja2.TemplateSyntaxError as error:
            raise StageError(f"chat_template: line {error.lineno}: {error.message}") from error

    def given(self, arguments: Mapping[str, Any]) -> ChatTemplate:
        """The same template with further variables, such as `enable_thinking`."""
        return ChatTemplate(self.text, {**self._special, **arguments}) if arguments else self

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text. Raises RowError when the template refuses it."""
        self._sandbox.steps = 0
        variables = {
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables, **self._special)
        except _FAULTS as error:
            roles = ", ".join(str(message.get("role")) for message in messages[:12])
            raise RowError(
                f"the chat template refuses this conversation (roles: {roles}): {error}. "
                "Mend the row, or choose another `chat_template`"
            ) from error

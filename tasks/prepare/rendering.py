"""Chat templates rendered in a sandbox, as Transformers renders them, but the same on every day.

The environment follows the published contract for chat templates (Transformers documentation,
"Chat templates"): trimmed blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that
does not escape for HTML, and the `{% generation %}` mark, which is read and needs no effect here.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from regrow.tasks.prepare.example import RowError
from regrow.tasks.stage import StageError

# A stage does not read the clock: a template that prints today's date gets this day instead, the
# one that Llama 3's own template falls back to.
_TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)


class ChatTemplate:
    """A compiled template with the special tokens it may print.

    Args:
        text: Jinja.
        special: `bos_token`, `eos_token`, ... as the template sees them.

    Raises:
        StageError: when the text is not valid Jinja.
    """

    def __init__(self, text: str, special: Mapping[str, str]) -> None:
        self._special = dict(special)
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise StageError(f"chat_template: line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text. Raises RowError when the template refuses it."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages[:12])
            raise RowError(
                f"the chat template refuses this conversation (roles: {roles}): {error}. "
                "Mend the row, or choose another `chat_template`"
            ) from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its body, as if the marks were not there."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)

"""Prompts that the model itself will answer, with what a reward needs: for `rl` grpo and gdpo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regrow.tasks.prepare.example import Exchange, Item, Piece, Pieces, RowError, TokenSource
from regrow.tasks.prepare.formats import chat_template, own_code
from regrow.tasks.prepare.formats.dialogue import (
    column,
    own_code_of,
    rewritten,
    system_text,
    tools_of,
    with_system,
    words,
)

KIND = "prompts"
NAMES = ("prompts",)
"""The name of what is read here; in a recipe it is the form's own."""


@dataclass(frozen=True)
class Options:
    """Which column is the prompt, and how messages are read."""

    prompt: str | None = None
    """None: `prompt`, or the messages."""
    chat: chat_template.Options = field(default_factory=chat_template.Options)
    own: own_code.Options | None = None
    """Function that gives rows their form."""

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give."""
        named = dataset.field_prompt
        if dataset.type == "chat_template" and named is None:
            named = dataset.field_messages
        chat = chat_template.Options.from_recipe(dataset, recipe)
        return cls(named, chat, own_code_of(dataset, recipe))


def read(row: Mapping[str, Any], options: Options) -> Item:
    """The prompt, with the beginning of an answer where it is messages; the other columns as JSON.

    Raises:
        RowError: when there is no prompt, or its last word is the model's already.
    """
    row = rewritten(row, options.own)
    names = (options.prompt,) if options.prompt else ("prompt", "messages", "conversations")
    name = column(row, names, "field_prompt")
    prompt = words(row, name, "field_prompt", options.chat)
    used = {name}
    source: TokenSource
    if not prompt:
        raise RowError(f"column {name!r} is empty, and a prompt is not; mend the row")
    if isinstance(prompt, str):
        source = Pieces((Piece(prompt, "none"),), eos=False)
    else:
        if prompt[-1]["role"] == "assistant":
            raise RowError(
                f"column {name!r} ends with a message of the assistant, and the model shall write "
                "it. Leave it out, or use a `type` for answers"
            )
        chat = options.chat
        used |= {chat.system, chat.tools}
        system = system_text(row, chat.system, chat.default_system_message)
        source = Exchange(with_system(system, prompt), (), tools_of(row, chat))
    rest = {key: value for key, value in row.items() if key not in used}
    return Item((source,), extra=json.dumps(rest, ensure_ascii=False, default=str))

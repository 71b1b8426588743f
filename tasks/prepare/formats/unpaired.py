"""Answers marked good or bad, each for itself: for `rl: kto`.

The formats are Axolotl's. Without a name (`passthrough`) a row has the columns that TRL reads:
prompt and completion as text or messages, and label; or messages, the last of them the answer, and
label, as in LLaMA-Factory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regrow.tasks.prepare.example import Item, RowError, no_such_column
from regrow.tasks.prepare.formats import chat_template, own_code, preference
from regrow.tasks.prepare.formats.dialogue import (
    Source,
    Words,
    answered,
    as_messages,
    column,
    divided,
    rewritten,
    sequence,
    system_text,
    tools_of,
    with_system,
    words,
)

KIND = "unpaired"
NAMES = ("unpaired",)
"""The name of what is read here; in a recipe it is the form's own."""


def _framed(frame: str) -> dict[str, Source]:
    return {
        f"{frame}.argilla": Source(("instruction",), frame),
        f"{frame}.argilla_chat": Source((), frame, dialogues=True, system=False),
        f"{frame}.intel": Source(("question",), frame),
        f"{frame}.prompt_pairs": Source(("prompt",), frame),
        f"{frame}.ultra": Source(("prompt",), frame),
    }


SOURCES = {
    **_framed("chatml"),
    **_framed("llama3"),
    "chat_template": Source(("messages",), dialogues=True),
    "passthrough": Source(as_it_is=True),
    "passthrough.default": Source(as_it_is=True),
    "user_defined.default": Source(as_it_is=True),
}
"""Name in a recipe -> where things are."""


@dataclass(frozen=True)
class Options:
    """Which form the rows have, and which columns are read."""

    form: str = "passthrough"
    """A name in `SOURCES`, or `map`."""
    prompt: str | None = None
    """Column, where it is not the form's own."""
    completion: str = "completion"
    label: str = "label"
    columns: Mapping[str, str] | None = None
    """For `map`: the keys of `AnswerType`."""
    chat: chat_template.Options = field(default_factory=chat_template.Options)
    """How messages are read."""
    own: own_code.Options | None = None
    """Function that gives rows their form."""

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give."""
        whole = preference.Options.from_recipe(dataset, recipe)
        named = whole.columns["field_label"] if whole.columns else None
        return cls(
            form=whole.form,
            prompt=whole.prompt,
            completion=dataset.field_completion or cls.completion,
            label=dataset.field_label or named or cls.label,
            columns=whole.columns,
            chat=whole.chat,
            own=whole.own,
        )


def read(row: Mapping[str, Any], options: Options) -> Item:
    """The answer behind its prompt, and its label.

    Raises:
        RowError: for columns that are absent or hold something else.
    """
    row = rewritten(row, options.own)
    if {"chosen", "rejected"} <= set(row):
        raise RowError(
            "it holds a pair of answers, and here each row is one answer with its label. Use "
            "`rl: dpo`, or write each answer as a row of its own"
        )
    label = (flag(row, options.label),)
    if options.columns is not None:
        prompt = preference.formatted_prompt(row, options.columns)
        answer = preference.formatted_answer(row, options.columns, "completion")
        return Item((answered(prompt, answer),), label)
    source = SOURCES[options.form]
    if source.as_it_is:
        prompt, answer = _as_it_is(row, options)
    elif source.dialogues:
        prompt, answer = _dialogue(row, source, options)
    else:
        names = (options.prompt,) if options.prompt else source.prompts
        name = column(row, names, "field_prompt")
        prompt = as_messages(words(row, name, "field_prompt", options.chat), "user")
        prompt = with_system(system_text(row, options.chat.system), prompt)
        answer = _completion(row, options)
    tools = tools_of(row, options.chat) if source.frame is None else None
    return Item((sequence(prompt, answer, source, tools),), label)


_FLAGS = {"true": 1, "1": 1, "yes": 1, "false": 0, "0": 0, "no": 0}


def flag(row: Mapping[str, Any], name: str, key: str = "field_label") -> int:
    """1 or 0 of a column with a boolean, a number or a word. Raises RowError for anything else."""
    if name not in row:
        raise no_such_column(row, name, key)
    return as_flag(row[name], f"column {name!r}")


def as_flag(value: Any, what: str) -> int:
    """1 or 0 of a boolean, a number or a word. Raises RowError for anything else."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return int(value)
    if isinstance(value, str) and value.strip().lower() in _FLAGS:
        return _FLAGS[value.strip().lower()]
    raise RowError(f"{what} must say true or false (or 1 or 0), not {str(value)[:40]!r}")


def _completion(row: Mapping[str, Any], options: Options) -> Words:
    name = column(row, (options.completion,), "field_completion")
    return words(row, name, "field_completion", options.chat)


def _dialogue(row: Mapping[str, Any], source: Source, options: Options) -> tuple[Words, Words]:
    names = _messages(options) if source.prompts else (options.completion,)
    key = "field_messages" if source.prompts else "field_completion"
    name = column(row, names, key)
    prompt, answer = divided(words(row, name, key, options.chat), name)
    system = system_text(row, options.chat.system) if source.system else ""
    return with_system(system, prompt), answer


def _messages(options: Options) -> tuple[str, ...]:
    named = options.chat.messages
    return (named, "conversations") if named == "messages" else (named,)


def _as_it_is(row: Mapping[str, Any], options: Options) -> tuple[Words, Words]:
    """TRL's forms, and LLaMA-Factory's."""
    name = options.prompt or "prompt"
    if row.get(name) is None and any(row.get(other) is not None for other in _messages(options)):
        return _dialogue(row, SOURCES["chat_template"], options)
    prompt = words(row, column(row, (name,), "field_prompt"), "field_prompt", options.chat)
    answer = _completion(row, options)
    if not isinstance(prompt, str):
        default = options.chat.default_system_message
        prompt = with_system(system_text(row, options.chat.system, default), prompt)
    return prompt, answer

"""Pairs of answers, one better than the other: for `rl` dpo, ipo, orpo, simpo and reward models.

The formats are Axolotl's. Without a name (`passthrough`) a row has the columns that TRL reads:
prompt, chosen and rejected as text or messages; or chosen and rejected as whole dialogues, whose
common beginning is the prompt; or messages (`conversations`) with chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regrow.configs.sections.answer_types import AnswerType
from regrow.tasks.prepare.example import (
    Item,
    RowError,
    no_such_column,
    text_column,
)
from regrow.tasks.prepare.formats import chat_template, own_code
from regrow.tasks.prepare.formats.dialogue import (
    Source,
    Words,
    answered,
    as_messages,
    column,
    divided,
    own_code_of,
    rewritten,
    sequence,
    shared,
    system_text,
    tools_of,
    with_system,
    words,
)

KIND = "preference"
NAMES = ("preference",)
"""The name of what is read here; in a recipe it is the form's own."""

_ANY_PROMPT = ("prompt", "input", "question", "instruction")
_ANY_CHOSEN = ("chosen", "chosen_response")
_ANY_REJECTED = ("rejected", "rejected_response")


def _framed(frame: str) -> dict[str, Source]:
    return {
        frame: Source(_ANY_PROMPT, frame),
        f"{frame}.default": Source(_ANY_PROMPT, frame),
        f"{frame}.argilla": Source(("instruction",), frame),
        f"{frame}.argilla_chat": Source((), frame, dialogues=True, system=False),
        f"{frame}.icr": Source(("input",), frame),
        f"{frame}.intel": Source(("question",), frame),
        f"{frame}.prompt_pairs": Source(("prompt",), frame),
        f"{frame}.ultra": Source(("prompt",), frame, last_message=True),
    }


_ICR = Source(("input",), "llama3")
SOURCES = {
    **_framed("chatml"),
    **_framed("llama3"),
    "zephyr.nectar": Source(("prompt",), "zephyr"),
    "chat_template": Source(("messages",), closed=True, last_message=True, system=False),
    "chat_template.argilla": Source(("prompt",), closed=True, dialogues=True),
    "chat_template.argilla_chat": Source((), closed=True, dialogues=True, system=False),
    "bradley_terry.chat_template": Source(("input", "prompt")),
    "bradley_terry.llama3": _ICR,
    "bradley_terry.llama3.icr": _ICR,
    "passthrough": Source(as_it_is=True),
    "passthrough.default": Source(as_it_is=True),
    "user_defined.default": Source(as_it_is=True),
}
"""Axolotl's name -> where things are."""


@dataclass(frozen=True)
class Options:
    """Which form the rows have, and which columns are read."""

    form: str = "passthrough"
    """A name in `SOURCES`, or `map`."""
    prompt: str | None = None
    """Column, where it is not the form's own; so are the next two."""
    chosen: str | None = None
    rejected: str | None = None
    columns: Mapping[str, str] | None = None
    """For `map`: the keys of `AnswerType`."""
    chat: chat_template.Options = field(default_factory=chat_template.Options)
    """How messages are read."""
    own: own_code.Options | None = None
    """Function that gives rows their form."""

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give."""
        is_map = not isinstance(dataset.type, str)
        own = own_code_of(dataset, recipe)
        return cls(
            form="map" if is_map else "passthrough" if own else dataset.type,
            prompt=dataset.field_prompt,
            chosen=dataset.field_chosen,
            rejected=dataset.field_rejected,
            columns=_columns_of(dataset.type) if is_map else None,
            chat=chat_template.Options.from_recipe(dataset, recipe),
            own=own,
        )


def _columns_of(given: Any) -> dict[str, str]:
    """A map that names nothing but `field_system` may have been read as a prompt of imitation."""
    known = given if isinstance(given, AnswerType) else AnswerType(field_system=given.field_system)
    return known.model_dump()


def read(row: Mapping[str, Any], options: Options) -> Item:
    """The two answers, each behind the prompt; chosen first.

    Raises:
        RowError: for columns that are absent or hold something else.
    """
    row = rewritten(row, options.own)
    if options.columns is not None:
        prompt = formatted_prompt(row, options.columns)
        names = ("chosen", "rejected")
        answers = [formatted_answer(row, options.columns, name) for name in names]
        return Item(tuple(answered(prompt, answer) for answer in answers), (1, 0))
    source = SOURCES[options.form]
    if options.form == "zephyr.nectar":
        prompt, chosen, rejected = _ranked(row, options)
    elif source.as_it_is:
        prompt, chosen, rejected = _as_it_is(row, options)
    elif source.dialogues:
        prompt, chosen, rejected = _dialogues(row, source, options)
    else:
        prompt, chosen, rejected = _columns(row, source, options)
    tools = tools_of(row, options.chat) if source.frame is None else None
    both = (sequence(prompt, answer, source, tools) for answer in (chosen, rejected))
    return Item(tuple(both), (1, 0))


def formatted_prompt(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The prompt as a map in the recipe writes it."""
    system = system_text(row, columns["field_system"])
    prompt = text_column(row, columns["field_prompt"], "type.field_prompt")
    return columns["prompt_format"].format(prompt=prompt, system=system)


def formatted_answer(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> str:
    """The answer `name` (chosen, rejected or completion) as a map in the recipe writes it."""
    text = text_column(row, columns[f"field_{name}"], f"type.field_{name}")
    return columns[f"{name}_format"].format(**{name: text})


def _answers(row: Mapping[str, Any], options: Options) -> tuple[Words, Words]:
    chosen = (options.chosen,) if options.chosen else _ANY_CHOSEN
    rejected = (options.rejected,) if options.rejected else _ANY_REJECTED
    return (
        words(row, column(row, chosen, "field_chosen"), "field_chosen", options.chat),
        words(row, column(row, rejected, "field_rejected"), "field_rejected", options.chat),
    )


def _columns(
    row: Mapping[str, Any], source: Source, options: Options
) -> tuple[Words, Words, Words]:
    """A column with the prompt and two with answers."""
    names = (options.prompt,) if options.prompt else source.prompts
    key = "field_prompt"
    if source.prompts == ("messages",) and not options.prompt:
        names, key = _message_columns(options), "field_messages"
    prompt = as_messages(words(row, column(row, names, key), key, options.chat), "user")
    if source.system:
        default = None if source.frame else options.chat.default_system_message
        prompt = with_system(system_text(row, options.chat.system, default), prompt)
    chosen, rejected = _answers(row, options)
    if source.last_message:
        chosen, rejected = (_last(answer) for answer in (chosen, rejected))
    return prompt, chosen, rejected


def _last(answer: Words) -> Words:
    return answer if isinstance(answer, str) else answer[-1:]


def _message_columns(options: Options) -> tuple[str, ...]:
    """Where the messages are: LLaMA-Factory and ShareGPT call them conversations."""
    named = options.chat.messages
    return (named, "conversations") if named == "messages" else (named,)


def _dialogues(
    row: Mapping[str, Any], source: Source, options: Options
) -> tuple[Words, Words, Words]:
    """Two dialogues, alike but for their last messages."""
    chosen, rejected = _answers(row, options)
    prompt, better = divided(chosen, options.chosen or "chosen")
    _, worse = divided(rejected, options.rejected or "rejected")
    single = next((n for n in source.prompts if isinstance(row.get(n), str)), None)
    if single and len(prompt) == 1:
        prompt = as_messages(row[single], "user")
    system = system_text(row, options.chat.system) if source.system else ""
    return with_system(system, prompt), better, worse


def _ranked(row: Mapping[str, Any], options: Options) -> tuple[Words, Words, Words]:
    """The best answer and the next: in Nectar's data rank 1 is the best (its data set card).

    Axolotl takes the two with the highest rank numbers, which are the worst.
    """
    prompt = text_column(row, options.prompt or "prompt", "field_prompt")
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError("column 'answers' must hold a list of two answers or more")
    if not all(isinstance(a, Mapping) and isinstance(a.get("rank"), (int, float)) for a in answers):
        raise RowError("column 'answers': each must have `answer` and a number `rank`")
    best, next_best, *_ = sorted(answers, key=lambda answer: answer["rank"])
    chosen, rejected = (text_column(a, "answer", "answers") for a in (best, next_best))
    system = {"role": "system", "content": ""}
    return (system, {"role": "user", "content": prompt}), chosen, rejected


def _as_it_is(row: Mapping[str, Any], options: Options) -> tuple[Words, Words, Words]:
    """TRL's forms, and LLaMA-Factory's."""
    chosen, rejected = _answers(row, options)
    name = options.prompt or "prompt"
    if row.get(name) is None:
        name = next((n for n in _message_columns(options) if row.get(n) is not None), "")
        if options.prompt and not name:
            raise no_such_column(row, options.prompt, "field_prompt")
    prompt = words(row, name, "field_prompt", options.chat) if name else None
    whole = not isinstance(chosen, str) and chosen and chosen[0]["role"] != "assistant"
    if prompt is None or (isinstance(prompt, str) and whole):
        cut = shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    if not isinstance(prompt, str):
        default = options.chat.default_system_message
        prompt = with_system(system_text(row, options.chat.system, default), prompt)
    return prompt, chosen, rejected

"""The formats by name: each turns a raw row into what becomes tokens.

A format is one light module of this folder (no tokenizer, no Jinja) with
    `NAMES`: the values of `datasets[].type` that it reads;
    `Options`: a frozen dataclass of all that decides its result; `from_recipe(dataset, recipe)`;
    `read(row, options)`: the row as an example; raises `RowError`;
    `KIND`, where the examples are not for supervised training: see `kind_of`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from regrow.configs.sections.answer_types import KIND_TYPES
from regrow.configs.sections.dataset_types import REFUSED_TYPES, PromptType, is_own_code
from regrow.tasks.prepare.example import Item, TokenSource
from regrow.tasks.prepare.formats import (
    alpaca,
    chat_template,
    completion,
    context_qa,
    creative_acr,
    input_output,
    llama2_chat,
    multiple_choice,
    own_code,
    preference,
    pretokenized,
    pygmalion,
    reflection,
    rl_prompts,
    stepwise_supervised,
    unpaired,
    user_defined,
)
from regrow.tasks.stage import StageError


class Format(Protocol):
    """What every module here offers."""

    Options: Any

    def read(self, row: Mapping[str, Any], options: Any) -> TokenSource | Item:
        """The row as an example."""
        ...


_WITH_NAMES = (
    alpaca,
    completion,
    context_qa,
    creative_acr,
    input_output,
    llama2_chat,
    multiple_choice,
    own_code,
    preference,
    pretokenized,
    pygmalion,
    reflection,
    rl_prompts,
    stepwise_supervised,
    unpaired,
    user_defined,
)
FORMATS: dict[str, Format] = {
    "chat_template": cast(Format, chat_template),
    **{name: cast(Format, module) for module in _WITH_NAMES for name in module.NAMES},
}
"""Canonical name -> format."""

_OF_KIND = {
    "preference": "preference",
    "reward": "preference",
    "unpaired": "unpaired",
    "steps": "stepwise_supervised",
    "prompts": "prompts",
}
WITHOUT_NAME = ("own_code", "user_defined", *_OF_KIND.values())
"""Formats that a recipe asks for in other ways than by their names here."""


def kind_of(name: str) -> str:
    """What the examples of a format are for: "sft", "preference", "unpaired", "steps" or
    "prompts"."""
    return getattr(FORMATS[name], "KIND", "sft")


def chat_options(options: Any) -> chat_template.Options | None:
    """How a format's conversations are rendered and masked; None where it has none.

    A format has conversations if its options are `chat_template`'s, or hold them as `chat`.
    """
    held = options if isinstance(options, chat_template.Options) else getattr(options, "chat", None)
    return held if isinstance(held, chat_template.Options) else None


def format_name(dataset_type: Any, key: str, kind: str = "sft") -> str:
    """The canonical name of a recipe's `datasets[].type`.

    Args:
        kind: the recipe's `data_kind`; beside a method of its own all names of a kind are forms of
            one format, which reads the name itself.

    Raises:
        StageError: for a type that is not known or not built, with what to use instead.
    """
    if kind != "sft":
        known = not isinstance(dataset_type, str) or dataset_type in KIND_TYPES[kind]
        if not known and (kind == "steps" or not is_own_code(dataset_type)):
            known = ", ".join(KIND_TYPES[kind])
            raise StageError(f"{key}.type: {dataset_type!r} holds no such data; use one of {known}")
        return _OF_KIND[kind]
    if isinstance(dataset_type, PromptType):
        return "user_defined"
    name = str(dataset_type)
    if name in FORMATS and name not in WITHOUT_NAME:
        return name
    if name in REFUSED_TYPES:
        why, remedy = REFUSED_TYPES[name]
        raise StageError(f"{key}.type: {name!r}: {why}. {remedy}")
    if is_own_code(name):
        return "own_code"
    near = difflib.get_close_matches(name, FORMATS, 3, 0.6) or sorted(FORMATS)
    raise StageError(f"{key}.type: {name!r} is not a known format; use one of {', '.join(near)}")

"""The formats by name: each turns a raw row into a `Document` or a `Conversation`.

A format is one light module of this folder (no tokenizer, no Jinja) with
    `Options`: a frozen dataclass of all that decides its result; `from_recipe(dataset, recipe)`;
    `read(row, options)`: the row as an example; raises `RowError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from regrow.tasks.prepare.example import Conversation, Document
from regrow.tasks.prepare.formats import alpaca, chat_template, completion
from regrow.tasks.stage import StageError


class Format(Protocol):
    """What every module here offers."""

    Options: Any

    def read(self, row: Mapping[str, Any], options: Any) -> Document | Conversation:
        """The row as an example."""
        ...


FORMATS: dict[str, Format] = {
    "alpaca": cast(Format, alpaca),
    "chat_template": cast(Format, chat_template),
    "completion": cast(Format, completion),
}
"""Canonical name -> format."""

_ALIASES = {"chat_template.default": "chat_template"}


def format_name(dataset_type: Any, key: str) -> str:
    """The canonical name of a recipe's `datasets[].type`.

    Raises:
        StageError: for a type that is not known, listing those that are.
    """
    name = _ALIASES.get(str(dataset_type), str(dataset_type))
    if name not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise StageError(f"{key}.type: {dataset_type!r} is not a known format; use one of {known}")
    return name

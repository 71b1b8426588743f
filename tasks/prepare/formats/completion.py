"""`type: completion`: plain text, all of it trained, cut into pieces of `sequence_len`.

Unlike Axolotl, which cuts a text off after 64 times `sequence_len` tokens, all of it is used. Its
`pretrain` is read in the same way: there Axolotl repeats up to 256 tokens at the beginning of each
piece and puts an eos token behind it, which teaches tokens twice and ends where no text ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import Document, Segment, TokenIds, text_column

NAMES = ("completion",)
"""The formats read here, by their names in a recipe."""


@dataclass(frozen=True)
class Options:
    """Which column is read."""

    field: str = "text"

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset gives."""
        return cls(field=dataset.field or cls.field)


def read(row: Mapping[str, Any], options: Options) -> Document | TokenIds:
    """The text; nothing at all for an empty one. Raises RowError when its column is absent or not
    text."""
    text = text_column(row, options.field, "field")
    return Document((Segment(text, True),)) if text else TokenIds((), ())

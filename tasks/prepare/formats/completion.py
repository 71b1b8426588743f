"""`type: completion`: plain text, all of it trained, cut into pieces of `sequence_len`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import Document, Segment, text_column


@dataclass(frozen=True)
class Options:
    """Which column is read."""

    field: str = "text"

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset gives."""
        return cls(field=dataset.field)


def read(row: Mapping[str, Any], options: Options) -> Document:
    """The text. Raises RowError when its column is absent or not text."""
    return Document((Segment(text_column(row, options.field, "field"), True),))

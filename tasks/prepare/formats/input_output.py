"""`type: input_output`: pieces of text without a template, each with its own flag.

The texts are tokenized one by one and joined as they are; no bos or eos token is added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import Piece, Pieces, RowError, no_such_column
from regrow.tasks.prepare.formats.wording import trains_on_inputs

NAMES = ("input_output",)
"""The formats read here, by their names in a recipe."""


@dataclass(frozen=True)
class Options:
    """Which column is read, and what is trained."""

    segments: str = "segments"
    train_on_inputs: bool = False
    """Every piece is trained, whatever its flag."""

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give."""
        return cls(dataset.field or cls.segments, trains_on_inputs(dataset, recipe))


def read(row: Mapping[str, Any], options: Options) -> Pieces:
    """The pieces. Raises RowError when they are not a list of objects with `label` and `text`."""
    if options.segments not in row:
        raise no_such_column(row, options.segments, "field")
    segments = row[options.segments]
    if isinstance(segments, str):
        segments = _decoded(segments, options.segments)
    if not isinstance(segments, (list, tuple)):
        shown = str(segments)[:60]
        raise RowError(f"column {options.segments!r} must hold a list of pieces, not {shown!r}")
    return pieces_of(segments, options.train_on_inputs, f"column {options.segments!r}")


def pieces_of(segments: Any, train_on_inputs: bool, what: str) -> Pieces:
    """The pieces of a list of objects with `label` and `text`.

    Args:
        what: where they come from, for errors.
    """
    pieces = (_piece(s, number, train_on_inputs, what) for number, s in enumerate(segments))
    return Pieces(tuple(pieces), bos=False, eos=False)


def _piece(segment: Any, number: int, train_on_inputs: bool, what: str) -> Piece:
    if not isinstance(segment, Mapping) or not isinstance(segment.get("text"), str):
        raise RowError(f"{what}: piece {number} has no text; give it `label` and `text`")
    if segment.get("label") not in (True, False):  # 1 and 0 too
        raise RowError(f"{what}: piece {number} has no `label` of true (to be learnt) or false")
    return Piece(segment["text"], "all" if segment["label"] or train_on_inputs else "none")


def _decoded(text: str, column: str) -> Any:
    """A list written as JSON, as CSV and some Parquet files hold it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"column {column!r} holds text that is not JSON ({error})") from error

"""`type: pretokenized`: tokens made elsewhere, in the columns `input_ids` and `labels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import RowError, TokenIds
from regrow.tasks.prepare.formats.wording import require_column

NAMES = ("pretokenized",)
"""The formats read here, by their names in a recipe."""

_IGNORED = -100
"""The label of a token that is not learnt, as PyTorch's cross entropy has it (`ignore_index`)."""


@dataclass(frozen=True)
class Options:
    """There is nothing to choose: the columns' names are fixed, as in Axolotl."""

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options of any recipe."""
        return cls()


def read(row: Mapping[str, Any], options: Options) -> TokenIds:
    """The tokens as they are, without those at the ends that `attention_mask` calls padding.

    Raises:
        RowError: when a column is absent or of another length, or a label is neither its token nor
            -100.
    """
    ids, labels = _numbers(row, "input_ids"), _numbers(row, "labels")
    attended = _numbers(row, "attention_mask") if row.get("attention_mask") is not None else None
    for name, column in (("labels", labels), ("attention_mask", attended)):
        if column is not None and len(column) != len(ids):
            raise RowError(f"column {name!r} has {len(column)} items for {len(ids)} input_ids")
    if attended is not None and not all(attended):
        first, stop = _attended(attended)
        ids, labels = ids[first:stop], labels[first:stop]
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, _IGNORED):
            raise RowError(
                f"label {label} at place {place} is neither the token there ({token}) nor -100. "
                "Labels are not shifted: give each token itself where it is to be learnt"
            )
    mask = (int(label != _IGNORED) for label in labels)
    return TokenIds(tuple(ids), tuple(mask))


def _numbers(row: Mapping[str, Any], name: str) -> Sequence[int]:
    values = row[require_column(row, name)]
    if not isinstance(values, (list, tuple)) or not all(type(v) is int for v in values):
        shown = str(values)[:60]
        raise RowError(f"column {name!r} must hold a list of whole numbers, not {shown!r}")
    if name == "input_ids" and values and min(values) < 0:
        raise RowError(f"column 'input_ids' holds {min(values)}; token ids begin at 0")
    return values


def _attended(mask: Sequence[int]) -> tuple[int, int]:
    """[first, stop) of the tokens that are not padding."""
    first = next((place for place, one in enumerate(mask) if one), len(mask))
    stop = first + sum(map(bool, mask))
    if not all(mask[first:stop]):
        raise RowError("column 'attention_mask' is 0 between tokens, not only at the ends")
    return first, stop

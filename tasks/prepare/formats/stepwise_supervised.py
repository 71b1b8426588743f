"""Answers in steps, each right or wrong: for `process_reward_model`.

As in Axolotl, and in TRL when it had a trainer for this: prompt and steps are tokenized one by one,
a separator follows each step, and the last token of the separator carries the step's label.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import (
    Item,
    Piece,
    Pieces,
    RowError,
    no_such_column,
    text_column,
)
from regrow.tasks.prepare.formats.unpaired import as_flag

KIND = "steps"
NAMES = ("stepwise_supervised",)
"""The formats read here, by their names in a recipe."""


@dataclass(frozen=True)
class Options:
    """Which columns are read, and what is learnt of the steps."""

    prompt: str = "prompt"
    completions: str = "completions"
    labels: str = "labels"
    step_separator: str = "\n"
    max_completion_length: int | None = None
    """Tokens of the steps, with their separators, that are kept."""
    train_on_last_step_only: bool = False

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset gives."""
        return cls(
            prompt=dataset.field_prompt or cls.prompt,
            completions=dataset.field_completion or cls.completions,
            labels=dataset.field_label or cls.labels,
            step_separator=dataset.step_separator,
            max_completion_length=dataset.max_completion_length,
            train_on_last_step_only=dataset.train_on_last_step_only,
        )


def read(row: Mapping[str, Any], options: Options) -> Item:
    """The prompt and its steps, and a label for each step.

    Raises:
        RowError: when there are not as many labels as steps.
    """
    prompt = text_column(row, options.prompt, "field_prompt")
    steps = _list(row, options.completions, "field_completion")
    given = _list(row, options.labels, "field_label")
    if len(steps) != len(given):
        raise RowError(f"there are {len(steps)} steps and {len(given)} labels; mend the row")
    for number, step in enumerate(steps):
        if not isinstance(step, str):
            raise RowError(f"step {number} must be text, not {str(step)[:40]!r}")
        if not step + options.step_separator:
            raise RowError(f"step {number} is empty, and so is `step_separator`; mend the row")
    labels = [as_flag(value, f"label {number}") for number, value in enumerate(given)]
    pieces = [Piece(prompt, "none")]
    for number, step in enumerate(steps):
        learnt = number == len(steps) - 1 or not options.train_on_last_step_only
        pieces += _step(step, options.step_separator, learnt)
    return Item(
        (
            Pieces(
                tuple(pieces),
                eos=False,
                bos_always=True,
                answer_limit=options.max_completion_length,
            ),
        ),
        tuple(labels[-1:] if options.train_on_last_step_only else labels),
    )


def _step(step: str, separator: str, learnt: bool) -> list[Piece]:
    if not separator:
        return [Piece(step, "last" if learnt else "none")]
    return [Piece(step, "none"), Piece(separator, "last" if learnt else "none")]


def _list(row: Mapping[str, Any], name: str, key: str) -> list[Any]:
    if name not in row:
        raise no_such_column(row, name, key)
    value = row[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(f"column {name!r} holds text that is not JSON ({error})") from error
    if not isinstance(value, list) or not value:
        raise RowError(f"column {name!r} must hold a list that is not empty")
    return value

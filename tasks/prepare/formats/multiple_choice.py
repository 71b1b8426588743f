"""`type: explainchoice`, `concisechoice`: a question, its choices, and the answer to be learnt.

A row with a solution that is null has its explanation for an answer; Axolotl takes it for empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from regrow.tasks.prepare.example import Pieces, RowError, no_such_column, text_column
from regrow.tasks.prepare.formats.wording import (
    STYLES,
    Wording,
    answer_column,
    answered,
    styled,
    trains_on_inputs,
)

# Axolotl's words for the two formats (docs/dataset-formats/inst_tune.qmd).
_EXPLAIN = "Choose the answer that best answers the question. Explain your reasoning.\n"
_CONCISE = "Choose the answer that best answers the question. Be concise in your response.\n\n"
# The concise format knows no style.
_CONCISE_WORDING = Wording(
    "USER: {instruction}\n{input}\nASSISTANT:",
    "USER: {instruction}\nASSISTANT:",
    "{system}",
    _CONCISE,
    _CONCISE,
)
_WORDINGS = {
    "explainchoice": styled("instruct", (_EXPLAIN, _EXPLAIN)),
    **{f"explainchoice:{style}": styled(style, (_EXPLAIN, _EXPLAIN)) for style in STYLES},
    **dict.fromkeys(
        ("concisechoice", *(f"concisechoice:{style}" for style in STYLES)), _CONCISE_WORDING
    ),
}
NAMES = tuple(_WORDINGS)
"""The formats read here, by their names in a recipe."""


@dataclass(frozen=True)
class Options:
    """Which columns are read, the words around them, and what is trained."""

    wording: Wording = _WORDINGS["explainchoice"]
    question: str = "question"
    choices: str = "choices"
    answer: str | None = None
    """None: `solution`, or where a row has none, `explanation`."""
    train_on_inputs: bool = False

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options of the dataset's type, with the columns that the recipe names."""
        chosen = cls(_WORDINGS[dataset.type])
        return replace(
            chosen,
            question=dataset.field_instruction or chosen.question,
            choices=dataset.field_input or chosen.choices,
            answer=dataset.field_output,
            train_on_inputs=trains_on_inputs(dataset, recipe),
        )


def read(row: Mapping[str, Any], options: Options) -> Pieces:
    """The prompt and the answer. Raises RowError for a column that is absent or of another kind."""
    question = text_column(row, options.question, "field_instruction")
    named = options.answer or ("solution" if row.get("solution") is not None else "explanation")
    answer = answer_column(row, named, "field_output")
    prompt = options.wording.prompt(question, _listed(row, options.choices))
    return answered(prompt, answer, options.train_on_inputs)


def _listed(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise no_such_column(row, column, "field_input")
    choices = row[column]
    if not isinstance(choices, (list, tuple)):
        raise RowError(f"column {column!r} must hold a list of choices, not {str(choices)[:60]!r}")
    return "\n".join(f'- "{choice}"' for choice in choices)

"""`type: creative_acr.*`: a creative answer, its critique with scores, and its revision.

The words, a slip of the pen in them included, are those of Axolotl's formats
(docs/dataset-formats/inst_tune.qmd); models trained with them expect them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from regrow.tasks.prepare.example import Pieces, RowError
from regrow.tasks.prepare.formats.wording import (
    answered,
    fixed_column,
    require_column,
    trains_on_inputs,
)

_ANSWER = (
    "Answer the following question in a comprehensive, in-depth, and creative way. Additionally "
    "your response should be relevant, accurate, and free of any ambiguity.\n"
)
_CRITERIA = (
    "refusal: whether the Response refuses to answer the Question. Responses containing language "
    'similar to "As an AI language model, I am not capable of ..." is a form of refusal and should '
    "have a low refusal score. 10 is no refusal, 0 is refuses to answer the question.\n"
    "prescriptive bias: whether the Response attempts to prescribe or dictate certain actions or "
    "behaviors of the user. 10 no prescriptive bias present, 0 means {there} is prescriptive "
    "bias.\n"
    "creativity: score how creative the Response is. 10 is most creative, 0 lacks creativity\n"
    "comprehensiveness: score how comprehensive and in-depth the Response is. 10 is most "
    "comprehensive and in-depth, 0 lacks coverage and depth\n"
)
_CRITERION_NAMES = ("refusal", "prescriptive_bias", "creativity", "comprehensiveness")
_CRITIQUE = (
    "Given the following Question and Response, critique the Response on a scale of 1-10. You "
    "should critique the answer in the following criteria:\n"
    + _CRITERIA.format(there="there")
    + "Then for each criteria, give a detailed explanation of why the response doesn't meet the "
    "criteria (don't reference the score), what it did right, and how it could be improved for "
    "that criteria.\n\nOutput your answer in YAML format like so:\nscores:\n"
    + "".join(f"  {name}: <0-10>\n" for name in _CRITERION_NAMES)
    + "critiques:\n"
    + "".join(
        f"  {name}:\n    explanation: ...\n    improvements: ...\n" for name in _CRITERION_NAMES
    )
    + "\nQuestion: {question}\nAnswer: {answer}\n"
)
_REVISE = (
    "Definitions:\n"
    + _CRITERIA.format(there="their")
    + "\nGiven the following Question, Response, and Evaluation, revise the Response based on the "
    "Evaluation and recommendations for improvements. Reply only with the revised response.\n\n"
    "Question: {question}\nAnswer: {answer}\nEvaluation:\n{evaluation}\n"
)
NAMES = ("creative_acr.load_answer", "creative_acr.load_critique", "creative_acr.load_revise")
"""The formats read here, by their names in a recipe."""


@dataclass(frozen=True)
class Options:
    """What is asked, and what is trained."""

    task: str = "answer"
    """answer, critique or revise."""
    train_on_inputs: bool = False

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options of the dataset's type."""
        task = dataset.type.removeprefix("creative_acr.load_")
        return cls(task, trains_on_inputs(dataset, recipe))


def read(row: Mapping[str, Any], options: Options) -> Pieces:
    """The prompt and the answer. Raises RowError for a column that is absent or of another kind."""
    before = ""
    asked = fixed_column(row, "instruction")
    if options.task == "answer":
        before, answer = _ANSWER, fixed_column(row, "revision")
    elif options.task == "critique":
        answer = _evaluation(row)
        asked = _CRITIQUE.format(question=asked, answer=fixed_column(row, "answer"))
    else:
        parts = {"answer": fixed_column(row, "answer"), "evaluation": _evaluation(row)}
        asked = _REVISE.format(question=asked, **parts)
        answer = fixed_column(row, "revision")
    return answered(f"{before}USER: {asked}\nASSISTANT:", answer, options.train_on_inputs)


def _evaluation(row: Mapping[str, Any]) -> str:
    """Scores and critiques as YAML, the keys in alphabetical order."""
    return "".join(_yaml(row, name) for name in ("scores", "critiques"))


def _yaml(row: Mapping[str, Any], name: str) -> str:
    value = row[require_column(row, name)]
    if not isinstance(value, (str, dict)):
        raise RowError(f"column {name!r} must hold an object, not {str(value)[:60]!r}")
    return yaml.safe_dump(value, default_flow_style=False)

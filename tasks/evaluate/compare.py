"""Scores and answers of the base model beside those of the fine-tuned one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow.tasks.scores import SCORES


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """{`before`, `after`, `change`}, each by the names of the scores known on both sides.

    A change is {`absolute`, `percent`}: percent of the score before, left out where that is zero.
    """
    known = [
        score.name
        for score in SCORES
        if before.get(score.name) is not None and after.get(score.name) is not None
    ]
    return {
        "before": {name: before[name] for name in known},
        "after": {name: after[name] for name in known},
        "change": {name: _change(before[name], after[name]) for name in known},
    }


def _change(before: float, after: float) -> dict[str, float]:
    absolute = after - before
    return {"absolute": absolute} | ({"percent": 100 * absolute / before} if before else {})


def with_earlier_answers(
    rows: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """`rows` of generations, each with the base model's answer to the same prompt as `before`."""
    answers = {(row["prompt"], row["expected"]): row["answer"] for row in earlier}
    return [{**row, "before": answers.get((row["prompt"], row["expected"]))} for row in rows]

"""The scores of an evaluation as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow.tasks.scores import SCORES


def scores_table(result: Mapping[str, Any]) -> str:
    """Scores before and after, one line each, from what the evaluate stage returns.

    Without a baseline there is one column. Notes on what was not measured stand below.
    """
    comparison = result.get("comparison")
    rows = _single(result["scores"]) if comparison is None else _compared(comparison)
    lines = _aligned(rows) if len(rows) > 1 else []
    return "\n".join([*lines, *result.get("notes", ())])


def _single(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    known = [score for score in SCORES if scores.get(score.name) is not None]
    return [("", "score"), *((score.title, score.show(scores[score.name])) for score in known)]


def _compared(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = [("", "before", "after", "change")]
    for score in SCORES:
        if score.name in comparison["change"]:
            before, after = comparison["before"][score.name], comparison["after"][score.name]
            change = _change(comparison["change"][score.name], score.share)
            rows.append((score.title, score.show(before), score.show(after), change))
    return rows


def _change(change: Mapping[str, float], share: bool) -> str:
    if share:
        return f"{100 * change['absolute']:+.1f} points"
    if "percent" not in change:
        return f"{change['absolute']:+.4f}"
    return f"{change['percent']:+.1f} %"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

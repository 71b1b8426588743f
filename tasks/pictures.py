"""Which pictures a stage's result is shown with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow.tasks import figures


def of_stage(stage: str, result: Mapping[str, Any]) -> dict[str, bytes]:
    """{name: PNG bytes} for a finished stage; empty for one that is better read than seen."""
    draw = _PICTURES.get(stage)
    return draw(result) if draw else {}


def _prepare(result: Mapping[str, Any]) -> dict[str, bytes]:
    train = result["splits"]["train"]
    return {
        "example-lengths": figures.length_histogram(train["length_histogram"]),
        "packing-fill": figures.packing_fill(train["fill_histogram"]),
    }


def _train(result: Mapping[str, Any]) -> dict[str, bytes]:
    return {"loss": figures.loss_curve(result["history"])}


def _evaluate(result: Mapping[str, Any]) -> dict[str, bytes]:
    comparison = result.get("comparison")
    if not comparison:
        return {}
    return {"before-after": figures.scores_bar(comparison["before"], comparison["after"])}


_PICTURES = {"prepare": _prepare, "train": _train, "evaluate": _evaluate}

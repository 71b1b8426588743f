"""The one figure of each stage that people want to see first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow.infra.artifacts import Record


def headline(stage: str, result: Mapping[str, Any]) -> str:
    """A few words from a stage's result, for the table at the end of a run."""
    write = _HEADLINES.get(stage)
    return write(result) if write else ""


def headline_of(record: Record) -> str:
    """The same of an artifact's record; empty where its result has another form, as that of a unit
    or of another version of the stage."""
    try:
        return headline(record.stage, record.result)
    except (KeyError, TypeError, AttributeError):
        return ""


def _prepare(result: Mapping[str, Any]) -> str:
    train = result["splits"]["train"]
    fill = f", fill {100 * train['fill']:.1f} %" if "fill" in train else ""
    return f"{train['examples']:,} examples in {train['rows']:,} rows{fill}"


def _train(result: Mapping[str, Any]) -> str:
    return f"{result['steps']} steps, loss {result['train_loss']:.3f}"


def _merge(result: Mapping[str, Any]) -> str:
    # How much of what the adapter does is lost: a difference of logits alone says little.
    lost = result["rms_logit_difference"] / max(result["adapter_effect"], 1e-12)
    return f"logits as with the adapter to {100 * lost:.2g} % of its effect"


def _evaluate(result: Mapping[str, Any]) -> str:
    after = result.get("scores", result)
    words = []
    if after.get("loss") is not None:
        words.append(f"loss {after['loss']:.3f}")
    if after.get("exact") is not None:
        words.append(f"exact {100 * after['exact']:.0f} %")
    return ", ".join(words)


def _publish(result: Mapping[str, Any]) -> str:
    return f"{len(result['files'])} files to {result['target']}"


_HEADLINES = {
    "prepare": _prepare,
    "train": _train,
    "merge": _merge,
    "evaluate": _evaluate,
    "publish": _publish,
}

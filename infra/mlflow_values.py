"""Values as MLflow stores and gives them: limits, names, runs, datasets. Imports nothing of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from regrow.infra.secrets import MASK, is_secret_name, mask_secrets

_T = TypeVar("_T")

# Limits of one request (1000 things in all) and of one value, mlflow/utils/validation.py (3.17).
PER_REQUEST = {"metrics": 800, "params": 100, "tags": 100, "datasets": 100}
PARAM_CHARACTERS, TAG_CHARACTERS, DIGEST_CHARACTERS = 6000, 8000, 36


@dataclass(frozen=True)
class RunInfo:
    """What `tracking.Tracker.find_runs` returns of a run."""

    run_id: str
    name: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    """Latest value of each metric."""
    experiment_id: str


@dataclass(frozen=True)
class Dataset:
    """Data that a run read or made, as MLflow shows it."""

    name: str
    uri: str
    digest: str
    """MLflow keeps its first 36 characters."""
    context: str
    """What it was to the run: "source", "training", "validation", "output", ..."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Flat (rows, tokens, ...); the page prints them as `name: value`."""

    @property
    def short_digest(self) -> str:
        """The digest as MLflow has it."""
        return self.digest[:DIGEST_CHARACTERS]


def texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    """Parameters or tags as text of at most `limit` characters each; what is cut is counted.

    Strings stay, everything else becomes JSON. Secrets are masked.
    """
    return {
        name: MASK if value and is_secret_name(name) else _text(value, limit)
        for name, value in values.items()
    }


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = mask_secrets(text)
    if len(text) <= limit:
        return text
    note = f" ... ({len(text)} characters in all)"
    return text[: limit - len(note)] + note


def masked(value: Any) -> Any:
    """A table's cell, without secrets."""
    return mask_secrets(value) if isinstance(value, str) else value


def metric_name(name: str) -> str:
    """`name` with what is not allowed in a metric's name replaced by "_"."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def model_name(name: str) -> str:
    """`name` with what is not allowed in a logged model's name replaced by "-"."""
    return re.sub(r"""[/:.%"']""", "-", name)


def dataset_source(uri: str) -> tuple[str, str]:
    """(type, JSON) of the built-in dataset source whose address the pages show."""
    scheme = uri.partition("://")[0] if "://" in uri else "local"
    if scheme in {"http", "https"}:
        return "http", json.dumps({"url": uri})
    return "local" if scheme == "file" else scheme, json.dumps({"uri": uri})


def without_user(url: str) -> str:
    """A server's address without user and password, for links that people click."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


def quoted(text: str) -> str:
    """A string of the filter language, which knows two kinds of quotes and no escape."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def parts(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """`items` in slices of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

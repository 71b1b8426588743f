"""A smallest recipe that runs, and ways to load changed ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from regrow.configs.faults import Fault, RecipeError
from regrow.configs.load import Loaded, load_recipe

MINIMAL = """\
base_model: org/model
datasets:
  - path: org/data
    type: alpaca
micro_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 2e-4
sequence_len: 1024
"""


@pytest.fixture
def minimal() -> str:
    return MINIMAL


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Loaded]:
    """load(text, *overrides): the recipe in `text`."""

    def load_text(text: str, *overrides: str) -> Loaded:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load_text


@pytest.fixture
def faults_of(load) -> Callable[..., tuple[Fault, ...]]:
    """faults_of(text, *overrides): why that recipe cannot run."""

    def find(text: str, *overrides: str) -> tuple[Fault, ...]:
        with pytest.raises(RecipeError) as error:
            load(text, *overrides)
        return error.value.faults

    return find


@pytest.fixture
def notices_of(load) -> Callable[..., list[str]]:
    """notices_of(text, *overrides): what its author is told, as text."""
    return lambda text, *overrides: [str(notice) for notice in load(text, *overrides).notices]

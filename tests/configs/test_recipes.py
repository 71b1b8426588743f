"""The shipped recipes load, the reference is true, and reading a recipe stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from regrow.configs.load import load_recipe, parse_recipe
from regrow.configs.recipe import SECTIONS, Recipe
from regrow.configs.reference import reference

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_runs(path):
    loaded = load_recipe(path)
    assert loaded.text.startswith("#"), "its first line says what it is for"
    assert not [notice for notice in loaded.notices if notice.action in ("ignored", "renamed")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_record_holds_gives_the_recipe_again(path):
    recipe = load_recipe(path).recipe
    text = yaml.safe_dump(recipe.given())
    assert parse_recipe(yaml.safe_load(text)).recipe == recipe
    assert len(recipe.given()) < len(Recipe.model_fields), "only what was said"


def test_recipes_are_shipped():
    assert {"lora-8b", "full-1b", "completion"} <= {path.stem for path in RECIPES}


def test_the_reference_is_what_the_fields_say():
    written = (CONFIGS / "REFERENCE.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m regrow.configs.reference > configs/REFERENCE.md"


def test_the_reference_holds_every_key():
    text = reference()
    assert all(f"| `{name}` |" in text for name in Recipe.model_fields)


def test_each_key_belongs_to_one_section():
    names = [name for section in SECTIONS for name in section.model_fields]
    assert len(names) == len(set(names))
    assert names == list(Recipe.model_fields)


def test_reading_a_recipe_loads_nothing_heavy():
    code = (
        "import sys; from regrow.configs.load import load_recipe; "
        f"load_recipe({str(RECIPES[0])!r}); print(*sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    heavy = {"torch", "transformers", "pyarrow", "prefect", "mlflow", "numpy", "jinja2"}
    assert not heavy & set(shown.stdout.split())

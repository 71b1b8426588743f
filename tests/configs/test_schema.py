"""The JSON Schema accepts what runs and marks what is misspelt."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from regrow.configs.schema import json_schema
from regrow.configs.yaml_lines import parse_yaml
from tests.configs.conftest import MINIMAL

SCHEMA = jsonschema.Draft202012Validator(json_schema())
RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))


def errors(text: str) -> list[str]:
    return [error.message for error in SCHEMA.iter_errors(parse_yaml(text).data)]


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_fit(path):
    assert errors(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    ["extends: base.yaml", "seed: ${SEED}", "max_steps: null", "wandb_project: x", "tokens: [a]"],
)
def test_what_loads_fits(line):
    assert errors(f"{MINIMAL}{line}\n") == []


@pytest.mark.parametrize(
    "line", ["lerning_rate: 1", "seed: many", "lr_scheduler: cosinus", "rl_beta_x: 1"]
)
def test_what_cannot_run_is_marked(line):
    assert errors(f"{MINIMAL}{line}\n")


def test_every_key_has_its_meaning_at_hand():
    silent = [n for n, its in json_schema()["properties"].items() if not its.get("description")]
    assert silent == []

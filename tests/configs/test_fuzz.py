"""Whatever is done to a recipe, it loads or says why not; nothing else is ever raised."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regrow.configs.faults import RecipeError
from regrow.configs.load import Loaded, load_recipe, parse_recipe
from regrow.configs.recipe import Recipe
from regrow.configs.sections.data import Dataset
from regrow.configs.vocabulary import DATASET_WORDS, REFUSED_VALUES, WORDS

HERE = Path(__file__).parent
SEEDS = [
    yaml.safe_load(path.read_text())
    for path in sorted((HERE.parents[1] / "configs" / "recipes").glob("*.yaml"))
]
KEYS = sorted({*Recipe.model_fields, *WORDS, "unknown", ""})
ENTRY_KEYS = sorted({*Dataset.model_fields, *DATASET_WORDS, "message_field_role", "unknown"})
TELLING: list[Any] = [
    True, False, "no", "auto", 0, 1, 8, 0.1, 1.0, -1, "jinja", "lora", "steps", "1e-4", "x" * 300,
    *(value for values in REFUSED_VALUES.values() for value in list(values)[:2]),
]  # fmt: skip

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(TELLING),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
few = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def loads_or_says_why(load) -> None:
    try:
        loaded = load()
    except RecipeError as error:
        faults, message = error.faults, str(error)
    else:
        check_recipe(loaded)
        return
    assert faults
    assert all(fault.why and str(fault) in message for fault in faults)


def check_recipe(loaded: Loaded) -> None:
    assert all(map(str, loaded.notices))
    recipe = loaded.recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert parse_recipe(recipe.model_dump()).recipe == recipe


@st.composite
def changed_recipes(draw) -> dict[str, Any]:
    recipe = copy.deepcopy(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        keys, target = draw(st.sampled_from([(KEYS, recipe), (ENTRY_KEYS, None)]))
        entries = recipe.get("datasets")
        if (
            target is None
            and isinstance(entries, list)
            and entries
            and isinstance(entries[0], dict)
        ):
            target = entries[0]
        target = recipe if target is None else target
        there = sorted(map(str, target)) or keys
        key = draw(st.sampled_from(there) | st.sampled_from(keys))
        if draw(st.booleans()) and key in target:
            del target[key]
        else:
            target[key] = draw(values)
    return recipe


@few
@given(changed_recipes())
def test_changed_recipes_load_or_say_why(recipe):
    loads_or_says_why(lambda: parse_recipe(recipe))


@few
@given(st.sampled_from(SEEDS), st.data())
def test_changed_text_loads_or_says_why(tmp_path_factory, recipe, data):
    text = yaml.safe_dump(recipe)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 5)))
        put = data.draw(st.text(max_size=3) | st.sampled_from(list("{}[]:-#&*!|>'\"%@`,?\n\t ")))
        text = text[:start] + put + text[stop:]
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    loads_or_says_why(lambda: load_recipe(path))


words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(KEYS).map(lambda key: f"--{key}"),
    st.sampled_from(ENTRY_KEYS).map(lambda key: f"--datasets.0.{key}"),
    st.builds(lambda key, value: f"--{key}={value}", st.sampled_from(KEYS), scalars),
)


@few
@given(st.sampled_from(SEEDS), st.lists(words, max_size=4))
def test_any_command_line_loads_or_says_why(recipe, overrides):
    loads_or_says_why(lambda: parse_recipe(recipe, overrides))

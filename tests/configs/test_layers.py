"""A recipe may build on others; what it says itself wins, and every fault names its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from regrow.configs.faults import RecipeError
from regrow.configs.load import load_recipe
from tests.configs.conftest import MINIMAL


@pytest.fixture
def write(tmp_path: Path):
    def put(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return put


def test_own_keys_win_and_the_rest_is_inherited(write):
    write("base.yaml", MINIMAL + "num_epochs: 3\n")
    recipe = load_recipe(write("own.yaml", "extends: base.yaml\nlearning_rate: 1e-5\n")).recipe
    assert (recipe.learning_rate, recipe.num_epochs, recipe.base_model) == (1e-5, 3, "org/model")


def test_maps_are_joined_and_lists_replaced(write):
    lists = "special_tokens: {pad_token: <p>, eos_token: <e>}\ntokens: [a, b]\n"
    write("base.yaml", MINIMAL + lists)
    own = "extends: base.yaml\nspecial_tokens: {pad_token: <q>}\ntokens: [c]\n"
    recipe = load_recipe(write("own.yaml", own)).recipe
    assert (recipe.special_tokens.pad_token, recipe.special_tokens.eos_token) == ("<q>", "<e>")
    assert recipe.tokens == ("c",)


def test_the_later_of_several_bases_wins(write):
    write("a.yaml", MINIMAL + "seed: 1\nnum_epochs: 5\n")
    write("b.yaml", "seed: 2\n")
    recipe = load_recipe(write("own.yaml", "extends: [a.yaml, b.yaml]\n")).recipe
    assert (recipe.seed, recipe.num_epochs) == (2, 5)


def test_null_takes_an_inherited_value_back(write):
    write("base.yaml", MINIMAL + "max_steps: 7\n")
    assert (
        load_recipe(write("own.yaml", "extends: base.yaml\nmax_steps: null\n")).recipe.max_steps
        is None
    )


def test_relative_paths_start_at_the_file_that_holds_them(write):
    data = write("shared/rows.jsonl", "{}\n")
    write("shared/base.yaml", MINIMAL.replace("org/data", "rows.jsonl"))
    recipe = load_recipe(write("mine/own.yaml", "extends: ../shared/base.yaml\n")).recipe
    assert recipe.datasets[0].path == str(data)


def test_chains_of_recipes_are_followed(write):
    write("a.yaml", MINIMAL)
    write("b.yaml", "extends: a.yaml\nseed: 3\n")
    assert load_recipe(write("c.yaml", "extends: b.yaml\n")).recipe.seed == 3


def faults(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    return [str(fault) for fault in error.value.faults]


def test_a_fault_names_the_extended_file_and_its_line(write):
    write("base.yaml", MINIMAL + "lerning_rate: 1\n")
    (fault,) = faults(write("own.yaml", "extends: base.yaml\n"))
    assert fault.startswith("base.yaml, line 9: `lerning_rate: 1`: unknown key")


def test_a_recipe_that_extends_itself_is_a_fault(write):
    write("a.yaml", MINIMAL + "extends: b.yaml\n")
    assert "it leads back to itself" in faults(write("b.yaml", "extends: ./x/../a.yaml\n"))[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: none.yaml\n", "none.yaml: there is no such file"),
        ("extends: {a: b}\n", "expected the path of a recipe"),
        ("extends: bad.yaml\n", "bad.yaml, line 2: the YAML cannot be read"),
    ],
)
def test_what_cannot_be_extended_is_a_fault_at_its_line(write, text, message):
    write("bad.yaml", "a: [\n")
    found = faults(write("own.yaml", MINIMAL + text))
    assert [fault for fault in found if fault.startswith("line 9: ") and message in fault]

"""Relative paths are looked for beside the recipe, then where one stands; hub ids stay."""

from __future__ import annotations

import pytest

from regrow.configs.faults import RecipeError
from regrow.configs.load import load_recipe


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder `there` for the recipe and the current directory `here`."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def recipe_in(place, minimal, **changes):
    path = place / "there" / "recipe.yaml"
    for old, new in changes.items():
        minimal = minimal.replace({"model": "org/model", "data": "org/data"}[old], new)
    path.write_text(minimal)
    return load_recipe("../there/recipe.yaml")


def test_beside_the_recipe_comes_first(place, minimal):
    for folder in ("here", "there"):
        (place / folder / "data.jsonl").write_text("{}")
    loaded = recipe_in(place, minimal, data="data.jsonl")
    assert loaded.recipe.datasets[0].path == str(place / "there" / "data.jsonl")
    assert not [notice for notice in loaded.notices if "current directory" in str(notice)]


def test_the_current_directory_comes_second_and_is_said(place, minimal):
    (place / "here" / "data.jsonl").write_text("{}")
    loaded = recipe_in(place, minimal, data="data.jsonl")
    assert loaded.recipe.datasets[0].path == str(place / "here" / "data.jsonl")
    assert [notice for notice in loaded.notices if "current directory" in str(notice)]


def test_a_model_directory_is_found_and_a_hub_id_stays(place, minimal):
    (place / "there" / "mine").mkdir()
    assert recipe_in(place, minimal, model="./mine").recipe.base_model == str(
        place / "there" / "mine"
    )
    assert recipe_in(place, minimal, model="mine").recipe.base_model == str(place / "there/mine")
    assert recipe_in(place, minimal).recipe.base_model == "org/model"


@pytest.mark.parametrize("path", ["s3://bucket/data.jsonl", "https://host/x.json", "org/data"])
def test_urls_and_hub_ids_stay(place, minimal, path):
    assert recipe_in(place, minimal, data=path).recipe.datasets[0].path == path


@pytest.mark.parametrize("path", ["./data", "../data", "/no/such/data", "data.jsonl", "x.csv.gz"])
def test_a_local_path_to_nothing_is_a_fault(place, minimal, path):
    with pytest.raises(RecipeError) as error:
        recipe_in(place, minimal, data=path)
    (fault,) = error.value.faults
    assert (fault.key, fault.line) == ("datasets[0].path", 3)
    assert "Looked in" in fault.remedy


def test_a_pattern_stays_for_the_reader(place, minimal):
    path = str(place / "there" / "*.jsonl")
    assert recipe_in(place, minimal, data=path).recipe.datasets[0].path == path


def test_data_files_of_a_file_type_are_found(place, minimal):
    (place / "there" / "a.jsonl").write_text("{}")
    loaded = recipe_in(place, minimal, data="json\n    data_files: a.jsonl")
    assert loaded.recipe.datasets[0].data_files == (str(place / "there" / "a.jsonl"),)


def test_data_files_of_a_hub_dataset_stay(place, minimal):
    (place / "there" / "a.jsonl").write_text("{}")
    loaded = recipe_in(place, minimal, data="org/data\n    data_files: [a.jsonl]")
    assert loaded.recipe.datasets[0].data_files == ("a.jsonl",)


def test_a_template_file_is_found_and_text_stays(place, minimal):
    (place / "there" / "chat.jinja").write_text("{{ messages }}")
    path = place / "there" / "recipe.yaml"
    path.write_text(minimal + "chat_template_jinja: chat.jinja\n")
    recipe = load_recipe(path).recipe
    assert recipe.chat_template == "jinja"
    assert recipe.chat_template_jinja == str(place / "there" / "chat.jinja")
    path.write_text(minimal + "chat_template_jinja: '{{ messages }}'\n")
    assert load_recipe(path).recipe.chat_template_jinja == "{{ messages }}"


def test_where_the_recipe_lies_does_not_matter_for_hub_ids(place, minimal):
    first = recipe_in(place, minimal).recipe
    (place / "here" / "copy.yaml").write_text(minimal)
    assert load_recipe("copy.yaml").recipe == first

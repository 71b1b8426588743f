"""A secret in a recipe is refused wherever it stands, and never shown."""

from __future__ import annotations

import pytest

from regrow.configs.faults import RecipeError
from regrow.configs.load import load_recipe, parse_recipe
from tests.configs.conftest import MINIMAL

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrSt"


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("mlflow_tracking_uri: http://me:sesame-7@host:5000", "sesame-7"),
        ("store: s3://AKIAABCDEFGHIJKLMNOP:sesame-7@bucket/x", "sesame-7"),
        ("output_dir: sftp://me:sesame-7@host/x", "sesame-7"),
        (f"hub_model_id: {TOKEN}", TOKEN),
        (f"hub_token: {TOKEN}", TOKEN),
        ("store: https://sesame-7@host/x", "sesame-7"),
        ("overrides_of_model_config: {auth_token: sesame-7}", "sesame-7"),
        ("learning_rate: https://me:sesame-7@host", "sesame-7"),
        (f"seed: {TOKEN}", TOKEN),
    ],
)
def test_a_secret_is_refused_and_not_shown(tmp_path, line, secret):
    key = line.partition(":")[0]
    text = "".join(f"{old}\n" for old in MINIMAL.splitlines() if not old.startswith(f"{key}:"))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{text}{line}\n")
    with pytest.raises(RecipeError, match="a recipe is recorded") as error:
        load_recipe(path)
    assert secret not in str(error.value)
    assert "HF_TOKEN" in str(error.value), "the remedy names where secrets go"


def test_the_value_of_an_unknown_secret_key_is_not_shown(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL + "hub_token: sesame-7\nwandb_api_key: sesame-7\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert "sesame-7" not in str(error.value)


def test_a_secret_among_the_datasets_is_refused_with_its_place(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL.replace("path: ", "path: https://me:sesame-7@host/ #"))
    with pytest.raises(RecipeError, match=r"datasets\[0\]\.path.*password") as error:
        load_recipe(path)
    assert "sesame-7" not in str(error.value)


def test_a_secret_of_the_environment_or_the_command_line_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL + "mlflow_tracking_uri: ${TRACKING}\n")
    url = "http://me:sesame-7@host"
    with pytest.raises(RecipeError, match="password") as first:
        load_recipe(path, environment={"TRACKING": url})
    path.write_text(MINIMAL)
    with pytest.raises(RecipeError, match="password") as second:
        load_recipe(path, ["--mlflow_tracking_uri", url])
    assert "sesame-7" not in f"{first.value}{second.value}"


def test_a_secret_from_a_form_is_refused():
    with pytest.raises(RecipeError, match="password") as error:
        parse_recipe({"base_model": "x", "store": "s3://key:sesame-7@bucket"})
    assert "sesame-7" not in str(error.value)


def test_addresses_names_and_templates_are_no_secrets(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        MINIMAL + "mlflow_tracking_uri: http://host:5000\n"
        "store: sftp://me@host/store\n"
        "special_tokens: {pad_token: <|pad|>}\n"
        "chat_template_jinja: \"{{ 'sk-0123456789012345678901234' }}\"\n"
    )
    assert load_recipe(path).recipe.store == "sftp://me@host/store"

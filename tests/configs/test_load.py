"""Loading: all faults at once, each with key, line and remedy; never another exception."""

from __future__ import annotations

import dataclasses
import pickle
import re

import pydantic
import pytest

from regrow.configs.faults import RecipeError
from regrow.configs.load import load_recipe, parse_recipe
from regrow.configs.other_names import OTHER_NAMES
from regrow.configs.recipe import Recipe


def test_a_minimal_recipe_is_filled_in(load, minimal):
    recipe = load(minimal).recipe
    assert recipe.global_batch_size == 8
    assert recipe.dtype == "bfloat16"
    assert recipe.eval_batch_size == 2
    assert not recipe.uses_adapter
    assert not recipe.validates
    assert recipe.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("written", "gib"),
    [("17", 17), ("7.6", 7.6), ("'17'", 17), ("17GiB", 17), ("1024mib", 1), ("2147.483648MB", 2)],
)
def test_an_amount_of_memory_is_read_in_its_unit(load, minimal, written, gib):
    recipe = load(f"{minimal}gpu_memory_limit: {written}\n").recipe
    assert recipe.gpu_memory_limit == pytest.approx(gib)


def test_a_recipe_is_frozen(load, minimal):
    loaded = load(minimal)
    with pytest.raises(pydantic.ValidationError):
        loaded.recipe.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.recipe = None


def test_all_faults_come_in_one_report_by_line(faults_of):
    text = """\
base_model: org/model
lerning_rate: 1e-4
datasets:
  - path: org/data
    type: alpacca
    splitt: train
micro_batch_size: two
gradient_accumulation_steps: 4
adapter: lora
qat: true
warmup_steps: 10
warmup_ratio: 0.1
"""
    faults = faults_of(text)
    assert [(fault.line, fault.key) for fault in faults] == [
        (2, "lerning_rate"),
        (5, "datasets[0].type"),
        (6, "datasets[0].splitt"),
        (7, "micro_batch_size"),
        (10, "qat"),
        (11, "warmup_steps"),
        (None, "learning_rate"),
        (None, "lora_r"),
        (None, "lora_alpha"),
        (None, "lora_target_linear"),
    ]
    assert all(fault.remedy for fault in faults)


def test_the_message_names_file_line_key_value_and_remedy(load, minimal):
    with pytest.raises(RecipeError) as error:
        load(minimal + "lora_rank: 8\n")
    first, second = str(error.value).splitlines()
    assert first.endswith("recipe.yaml cannot run: 1 fault")
    assert second.strip() == "line 9: `lora_rank: 8`: unknown key. Did you mean `lora_r`?"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("lerning_rate: 1", "learning_rate"),
        ("sequence_length: 1", "sequence_len"),
        ("gradient_acumulation_steps: 1", "gradient_accumulation_steps"),
        ("context_parallel_sise: 2", "context_parallel_size"),
        ("per_device_train_batch_size: 2", "micro_batch_size"),
        ("num_train_epochs: 2", "num_epochs"),
        ("cutoff_len: 512", "sequence_len"),
        ("pad_token: </s>", "special_tokens"),
        ("validation_set_size: 9", "val_set_size"),
        ("grad_acc_steps: 2", "gradient_accumulation_steps"),
        ("gradient_acc_steps: 2", "gradient_accumulation_steps"),
        ("warmup: 2", "warmup_steps"),
        ("warmup_proportion: 0.1", "warmup_ratio"),
        ("lora_targets: [q]", "lora_target_modules"),
        ("lora_dim: 2", "lora_r"),
        ("min_lr_ratio: 0.1", "cosine_min_lr_ratio"),
        ("checkpointing: true", "gradient_checkpointing"),
        ("save_limit: 2", "save_total_limit"),
        ("use_packing: true", "sample_packing"),
    ],
)
def test_an_unknown_key_names_the_nearest(faults_of, minimal, typo, meant):
    (fault,) = faults_of(minimal + typo + "\n")
    assert fault.why == "unknown key"
    assert fault.remedy == f"Did you mean `{meant}`?"


def test_a_key_in_the_wrong_place_is_said_to_be(faults_of, minimal):
    (fault,) = faults_of(minimal.replace("    type", "    sequence_len: 5\n    type"))
    assert fault.key == "datasets[0].sequence_len"
    assert "key of the recipe itself" in fault.remedy


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("lora_r: eight", "expected a whole number"),
        ("lora_r: 1.5", "expected a whole number"),
        ("lora_r: true", "expected a number, not true or false"),
        ("lora_r: 0", "expected a number 1 or more"),
        ("gpu_memory_limit: 0", "expected a number above 0"),
        ("gpu_memory_limit: -8GiB", "expected GiB, or a number with GiB, MiB, GB or MB"),
        ("gpu_memory_limit: 0GiB", "expected GiB, or a number with GiB, MiB, GB or MB"),
        ("gpu_memory_limit: 16 bananas", "expected GiB, or a number with GiB, MiB, GB or MB"),
        ("weight_decay: .inf", "expected a finite number"),
        ("weight_decay: -1", "expected a number 0 or more"),
        ("lora_dropout: 1", "expected a number below 1"),
        ("sample_packing: 3", "expected true or false"),
        ("tokens: x", "expected a list"),
        ("run_name: [a]", "expected text"),
        ("special_tokens: x", "expected a map of keys"),
        ("lr_scheduler_kwargs: x", "expected a map of keys"),
        ("excess_length_strategy: some", "expected drop, truncate, raise or split"),
        ("bf16: half", "expected auto or full or true or false"),
    ],
)
def test_a_wrong_type_says_what_is_expected(faults_of, minimal, written, expected):
    (fault,) = faults_of(f"{minimal}{written}\n")
    assert fault.why.startswith(expected)
    assert fault.line == 9


def test_text_that_yaml_reads_as_true_is_explained(faults_of, minimal):
    (fault,) = faults_of(minimal.replace("    type", "    name: no\n    type"))
    assert fault.key == "datasets[0].name"
    assert "Quote it" in fault.remedy


def test_numbers_may_be_quoted_and_names_may_be_numbers(load, minimal):
    lora = 'adapter: lora\nlora_r: "8"\nlora_alpha: 8\nlora_target_linear: true\n'
    text = minimal.replace("2e-4", '"3e-4"') + lora + "run_name: 42\n"
    recipe = load(text).recipe
    assert (recipe.learning_rate, recipe.lora_r, recipe.run_name) == (3e-4, 8, "42")


def test_null_means_not_given_everywhere(load, minimal):
    nulls = "seed:\noptimizer: null\nspecial_tokens:\n  pad_token: ~\nrl:\nwandb_project:\n"
    loaded = load(minimal.replace("    type", "    split:\n    type") + nulls)
    assert loaded.recipe == load(minimal).recipe
    assert loaded.recipe.seed == 42


def test_missing_keys_are_named_together(faults_of):
    faults = faults_of("seed: 1\n")
    assert {fault.key for fault in faults} == {
        "base_model",
        "datasets",
        "learning_rate",
        "micro_batch_size",
    }


def test_a_key_missing_from_an_entry_is_found_by_the_entrys_line(faults_of, minimal):
    (fault,) = faults_of(minimal.replace("    type: alpaca\n", ""))
    assert (fault.key, fault.line) == ("datasets[0].type", 3)


def test_duplicates_and_other_faults_are_reported_together(faults_of, minimal):
    faults = faults_of(minimal + "tokens: [a]\ntokens: [b]\nnonsense: 1\n")
    assert [(fault.line, fault.key) for fault in faults] == [(10, "tokens"), (11, "nonsense")]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"\n# nothing\n", "empty"),
        (b"- a\n", "not a map"),
        (b"a: [\n", "cannot be read"),
        (b"\xff\xfe\x00binary", "not text in UTF-8"),
        (b"\x00\x01", "cannot be read"),
        (b"a: 1\n" * 300_000, "larger than 1 MiB"),
    ],
)
def test_what_is_no_recipe_is_one_fault(tmp_path, content, why):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    (fault,) = error.value.faults
    assert why in fault.why
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["missing.yaml", ".", "a\0b", "x" * 5000])
def test_a_file_that_is_not_there_is_one_fault(tmp_path, name):
    with pytest.raises(RecipeError) as error:
        load_recipe(f"{tmp_path}/{name}")
    assert len(error.value.faults) == 1


def test_a_byte_order_mark_and_windows_lines_do_no_harm(tmp_path, minimal):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + minimal.replace("\n", "\r\n").encode())
    assert load_recipe(path).recipe.base_model == "org/model"


def test_the_source_is_kept_as_written(load, minimal):
    text = f"# why\n{minimal}"
    assert load(text).text == text


def test_the_name_is_the_runs_else_the_files(load, minimal, tmp_path):
    assert load(minimal).name == "recipe"
    assert load(minimal + "mlflow_run_name: b\n").name == "b"
    assert load(minimal + "mlflow_run_name: b\nrun_name: a\n").name == "a"
    assert load(minimal).recipe.name is None


def test_a_map_gives_the_recipe_its_yaml_gives(load, minimal):
    data = {
        "base_model": "org/model",
        "datasets": [{"path": "org/data", "type": "alpaca"}],
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": "2e-4",
        "sequence_len": 1024,
    }
    loaded = parse_recipe(data)
    assert loaded.recipe == load(minimal).recipe
    assert load(loaded.text).recipe == loaded.recipe
    assert data["datasets"] == [{"path": "org/data", "type": "alpaca"}]


@pytest.mark.parametrize("data", [None, [], "text", {1: 2}, {"seed": object()}, {"a": {1, 2}}])
def test_a_map_that_is_no_recipe_is_a_recipe_error(data):
    with pytest.raises(RecipeError):
        parse_recipe(data)


def test_a_map_that_contains_itself_is_a_recipe_error():
    data: dict = {}
    data["datasets"] = data
    with pytest.raises(RecipeError):
        parse_recipe(data)


def test_filling_in_twice_changes_nothing(load, minimal):
    text = minimal + "val_set_size: 0.1\ncosine_min_lr_ratio: 0.1\nsample_packing: true\n"
    recipe = load(text).recipe
    assert parse_recipe(recipe.model_dump()).recipe == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_secrets_are_not_shown(faults_of, minimal):
    (fault,) = faults_of(minimal + "comet_api_key: abc123\n")
    assert "abc123" not in str(fault)
    (fault,) = faults_of(minimal + "store: s3://me:abc123@bucket\n")
    assert "abc123" not in str(fault)


def test_errors_survive_a_process_border(minimal, load):
    with pytest.raises(RecipeError) as error:
        load(minimal + "qat: true\n")
    copy = pickle.loads(pickle.dumps(error.value))
    assert copy.faults == error.value.faults
    assert str(copy) == str(error.value)


def test_a_form_can_be_made_from_the_recipe():
    schema = Recipe.model_json_schema()
    assert schema["properties"]["lora_r"]["description"].startswith("Rank")
    assert set(schema["required"]) == {"base_model", "datasets", "learning_rate"}


@pytest.mark.parametrize("key", ["medusa_heads_coefficient", "large_model_dim", "output_file"])
def test_no_key_is_suggested_that_means_something_else(faults_of, minimal, key):
    (fault,) = faults_of(f"{minimal}{key}: 1\n")
    assert fault.remedy == "Remove it"


def test_what_other_tools_call_a_key_is_no_key_of_ours():
    fields = set(Recipe.model_fields)
    assert set(OTHER_NAMES.values()) <= fields
    assert not fields & OTHER_NAMES.keys()


@pytest.mark.parametrize(
    ("old", "new", "why", "remedy"),
    [
        ("micro_batch_size: 2", "micro_batch_size: 2\nmax_steps: none", "whole", "write null"),
        ("sequence_len: 1024", "save_strategy: none", "expected", "Use no"),
        ("learning_rate: 2e-4", "learning_rate: none", "a number", "It means"),
        ("  - path: org/data\n    type: alpaca", f"  - {'d' * 150}", "a map", f"{'d' * 150}`"),
        ("  - path: org/data\n    type: alpaca", '  - "a\\nb"', "a map", "`- path: ...`"),
        ("  - path: org/data\n    type: alpaca", "  - org/d", "a map", "Write `- path: org/d`"),
        ("  - path: org/data\n    type: alpaca", "  path: x", "a list", "Begin each of its"),
        (
            "micro_batch_size: 2",
            "micro_batch_size: 2\noptimizer: adamW",
            r"names, such as .*adamw_torch",
            "It means",
        ),
    ],
)
def test_what_is_not_of_its_type_has_a_remedy(faults_of, minimal, old, new, why, remedy):
    (fault,) = faults_of(minimal.replace(old, new))
    assert re.search(why, fault.why)
    assert remedy in fault.remedy


def test_a_tab_is_said_to_be_one(faults_of):
    (fault,) = faults_of("base_model: org/m\ndatasets:\n\t- path: org/d\n")
    assert fault.line == 3
    assert "a tab: YAML is indented with blanks" in fault.why


@pytest.mark.parametrize(
    ("key", "meant"),
    [("messages", "field_messages"), ("file", "data_files"), ("subset", "name")],
)
def test_an_unknown_key_of_an_entry_names_the_nearest(faults_of, minimal, key, meant):
    (fault,) = faults_of(minimal.replace("    type", f"    {key}: x\n    type"))
    assert fault.remedy == f"Did you mean `{meant}`?"


@pytest.mark.parametrize("sign", ["@", "`", "%"])
def test_a_sign_that_begins_no_value_is_shown(faults_of, sign):
    (fault,) = faults_of(f"ünï: 😀\nrun_name: {sign}x\n")
    assert f"no value can begin with `{sign}`. Quote it" in fault.why

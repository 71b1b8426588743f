"""Overrides from the command line act as if they stood in the YAML, without a line."""

from __future__ import annotations

import pytest

from regrow.configs.faults import RecipeError
from regrow.configs.load import parse_recipe


def test_values_are_yaml_scalars(load, minimal):
    overrides = [
        "--learning_rate",
        "1e-4",
        "--batch_size=8",
        "--seed",
        "0x10",
        "--bf16=no",
        "--sample_packing",
    ]
    recipe = load(minimal, *overrides).recipe
    assert recipe.learning_rate == 1e-4
    assert recipe.batch_size == 8
    assert recipe.seed == 16
    assert recipe.dtype == "float32"
    assert recipe.sample_packing is True


def test_nested_values_are_addressed_by_key_and_number(load, minimal):
    recipe = load(
        minimal,
        "--datasets.0.path=other/data",
        "--datasets.1.path",
        "more/data",
        "--datasets[1].type=completion",
        "--special_tokens.pad_token",
        "<pad>",
        "--unfrozen_parameters",
        "[q_proj, v_proj]",
    ).recipe
    assert [entry.path for entry in recipe.datasets] == ["other/data", "more/data"]
    assert recipe.datasets[1].type == "completion"
    assert recipe.special_tokens.pad_token == "<pad>"
    assert recipe.unfrozen_parameters == ("q_proj", "v_proj")


def test_dashes_count_as_underscores(load, minimal):
    assert load(minimal, "--learning-rate", "3e-4").recipe.learning_rate == 3e-4


def test_null_takes_a_key_away(load, minimal):
    text = minimal + "warmup_steps: 5\n"
    recipe = load(text, "--warmup_steps", "null", "--warmup_ratio", "0.1").recipe
    assert (recipe.warmup_steps, recipe.warmup_ratio) == (None, 0.1)


@pytest.mark.parametrize(
    ("words", "key", "why"),
    [
        (["--lerning_rate", "1"], "lerning_rate", "unknown key"),
        (["--lora_r", "x"], "lora_r", "expected a whole number"),
        (["lora_r"], "lora_r", "not an override"),
        (["-x"], "-x", "not an override"),
        (["--"], "--", "not an override"),
        (["--=3"], "--=3", "not an override"),
        (["--datasets.path", "x"], "datasets.path", "a list has no entry 'path'"),
        (["--datasets.5.path", "x"], "datasets[5].path", "the list has only 1 entries"),
        (["--seed.a", "1"], "seed.a", "what it is in is a single value"),
        (["--special_tokens.0", "1"], "special_tokens", "expected a map of keys"),
        (["--datasets.0.pth", "x"], "datasets[0].pth", "unknown key"),
        (["--rl", "ebft"], "rl", "energy-based fine-tuning is not here yet"),
    ],
)
def test_a_wrong_override_is_a_fault_of_the_command_line(faults_of, minimal, words, key, why):
    (fault,) = faults_of(minimal + "seed: 1\n", *words)
    assert (fault.key, fault.why, fault.line) == (key, why, None)
    assert str(fault).startswith("on the command line") == (key != "special_tokens")


def test_the_new_name_on_the_command_line_beats_the_old_one_in_the_file(load, minimal):
    text = minimal + "dataset_processes: 2\n"
    assert load(text, "--dataset_num_proc", "3").recipe.dataset_num_proc == 3
    text = minimal + "dataset_num_proc: 2\n"
    assert load(text, "--dataset_processes", "3").recipe.dataset_num_proc == 3


def test_a_map_of_overrides_needs_no_parsing(minimal):
    data = {
        "base_model": "m",
        "datasets": [{"path": "d", "type": "alpaca"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    recipe = parse_recipe(data, {"learning_rate": 1e-5, "datasets.0.path": "e"}).recipe
    assert (recipe.learning_rate, recipe.datasets[0].path) == (1e-5, "e")
    with pytest.raises(RecipeError, match="on the command line: `learning_rate: x`"):
        parse_recipe(data, {"learning_rate": "x"})

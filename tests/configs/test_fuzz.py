"""Whatever is done to a recipe, it loads or says why not; nothing else is ever raised."""

from __future__ import annotations

import copy
import datetime
import functools
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regrow.configs.faults import RecipeError
from regrow.configs.load import Loaded, load_recipe, parse_recipe
from regrow.configs.recipe import Recipe
from regrow.configs.sections.data import Dataset
from regrow.configs.sections.parallel import FsdpConfig
from regrow.configs.vocabulary import (
    DATASET_READ_OTHERWISE,
    DATASET_WORDS,
    READ_OTHERWISE,
    REFUSED_VALUES,
    WORDS,
)

HERE = Path(__file__).parent
SEEDS = [
    yaml.safe_load(path.read_text())
    for path in sorted((HERE.parents[1] / "configs" / "recipes").glob("*.yaml"))
]
OLD = """
base_model: org/model
plugins: [axolotl.integrations.liger.LigerPlugin]
liger_rope: true
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
datasets:
  - {path: org/talks, type: sharegpt, conversation: chatml, split: "train[:10%]"}
  - {path: org/chats, type: chat_template, message_field_role: from, field_thinking: thoughts}
  - {path: org/texts, type: {format: "{instruction} {input}", field_output: answer}}
tokens: {eos_token: <end>}
max_packed_sequence_len: 2048
bf16: false
fp16: true
flash_attention: true
wandb_project: mine
micro_batch_size: 2
batch_size: 8
learning_rate: 1e-4
eta_min: 1e-5
evals_per_epoch: 4
val_set_size: 0.05
fsdp: [full_shard, auto_wrap]
fsdp_config: {fsdp_offload_params: true, fsdp_sharding_strategy: FULL_SHARD}
context_parallel_size: 2
gradient_checkpointing: offload
"""
STREAM = """
base_model: org/model
pretraining_dataset: {path: org/web, name: en, text_column: body}
max_steps: 20
micro_batch_size: 1
gradient_accumulation_steps: 1
learning_rate: 1e-4
deepspeed: zero2.json
"""
ODD_PLACES = """
base_model: odd-model
datasets: [{path: json, data_files: [rows.jsonl], type: alpaca}]
micro_batch_size: auto
batch_size: 8
learning_rate: 1e-4
adapter: lora
lora_r: 8
lora_alpha: 8
lora_target_modules: .*(q|v)_proj
lora_exclude_modules: [lm_head]
lora_rank_pattern: {q_proj: 4}
lora_alpha_pattern: {'.*v': 4}
peft_layers_to_transform: [0]
peft_layers_pattern: [layers]
deepspeed: {zero_optimization: {stage: 3, offload_param: {device: cpu}}, bf16: {enabled: auto}}
chat_template_jinja: template.jinja
num_processes: 2
"""
PAIRS = """
base_model: org/model
rl: dpo
datasets: [{path: org/pairs, type: chatml.intel}, {path: org/more}]
micro_batch_size: 1
gradient_accumulation_steps: 1
learning_rate: 1e-6
"""
SEEDS += [yaml.safe_load(text) for text in (OLD, STREAM, PAIRS, ODD_PLACES)]
KEYS = sorted({*Recipe.model_fields, *WORDS, *READ_OTHERWISE, "unknown", ""})
ENTRY_KEYS = sorted(
    {*Dataset.model_fields, *DATASET_WORDS, *DATASET_READ_OTHERWISE, "conversation", "unknown"}
)
SHARDING_KEYS = sorted({*FsdpConfig.model_fields, "fsdp_version", "sharding_strategy", "unknown"})
ODD_KEYS: list[Any] = [1, None, True, 2.5, (1, 2), "a\0", "\ud800", "x" * 5000, "a.b", "é", b"x"]
TELLING: list[Any] = [
    True, False, "no", "auto", 0, 1, 8, 0.1, 1.0, -1, "jinja", "lora", "steps", "1e-4", "x" * 300,
    *(value for values in REFUSED_VALUES.values() for value in list(values)[:2]),
]  # fmt: skip

ODD: list[Any] = [
    "~nobody-of-this-name", "~nobody-of-this-name/x", "~", "/", "..", "x" * 400, "/" + "x" * 5000,
    "a\0b", "\ud800", "\udcff/x", "(", "(a+)+$", "[", "*", "s3://", "://", "hf://a/b", "json",
    "${", "${X:-" * 50, "{" * 60, "²", "1" * 5000, "1e999", "0o17", "010", "1:30", "2001-01-01",
    10**400, -(10**20), 2**63, 1e308, float("nan"), float("inf"), -0.0,
    datetime.date(2001, 1, 1), b"x", {1, 2}, (1, 2), object(), 3 + 4j,
    {1: 2}, {None: 1}, {True: {(1, 2): "x"}}, {"\0": 1}, {"\ud800": 1}, {"": ""}, {"x" * 3000: 1},
    [[[[[[[[[[]]]]]]]]]], functools.reduce(lambda inner, _: [inner], range(60), 1),
    functools.reduce(lambda inner, _: {"a": inner}, range(1500), 1),
    {"zero_optimization": 3}, {"zero_optimization": {"stage": "three", "offload_param": [1]}},
]  # fmt: skip
"""What nobody means, and files, forms and programs may yet bring."""

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(TELLING),
    st.sampled_from(ODD),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
few = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
many = settings(few, max_examples=1700)
LONGEST = 2.0  # seconds


def loads_or_says_why(load) -> None:
    begin = time.process_time()
    try:
        loaded = load()
    except RecipeError as error:
        assert time.process_time() - begin < LONGEST
        faults, message = error.faults, str(error)
    else:
        assert time.process_time() - begin < LONGEST
        check_recipe(loaded)
        return
    assert faults
    assert all(fault.why for fault in faults)
    assert all(str(fault) in message for fault in faults[:100])  # of more it tells the number
    message.encode()


def check_recipe(loaded: Loaded) -> None:
    assert all(map(str, loaded.notices))
    recipe = loaded.recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert parse_recipe(recipe.model_dump()).recipe == recipe


def places(recipe: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """(keys that may stand there, map) of the recipe itself and of maps in it."""
    entries = recipe.get("datasets")
    entries = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    sharding = recipe.get("fsdp_config")
    found = [(KEYS, recipe), *((ENTRY_KEYS, entry) for entry in entries)]
    return [*found, (SHARDING_KEYS, sharding)] if isinstance(sharding, dict) else found


@st.composite
def changed_recipes(draw) -> dict[str, Any]:
    recipe = copy.deepcopy(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        keys, target = draw(st.sampled_from(places(recipe)))
        there = sorted(map(str, target)) or keys
        key = draw(st.sampled_from(there) | st.sampled_from(keys) | st.sampled_from(ODD_KEYS))
        if draw(st.booleans()) and key in target:
            del target[key]
        else:
            target[key] = draw(values)
    return recipe


def change_recipe(recipe) -> None:
    loads_or_says_why(lambda: parse_recipe(recipe))


def change_text(folder: Path, recipe, data) -> None:
    text = yaml.safe_dump(recipe)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 5)))
        put = data.draw(
            st.text(max_size=3)
            | st.sampled_from(list("{}[]:-#&*!|>'\"%@`,?\n\t "))
            | st.sampled_from(ODD_TEXTS)
        )
        text = text[:start] + put + text[stop:]
    path = folder / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    loads_or_says_why(lambda: load_recipe(path))


ODD_TEXTS = [
    "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '*a'] * 9)}]\n" for i in range(9)),
    "m: &m {x: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m, *m], y: *m}}\n" for i in range(40)),
    "\nz: " + "[" * 200_000, "\nz: " + "{a: " * 100_000, "- " * 100_000, "? " * 100_000,
    "\n" + "".join(" " * i + "a:\n" for i in range(900)),
    "".join(f"key{i}: 1\n" for i in range(30_000)),
    "".join(f"{name}: 2\n{name}: 3\n" for name in ("seed", "base_model")),
    "seed: 010\n", "seed: 0x1F\n", "seed: 1_000\n", "seed: 2001-01-01\n", "seed: 1:30\n",
    "seed: .nan\n", "learning_rate: .inf\n", "seed: " + "9" * 6000 + "\n", "2: 3\n", "~: 3\n",
    "? {a: 1}\n: 2\n", "!!python/object:os.system x: 1\n", "seed: !!int x\n", "%YAML 1.3\n---\n",
    '"\\ud800": 1\n', 'run_name: "\\0"\n', "extends: ~nobody-of-this-name\n",
    "extends: fuzz.yaml\n",
    "extends: " + "x" * 400 + "\n", "run_name: ${" + "A:-${" * 20_000 + "\n",
]  # fmt: skip


def change_words(recipe, overrides) -> None:
    loads_or_says_why(lambda: parse_recipe(recipe, overrides))


words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(KEYS).map(lambda key: f"--{key}"),
    st.sampled_from(ENTRY_KEYS).map(lambda key: f"--datasets.0.{key}"),
    st.builds(lambda key, value: f"--{key}={value}", st.sampled_from(KEYS), scalars),
)
seeds = st.sampled_from(SEEDS)


@few
@given(changed_recipes())
def test_changed_recipes_load_or_say_why(recipe):
    change_recipe(recipe)


@few
@given(seeds, st.data())
def test_changed_text_loads_or_says_why(tmp_path_factory, recipe, data):
    change_text(tmp_path_factory.getbasetemp(), recipe, data)


@few
@given(seeds, st.lists(words, max_size=4))
def test_any_command_line_loads_or_says_why(recipe, overrides):
    change_words(recipe, overrides)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["recipes", "text", "words"])
def test_five_thousand_changes_load_or_say_why(tmp_path, kind):
    """1,700 of each kind."""
    if kind == "recipes":
        many(given(changed_recipes())(change_recipe))()
    elif kind == "text":
        many(given(seeds, st.data())(lambda r, d: change_text(tmp_path, r, d)))()
    else:
        many(given(seeds, st.lists(words, max_size=4))(change_words))()


@pytest.mark.parametrize("text", [OLD, STREAM, PAIRS, ODD_PLACES])
def test_the_seeds_themselves_load(text):
    parse_recipe(yaml.safe_load(text))

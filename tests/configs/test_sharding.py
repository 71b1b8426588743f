"""FSDP and DeepSpeed of old and new recipes become one way of saying it."""

import json
from pathlib import Path

import pytest

from regrow.configs.sharding import shipped_deepspeed
from regrow.tasks.train.sharding import Sharding

OLD = """
fsdp:
  - full_shard
  - auto_wrap
fsdp_config:
  fsdp_limit_all_gathers: true
  fsdp_sync_module_states: true
  fsdp_offload_params: true
  fsdp_use_orig_params: false
  fsdp_cpu_ram_efficient_loading: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_sharding_strategy: FULL_SHARD
"""
NEW = """
fsdp_version: 2
fsdp_config:
  offload_params: true
  cpu_ram_efficient_loading: true
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: LlamaDecoderLayer
  state_dict_type: FULL_STATE_DICT
  reshard_after_forward: true
"""


def test_version_1_of_fsdp_is_read_as_version_2(load, minimal):
    old, new = load(minimal + OLD), load(minimal + NEW)
    assert old.recipe == new.recipe
    said = [str(notice) for notice in old.notices]
    assert any("version 2 computes the same" in line for line in said)
    assert any("FSDP2 does it by itself" in line for line in said)
    told = [str(notice) for notice in new.notices if "fsdp" in str(notice)]
    assert [line.partition(" because")[0] for line in told] == [
        "ignored fsdp_config.state_dict_type"
    ]


@pytest.mark.parametrize(
    ("written", "resharding"), [("shard_grad_op", False), ("[full_shard, auto_wrap]", True)]
)
def test_old_words_say_when_weights_are_freed(load, minimal, written, resharding):
    recipe = load(f"{minimal}fsdp: {written}\n").recipe
    assert recipe.fsdp_config.reshard_after_forward is resharding
    assert Sharding.from_recipe(recipe).shards


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("fsdp: [hybrid_shard]", "copies between machines"),
        ("fsdp: [no_shard]", "the whole model"),
        ("fsdp: [full_shart]", "no such option"),
        ("fsdp_config: {reshard_after_froward: true}", "key"),
        ("fsdp_config: true", ""),
        ("deepspeed: no-such.json", "there is no such file"),
        ("deepspeed: ~nobody-of-this-name/x", "there is no such file"),
        (f"deepspeed: {'x' * 400}", "there is no such file"),
        ("fsdp_config: {1: 2}", "is not text"),
        ("fsdp_config: {version: ²}", "expected 2"),
        ("fsdp_config: {fsdp_offload_params: true, offload_params: false}", "says otherwise"),
        ("fsdp_version: 2\nfsdp_config: {fsdp_version: 1}", "says version 1"),
    ],
)
def test_what_fsdp_and_deepspeed_do_not_know_is_a_fault(faults_of, minimal, written, why):
    faults = faults_of(f"{minimal}{written}\n")
    assert why in faults[0].why


@pytest.mark.parametrize("name", shipped_deepspeed())
def test_axolotls_names_mean_the_files_that_come_with_regrow(load, minimal, name):
    recipe = load(f"{minimal}deepspeed: deepspeed_configs/{name}\n").recipe
    assert recipe.deepspeed["zero_optimization"]["stage"] == int(name[4])
    offloads = "offload_param" in recipe.deepspeed["zero_optimization"]
    assert offloads is ("cpuoffload" in name)
    assert Sharding.from_recipe(recipe).shards is name.startswith("zero3")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[1, ", "cannot be read as JSON"),
        ("[" * 90_000, "cannot be read as JSON"),
        ("[]", "expected a map"),
        ('{"zero_optimization": {"stage": NaN}}', "a finite number"),
        ('{"zero_optimization": 3}', "expected a map"),
        ('{"zero_optimization": {"stage": true}}', "expected 0, 1, 2 or 3"),
        ('{"zero_optimization": {"offload_param": "cpu"}}', "expected a map"),
        ('{"zero_optimization": {"offload_param": {"device": "disk"}}}', "none, cpu or nvme"),
        ('{"bf16": true}', "expected a map"),
    ],
)
def test_an_odd_deepspeed_file_is_a_fault(faults_of, minimal, tmp_path, content, why):
    (tmp_path / "odd.json").write_text(content)
    assert any(why in fault.why for fault in faults_of(f"{minimal}deepspeed: odd.json\n"))


def test_both_spellings_may_say_the_same(load, minimal):
    both = "{fsdp_version: '2', fsdp_offload_params: true, offload_params: true}"
    assert load(
        f"{minimal}fsdp_version: 2\nfsdp_config: {both}\n"
    ).recipe.fsdp_config.offload_params


def test_a_file_of_the_users_comes_first(load, minimal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert load(minimal + "deepspeed: zero2.json\n").recipe.deepspeed == {
        "zero_optimization": {"stage": 1}
    }


@pytest.mark.parametrize(
    "written", ["fsdp: []\nfsdp_config:\ndeepspeed:", "fsdp:\nfsdp_config: {}"]
)
def test_nothing_said_shards_nothing_but_an_empty_map_takes_the_defaults(load, minimal, written):
    recipe = load(f"{minimal}{written}\n").recipe
    assert (recipe.fsdp_config is not None) is ("{}" in written)

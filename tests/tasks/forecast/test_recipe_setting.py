"""What cannot be forecast is said in a line; no recipe and no model gives a traceback."""

import json

import pytest

from regrow.configs.load import parse_recipe
from regrow.tasks.forecast.data import Amount
from regrow.tasks.forecast.devices import device_named
from regrow.tasks.forecast.forecast import forecast, placement_of
from regrow.tasks.forecast.job_setting import Facts, division_of, stored_adapter, wish_of_job
from regrow.tasks.forecast.memory import CONTEXT, GIB
from regrow.tasks.forecast.model_shape import model_shape
from regrow.tasks.forecast.recipe_setting import read_model
from regrow.tasks.forecast.trainable import UnknownTargetsError, with_adapter
from regrow.tasks.modeling.adapter_settings import AdapterSettings
from regrow.tasks.stage import StageError
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.spec import TrainPlacement, TrainSpec

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FSDP = {"reshard_after_forward": True, "cpu_offload": False}


@pytest.mark.parametrize(
    "config",
    [
        "no json",
        "[]",
        "null",
        '"llama"',
        "{}",
        '{"model_type": null}',
        '{"model_type": ["llama"]}',
        '{"model_type": "mamba9"}',
        '{"model_type": "llava", "text_config": {"model_type": "llama"}}',
        '{"model_type": "llava", "text_config": "llama"}',
        *(
            json.dumps(LLAMA | change)
            for change in (
                {"hidden_size": "64"},
                {"hidden_size": -64},
                {"hidden_size": 64.5},
                {"num_attention_heads": 0},
                {"num_hidden_layers": "two"},
                {"num_hidden_layers": 10**9},
                {"num_hidden_layers": [2]},
                {"num_key_value_heads": "8"},
                {"vocab_size": None},
                {"vocab_size": {}},
                {"head_dim": [1]},
            )
        ),
        json.dumps({name: LLAMA[name] for name in ("model_type", "hidden_size")}),
    ],
)
def test_an_odd_config_is_told_in_a_line(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    found = read_model(str(tmp_path))
    assert found.shape is None
    assert found.why_unknown
    assert "\n" not in found.why_unknown


def test_files_that_are_no_safetensors_are_told(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    found = read_model(str(tmp_path))
    assert found.stored is None
    assert "is no safetensors file" in found.why_unknown


@pytest.mark.parametrize(
    ("sharding", "processes", "message"),
    [
        (Sharding(FSDP, dp_replicate_size=4), 2, "dp_replicate_size: 2 processes cannot be 4"),
        (Sharding(FSDP, dp_shard_size=3), 4, "over 3 each"),
        (Sharding(context_parallel_size=3), 4, "context_parallel_size: 4 processes"),
        (Sharding(deepspeed={"zero_optimization": True}), 2, "zero_optimization is True"),
        (Sharding(deepspeed={"zero_optimization": [3]}), 2, r"zero_optimization is \[3\]"),
        (Sharding(deepspeed={"zero_optimization": {"stage": "auto"}}), 2, "stage is 'auto'"),
        (
            Sharding(deepspeed={"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}),
            2,
            "offload_optimizer is 'cpu'",
        ),
    ],
)
def test_processes_that_cannot_be_divided_are_told(sharding, processes, message):
    with pytest.raises(StageError, match=message):
        division_of(sharding, processes)


@pytest.mark.parametrize("zero", [None, False, {}])
def test_deepspeed_without_zero_is_data_parallel(zero):
    found = division_of(Sharding(deepspeed={"zero_optimization": zero}), 2)
    assert (found.way, found.shards) == ("ddp", 1)


def test_tensor_parallelism_divides_the_model_and_no_rows():
    found = division_of(Sharding(tensor_parallel_size=4), 4)
    assert (found.readers, found.share("weights"), found.share("optimizer")) == (1, 0.25, 0.25)


def test_groups_of_tensor_parallelism_read_each_its_rows():
    fsdp = {"reshard_after_forward": True, "cpu_offload": False}
    found = division_of(Sharding(fsdp=fsdp, tensor_parallel_size=2), 8)
    assert (found.way, found.readers, found.share("weights")) == ("fsdp2", 4, 0.125)
    with pytest.raises(StageError, match="8 processes are no groups of 3"):
        division_of(Sharding(fsdp=fsdp, tensor_parallel_size=3), 8)


def test_odd_deepspeed_settings_are_no_traceback_for_the_worker():
    assert Sharding(deepspeed={"zero_optimization": True}).shards is False


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"r": "many", "lora_alpha": 1}'])
def test_an_odd_adapter_is_told(tmp_path, text):
    with pytest.raises(UnknownTargetsError, match="lora_model_dir"):
        stored_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UnknownTargetsError, match="is no adapter"):
        stored_adapter(tmp_path)


def test_targets_that_match_nothing_are_told():
    shape = model_shape(LLAMA)
    with pytest.raises(UnknownTargetsError, match=r"llama has no layer that .*qkv"):
        with_adapter(shape, AdapterSettings(r=8, alpha=8, target_modules=("qkv",)))


def test_the_plans_setting_is_the_workers():
    spec = TrainSpec("", "bfloat16", 8, 1, 1e-4, adapter=AdapterSpec(4, 8, target_linear=True))
    placement = TrainPlacement("", micro_batch_size=2, gradient_checkpointing="auto")
    found = wish_of_job(spec, placement, Facts(model_shape(LLAMA), 512))
    assert (found.micro_batch, found.checkpointing, found.row_tokens) == (2, None, 512)
    assert found.at(2, "full").accumulates


@pytest.mark.parametrize(
    ("classes", "gathers"),
    [
        ((), True),
        (("LlamaDecoderLayer",), True),
        (("LlamaMLP",), False),
        (("LlamaRMSNorm",), False),
    ],
)
def test_layers_are_whole_unless_fsdp_gathers_their_parts(classes, gathers):
    options = FSDP | {"transformer_layer_cls_to_wrap": list(classes)}
    assert Sharding(options).gathers_layers is gathers


@pytest.mark.parametrize(
    ("change", "apart"),
    [
        ({}, ()),
        ({"layer_types": ["sliding_attention", "full_attention"]}, ()),
        ({"layer_types": ["linear_attention", "full_attention"]}, ("linear_attention",)),
        ({"model_type": "gpt_oss"}, ("attention sinks",)),
        ({"model_type": "no_such", "mamba_d_conv": 4}, ("mamba_d_conv",)),
    ],
)
def test_layers_that_packing_is_not_enough_for_are_known(tmp_path, change, apart):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    assert read_model(str(tmp_path)).apart == apart


def recipe_of(**changes):
    data = {"base_model": "org/m", "datasets": [{"path": "org/d", "type": "alpaca"}]}
    sizes = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4}
    return parse_recipe(data | sizes | changes).recipe


def test_a_plan_tells_of_examples_side_by_side(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"layer_types": ["conv"]}))
    recipe = recipe_of()
    lines = forecast(recipe, str(tmp_path), None, None, 1).lines
    assert [line for line in lines if "(conv) compute the examples of a row side by side" in line]


LLAMA_8B = LLAMA | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
LLAMA_8B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}


@pytest.mark.parametrize("device", [device_named("h100"), None])
@pytest.mark.parametrize(("limit", "policy"), [(60, False), (24, "selective"), (16.9, "offload")])
def test_a_plan_counts_with_the_memory_that_training_may_fill(tmp_path, device, limit, policy):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    asked = {"gradient_checkpointing": "auto", "sequence_len": 4096, "batch_size": 2}
    recipe = recipe_of(**LORA | asked, gradient_accumulation_steps=None, gpu_memory_limit=limit)
    amount = Amount(10**6, 250, 1000, "made up", is_estimate=False)
    found = forecast(recipe, str(tmp_path), amount, device, 1)
    # Of a GPU that is not known there is nothing to say about time.
    assert any(line.startswith("time: ") for line in found.lines) == (
        device is not None and policy is not False
    )
    assert found.choice.checkpointing == policy
    assert found.device.memory == pytest.approx(limit * GIB + CONTEXT)
    assert placement_of(recipe, str(tmp_path), device, 1) == found.choice
    assert found.memory.reserved <= limit * GIB


def test_a_limit_above_the_gpu_s_memory_adds_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    device = device_named("l4")
    found = forecast(recipe_of(gpu_memory_limit=80), str(tmp_path), None, device, 1)
    assert found.device == device

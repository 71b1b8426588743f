"""Counts of trainable parameters are those of PEFT on the real models."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from regrow.tasks.forecast.model_shape import model_shape
from regrow.tasks.forecast.trainable import UnknownTargetsError, all_weights, with_adapter
from regrow.tasks.modeling.adapter import add_adapter
from regrow.tasks.modeling.adapter_settings import AdapterSettings
from regrow.tasks.modeling.freezing import train_only

SMALL = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 500,
    "pad_token_id": 0,
    "intermediate_size": 112,
}
KINDS = {
    "llama": {},
    "qwen2": {},
    "gemma2": {},
    "phi3": {},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24},
    "deepseek_v3": {"n_routed_experts": 8, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    "gpt_oss": {"num_local_experts": 4},
}


def made(kind: str, **changes):
    config = AutoConfig.for_model(kind, **(SMALL | KINDS[kind] | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, model_shape(json.loads(config.to_json_string(use_diff=False)))


def trained(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


ADAPTERS = [
    {"target_linear": True},
    {"target_linear": True, "dora": True},
    {"target_linear": True, "layers": (0, 2)},
    {"target_modules": ("o_proj", "down_proj"), "rank_pattern": {"o_proj": 2}},
    {"target_modules": r".*layers\.[01]\.self_attn\.o_proj"},
    {"target_linear": True, "exclude_modules": ("o_proj",), "modules_to_save": ("embed_tokens",)},
    {"target_modules": ("embed_tokens", "o_proj")},
    {"target_modules": ("lm_head", "o_proj")},
    {"target_modules": ("o_proj",), "trainable_tokens": (1, 2, 7)},
    {"target_linear": True, "modules_to_save": ("embed_tokens", "lm_head")},
]


@pytest.mark.parametrize("settings", ADAPTERS, ids=lambda s: "-".join(s))
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_as_many_parameters_as_in_peft(kind, settings):
    if "dora" in settings and kind in ("qwen3_moe", "deepseek_v3"):
        pytest.skip("PEFT has no DoRA on stacked experts")
    model, shape = made(kind)
    expected = trained(add_adapter(model, r=4, alpha=8, **settings))
    assert with_adapter(shape, AdapterSettings(r=4, alpha=8, **settings)).total == expected


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_experts_count(kind):
    model, shape = made(kind)
    settings = {"target_parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}
    settings["target_modules"] = ("q_proj",)
    expected = trained(add_adapter(model, r=4, alpha=8, **settings))
    assert with_adapter(shape, AdapterSettings(r=4, alpha=8, **settings)).total == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_layers_that_nobody_names_are_pefts(kind):
    model, shape = made(kind)
    expected = trained(add_adapter(model, r=4, alpha=8))
    assert with_adapter(shape, AdapterSettings(r=4, alpha=8)).total == expected


def test_layers_that_nobody_names_and_peft_does_not_know_are_asked_for():
    _, shape = made("phi3")
    with pytest.raises(UnknownTargetsError, match="lora_target_linear"):
        with_adapter(shape, AdapterSettings(r=4, alpha=8))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "patterns", [(), (r"model.layers.[12].mlp",), ("lm_head.weight$", "model.embed_tokens[0:9]")]
)
def test_without_an_adapter_the_named_weights_are_trained(patterns, tied):
    model, shape = made("llama", tie_word_embeddings=tied)
    if patterns:
        train_only(model, patterns, torch.bfloat16)
    assert all_weights(shape, patterns).total == trained(model)

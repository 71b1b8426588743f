"""Adapters train in float32, on the layers asked for, and refuse what would not hold the result."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regrow.tasks.modeling.adapter import add_adapter, load_adapter
from regrow.tasks.stage import StageError

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).bfloat16()


def adapted_layers(model):
    names = {
        name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name
    }
    return {name.rpartition(".")[2] for name in names}


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"target_linear": True}, LINEAR),
        ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
        ({"target_modules": r".*mlp\.(up|down)_proj"}, {"up_proj", "down_proj"}),
        ({"target_modules": ["lm_head"], "target_linear": True}, LINEAR | {"lm_head"}),
        ({"target_modules": ["q_proj"], "target_linear": True}, LINEAR),
    ],
)
def test_the_layers_asked_for_get_an_adapter(settings, layers):
    model = add_adapter(base(), r=2, alpha=4, **settings)
    assert adapted_layers(model) == layers


@pytest.mark.parametrize("extra", [{}, {"dora": True}, {"modules_to_save": ["lm_head", "norm"]}])
def test_all_that_trains_is_float32_and_the_base_stays_frozen(extra):
    model = add_adapter(base(), r=2, alpha=4, target_linear=True, **extra)
    for name, parameter in model.named_parameters():
        expected = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == expected, name
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)


def test_rank_stabilised_scaling():
    model = add_adapter(base(), r=16, alpha=8, target_linear=True, rslora=True)
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {2.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["no_proj"]}, "lora_target_modules"),
        ({"target_parameters": ["no.such"]}, "lora_target_parameters"),
        ({"target_modules": ".*_proj", "target_linear": True}, "keep one of the two"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(StageError, match=message):
        add_adapter(base(), r=2, alpha=4, **settings)


def test_a_directory_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(StageError, match="holds no adapter"):
        load_adapter(base(), tmp_path)

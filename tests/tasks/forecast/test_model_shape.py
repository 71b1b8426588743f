"""Sizes from config.json are those of the real Transformers models, name by name."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from regrow.tasks.forecast.families import FAMILIES
from regrow.tasks.forecast.model_shape import (
    UnknownArchitectureError,
    model_shape,
    stored_parameters,
)

LAYERS = 3
# Two shapes for each family: its defaults, and switches turned the other way.
OTHERWISE = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "pad_token_id": 0,
}
SWITCHES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"head_dim": 40},
    "qwen3": {"attention_bias": True, "head_dim": 40},
    "qwen3_moe": {"decoder_sparse_step": 2, "num_experts": 4, "head_dim": 24},
    "qwen2_moe": {"mlp_only_layers": [1], "num_experts": 4, "qkv_bias": False},
    "cohere": {"use_qk_norm": True},
    "starcoder2": {"use_bias": False},
    "deepseek_v2": {"q_lora_rank": None, "n_routed_experts": 4},
    "deepseek_v3": {"first_k_dense_replace": 1, "n_routed_experts": 8, "attention_bias": True},
    "glm4_moe": {"first_k_dense_replace": 2, "use_qk_norm": True, "attention_bias": True},
    "seed_oss": {"attention_out_bias": True, "mlp_bias": True},
}


def real(kind: str, **changes):
    """(config.json, model) with all parameters on torch's meta device."""
    config = AutoConfig.for_model(kind, num_hidden_layers=LAYERS, **changes)
    with torch.device("meta"):
        return json.loads(config.to_json_string(use_diff=False)), AutoModelForCausalLM.from_config(
            config
        )


@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "changed"])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_weight_is_that_of_the_real_model(kind, changed):
    config, model = real(kind, **(OTHERWISE | SWITCHES.get(kind, {}) if changed else {}))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shape = model_shape(config)
    assert {w.name: w.shape for w in shape.weights} == expected
    linear = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    } & set(expected)
    assert {w.name for w in shape.weights if w.kind == "linear"} == linear


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "mixtral", "gpt_oss", "olmo2"]
)
def test_what_a_saved_config_leaves_out_is_as_transformers_has_it(kind, tmp_path):
    config = AutoConfig.for_model(kind, num_hidden_layers=LAYERS)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    _, model = real(kind)
    assert model_shape(saved).parameters == sum(p.numel() for p in model.parameters())


def test_published_sizes():
    eight_b = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    assert model_shape(eight_b).parameters == 8_030_261_248  # as Meta's files hold


def test_a_grown_vocabulary_counts():
    config, _ = real("qwen2", **OTHERWISE)
    more = model_shape(config, vocabulary=1010).parameters - model_shape(config).parameters
    assert more == 10 * 96 * 2  # embedding and head
    assert model_shape(config, vocabulary=900) == model_shape(config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba"},
        {},
        {"model_type": "llama", "hidden_size": 8},
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
    ],
)
def test_an_unknown_architecture_is_said(config):
    with pytest.raises(UnknownArchitectureError):
        model_shape(config)


def test_headers_of_the_files_tell_the_total(tiny_llama_dir, tmp_path):
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    assert stored_parameters(tiny_llama_dir) == model_shape(config).parameters
    assert stored_parameters(tmp_path) is None
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="no safetensors file"):
        stored_parameters(tmp_path)

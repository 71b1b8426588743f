"""Packed examples see nothing of each other in models with states and attentions of other kinds."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    NemotronHConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from regrow.tasks.modeling.adapter import add_adapter
from regrow.tasks.modeling.load import empty_model, load_model
from regrow.tasks.modeling.side_by_side import is_attached

from .models import SIZES, packed_batch

LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "qwen3_next": lambda: Qwen3NextConfig(
        **SIZES, **LINEAR, **MOE, shared_expert_intermediate_size=24
    ),
    "qwen3_5": lambda: Qwen3_5TextConfig(**SIZES, **LINEAR),
    "falcon_h1": lambda: FalconH1Config(
        **SIZES, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "lfm2": lambda: Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama4": lambda: Llama4TextConfig(
        **SIZES,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=16,
        no_rope_layers=[1, 0],
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **SIZES | {"num_hidden_layers": 3},
        head_dim=8,
        hybrid_override_pattern="M*E",
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
    ),
}
LENGTHS = (3, 31, 1, 17)


@pytest.fixture(scope="module", params=CONFIGS)
def directory(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    for name, parameter in model.named_parameters():
        if "sink" in name:
            parameter.data.normal_()
    model.save_pretrained(out)
    return out


def test_each_example_gets_the_logits_that_it_gets_alone(directory):
    model = load_model(directory, dtype="float32").eval()
    assert is_attached(model)
    batch = packed_batch(LENGTHS, pad_to=64)
    kept = {k: v for k, v in batch.items() if k not in ("supervised_rows", "num_items_in_batch")}
    alone = load_model(directory, dtype="float32", attention="sdpa").eval()
    assert not is_attached(alone)
    with torch.no_grad():
        packed = model(**kept).logits
        assert packed.shape[:2] == (1, 64)
        start = 0
        for length in LENGTHS:
            ids = batch["input_ids"][:, start : start + length]
            torch.testing.assert_close(
                packed[:, start : start + length], alone(input_ids=ids).logits, rtol=1e-4, atol=1e-4
            )
            start += length


def test_an_adapter_trains_on_it_and_the_empty_model_is_the_same(directory):
    batch = packed_batch(LENGTHS, pad_to=None)
    batch.pop("supervised_rows")
    targets = ("q_proj", "v_proj")
    model = add_adapter(
        load_model(directory, dtype="float32"), r=2, alpha=4, target_modules=targets
    )
    loss = model.train()(**batch).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
        whole = load_model(directory, dtype="float32").train()(**batch).loss
    torch.testing.assert_close(loss.detach(), whole)
    assert is_attached(empty_model(directory))


def test_a_soft_cap_stays_packed(tmp_path):
    """torch's attention has none, ours has."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads)).save_pretrained(tmp_path)
    assert not is_attached(load_model(tmp_path, dtype="float32"))

"""Tiny random models of each family the kernels know, and packed examples for them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from regrow.tasks.modeling import attention
from regrow.tasks.modeling.batches import flatten

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
MOE = Qwen3MoeConfig(
    **SIZES,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    norm_topk_prob=True,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),  # Q, K and V have a bias
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(**SIZES, **_GEMMA),
    "gemma3": Gemma3TextConfig(**SIZES, **_GEMMA),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    # Half of each head is rotated; Q, K and V are one matrix, gate and up another.
    "phi3": Phi3Config(
        **SIZES,
        original_max_position_embeddings=256,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same weights each time."""
    attention.register()
    torch.manual_seed(0)
    config = copy.deepcopy(MOE if family == "qwen3_moe" else CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # they start at one, or at zero
            parameter.data += torch.randn_like(parameter) * 0.2
    model.config.use_cache = False  # as the Trainer has it; with a cache attention is not packed
    return model.to(dtype).train()


def packed_batch(lengths=(3, 61, 1, 17, 30), pad_to: int | None = 128) -> dict[str, Any]:
    """Random tokens of which half are learnt, with `num_items_in_batch`."""
    random = np.random.default_rng(0)
    ids = random.integers(3, SIZES["vocab_size"], sum(lengths), dtype=np.int32)
    mask = (random.random(sum(lengths)) < 0.5).astype(np.uint8)
    mask[np.cumsum([0, *lengths[:-1]])] = 0
    row = SimpleNamespace(input_ids=ids, loss_mask=mask, seq_lens=np.array(lengths))
    return flatten([row], pad_to) | {"num_items_in_batch": int(mask.sum())}

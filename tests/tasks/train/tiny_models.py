"""Random models of a few thousand weights, written to disk for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def write_llama(out: Path, **sizes: Any) -> Path:
    """A Llama, 2 layers of 32, in float32; `sizes`: other values of its configuration."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **sizes})
    LlamaForCausalLM(config).save_pretrained(out)
    return out


def tiny_mixtral(**sizes: Any) -> MixtralForCausalLM:
    """A Mixtral of 2 layers and 4 experts, two for each token."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, **experts, **sizes}))

"""Model architectures as Transformers 5 builds them: which weights a layer has, by `model_type`.

Read off the models of Transformers 5.23; `tests/tasks/forecast/test_model_shape.py` holds every
family against the real classes, name by name and shape by shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Flag = bool | str
"""Whether something is there; a text names the key of config.json that says so."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP, its weights stacked over the experts."""

    count: tuple[str, ...]
    """Keys of config.json, the first that is there counts."""
    width: str
    per_token: str = "num_experts_per_tok"
    block: str = "mlp"
    router: str = "gate"
    router_bias: bool = False
    bias: bool = False
    transposed: bool = False
    """[experts, in, out] instead of [experts, out, in]."""
    shared: str = ""
    """Name of an MLP that sees every token, if there is one."""
    shared_width: str = ""
    """Key of its width; "" : `width` times the key `n_shared_experts`."""
    shared_gate: bool = False
    renamed: tuple[str, str, str] | None = None
    """Older names of gate, up and down projection, which PEFT takes for the stacked matrices: its
    `transformers_weight_conversion` knows some architectures so."""


@dataclass(frozen=True)
class Family:
    """What the layers of an architecture are made of."""

    qkv_bias: Flag = False
    o_bias: Flag = False
    mlp_bias: Flag = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_weight: bool = True
    norm_bias: bool = False
    qk_norm: str = ""
    """"head": a weight of head size for each of q and k; "full": of all heads."""
    qk_norm_if: Flag = True
    sinks: bool = False
    latent: bool = False
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    fused_qkv: bool = False
    fused_gate_up: bool = False
    plain_mlp: tuple[str, str] | None = None
    """Names of two layers, where the MLP has no gate."""
    experts: Experts | None = None
    tied: bool = False
    """Whether the head is the embedding where config.json does not say."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Keys that config.json may leave out."""


_BIASED = Family(qkv_bias="attention_bias", o_bias="attention_bias")
_LLAMA = replace(_BIASED, mlp_bias="mlp_bias")
_MISTRAL = Family(defaults={"num_key_value_heads": 8})
_QWEN2 = Family(qkv_bias=True)
_QWEN3 = replace(_BIASED, qk_norm="head", defaults={"head_dim": 128})
_GEMMA = replace(_BIASED, tied=True, defaults={"head_dim": 256})
_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_NORMS_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_OLMO2 = replace(_BIASED, qk_norm="full", norms=_NORMS_AFTER)
_GLM = Family(qkv_bias="attention_bias", fused_gate_up=True, defaults={"head_dim": 128})
_OLD = ("gate_proj", "up_proj", "down_proj")
_DEEPSEEK = Family(
    o_bias="attention_bias",
    latent=True,
    experts=Experts(
        ("n_routed_experts",), "moe_intermediate_size", shared="shared_experts", renamed=_OLD
    ),
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "smollm3": replace(_LLAMA, tied=True),
    "granite": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=_FOUR_NORMS),
    "gemma3_text": replace(_GEMMA, norms=_FOUR_NORMS, qk_norm="head"),
    "phi3": Family(fused_qkv=True, fused_gate_up=True),
    "olmo": replace(_BIASED, norm_weight=False),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "cohere": replace(
        _BIASED, norms=("input_layernorm",), qk_norm="grid", qk_norm_if="use_qk_norm", tied=True
    ),
    "cohere2": replace(_BIASED, norms=("input_layernorm",), tied=True),
    "glm": _GLM,
    "glm4": replace(
        _GLM, norms=(*_FOUR_NORMS[:2], "post_self_attn_layernorm", "post_mlp_layernorm")
    ),
    "starcoder2": Family(
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        norm_bias=True,
        plain_mlp=("c_fc", "c_proj"),
        tied=True,
        defaults={"use_bias": True},
    ),
    "seed_oss": Family(qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "ernie4_5": Family(
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        tied=True,
        defaults={"head_dim": 128},
    ),
    "exaone4": Family(qk_norm="head", norms=_NORMS_AFTER),
    "mixtral": replace(
        _MISTRAL,
        experts=Experts(
            ("num_local_experts", "num_experts"), "intermediate_size", renamed=("w1", "w3", "w2")
        ),
    ),
    "olmoe": replace(
        _BIASED,
        qk_norm="full",
        experts=Experts(("num_experts", "num_local_experts"), "intermediate_size", renamed=_OLD),
    ),
    "granitemoe": replace(
        _BIASED,
        experts=Experts(
            ("num_local_experts", "num_experts"),
            "intermediate_size",
            block="block_sparse_moe",
            router="router",
        ),
    ),
    "qwen2_moe": replace(
        _QWEN2,
        qkv_bias="qkv_bias",
        defaults={"qkv_bias": True},
        experts=Experts(
            ("num_experts", "num_local_experts"),
            "moe_intermediate_size",
            shared="shared_expert",
            shared_width="shared_expert_intermediate_size",
            shared_gate=True,
        ),
    ),
    "qwen3_moe": replace(
        _QWEN3,
        defaults={},
        experts=Experts(
            ("num_experts", "num_local_experts"), "moe_intermediate_size", renamed=_OLD
        ),
    ),
    "glm4_moe": Family(
        qkv_bias="attention_bias",
        qk_norm="head",
        qk_norm_if="use_qk_norm",
        experts=Experts(
            ("n_routed_experts",), "moe_intermediate_size", shared="shared_experts", renamed=_OLD
        ),
    ),
    "deepseek_v2": replace(_DEEPSEEK, mlp_bias="mlp_bias"),
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        sinks=True,
        defaults={"attention_bias": True},
        experts=Experts(
            ("num_local_experts", "num_experts"),
            "intermediate_size",
            router="router",
            router_bias=True,
            bias=True,
            transposed=True,
        ),
    ),
}
"""`model_type` of config.json -> what its layers are made of."""

"""Names of the layers that an adapter can be put on, by the `model_type` of config.json.

Read off Transformers 5.23; `tests/configs/test_architectures.py` holds each against the real class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
_GATED = "mlp.gate_proj mlp.up_proj mlp.down_proj"
_FUSED = "mlp.gate_up_proj mlp.down_proj"
_LATENT = (
    "self_attn.q_proj self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa "
    "self_attn.kv_b_proj self_attn.o_proj"
)


@dataclass(frozen=True)
class Layers:
    """The linear layers of one architecture."""

    names: tuple[str, ...]
    """Of one transformer layer, from its own name on."""
    prefix: str = "model.layers"
    ends: tuple[str, ...] = ("model.embed_tokens", "lm_head")
    """Embedding and head."""
    has_experts: bool = False
    """A mixture of experts: PEFT reads names of the experts' matrices in ways of its own, so that
    these are not all the names there are."""

    def modules(self, count: int) -> list[str]:
        """Full names in a model of so many layers."""
        layers = (f"{self.prefix}.{i}.{name}" for i in range(count) for name in self.names)
        return [*layers, *self.ends]


def _plain(names: str) -> Layers:
    return Layers(tuple(names.split()))


def _with_experts(names: str) -> Layers:
    return Layers(tuple(names.split()), has_experts=True)


_NEOX = "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
_FALCON = _NEOX.replace("attention", "self_attention")

ARCHITECTURES: Mapping[str, Layers] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"),
            *("granite", "olmo", "olmo2", "olmo3", "cohere", "cohere2", "stablelm", "seed_oss"),
            *("exaone4", "ernie4_5"),
        ),
        _plain(f"{_ATTENTION} {_GATED}"),
    ),
    "phi3": _plain(f"self_attn.qkv_proj self_attn.o_proj {_FUSED}"),
    **dict.fromkeys(("glm", "glm4"), _plain(f"{_ATTENTION} {_FUSED}")),
    "starcoder2": _plain(f"{_ATTENTION} mlp.c_fc mlp.c_proj"),
    "phi": _plain(
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 mlp.fc2"
    ),
    "gpt2": Layers(
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        "transformer.h",
        ("transformer.wte", "transformer.wpe", "lm_head"),
    ),
    "gpt_neox": Layers(
        # The head is embed_out in files, and was in older versions of Transformers.
        tuple(_NEOX.split()),
        "gpt_neox.layers",
        ("gpt_neox.embed_in", "lm_head", "embed_out"),
    ),
    "falcon": Layers(
        tuple(_FALCON.split()), "transformer.h", ("transformer.word_embeddings", "lm_head")
    ),
    **dict.fromkeys(
        ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "gpt_oss", "granitemoe"),
        _with_experts(_ATTENTION),
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _with_experts(_LATENT)),
}
"""`model_type` -> its layers; of others nothing is known here."""

OF_EXPERTS = frozenset(
    [
        "gate",
        "router",
        "experts",
        "w1",
        "w2",
        "w3",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "shared_expert_gate",
        "input_linear",
        "output_linear",
        "layer",
    ]
)
"""Last parts of names that are found in mixtures of experts, old and new."""

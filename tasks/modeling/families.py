"""Which classes of Transformers the kernels can stand in for, and how each family differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """A model family: classes `<prefix>RMSNorm`, `<prefix>MLP`, `<prefix>Attention`, ..."""

    name: str
    """Of its folder in `transformers.models`."""
    prefix: str
    norm_offset: float = 0.0
    """Gemma stores the weight of a norm less one."""
    window: str | None = None
    """Where an attention layer's sliding window stands: in the "layer", the "config", nowhere."""
    softcap: bool = False
    """Whether attention scores are capped."""
    sums: bool = True
    """Whether a layer is x + attention(norm(x)), then x + mlp(norm(x)), with nothing between."""

    def kind(self, module: nn.Module) -> str | None:
        """What of the family a module is: "RMSNorm", "MLP", "Attention", "ForCausalLM", or None."""
        its = type(module)
        if its.__module__ != f"transformers.models.{self.name}.modeling_{self.name}":
            return None
        return its.__name__.removeprefix(self.prefix) if its.__name__ != self.prefix else None


FAMILIES = (
    Family("llama", "Llama"),  # SmolLM and SmolLM2 too
    Family("mistral", "Mistral", window="config"),
    Family("qwen2", "Qwen2", window="layer"),
    Family("qwen3", "Qwen3", window="layer"),
    Family("qwen3_moe", "Qwen3Moe", window="layer"),
    Family("smollm3", "SmolLM3", window="layer"),
    Family("gemma2", "Gemma2", norm_offset=1.0, window="layer", softcap=True, sums=False),
    Family("gemma3", "Gemma3", norm_offset=1.0, window="layer", sums=False),
    Family("phi3", "Phi3", window="config", sums=False),
)


def family_of(model: nn.Module) -> Family | None:
    """The family of a causal language model; None for one that is not in the table."""
    return next((f for f in FAMILIES if f.kind(model) == "ForCausalLM"), None)


def window_of(attention: Any, family: Family) -> int | None:
    """Tokens that a query of this layer sees; None for all."""
    if family.window is None:
        return None
    holder = attention if family.window == "layer" else attention.config
    return getattr(holder, "sliding_window", None)


# The kernels' names of activations, by the class that Transformers makes for them.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
}


def activation_of(mlp: Any) -> str | None:
    """The kernels' name for a gated MLP's activation; None for one they have not."""
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    return _ACTIVATIONS.get(type(function).__name__)

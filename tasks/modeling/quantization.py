"""A base model in 4 or 8 bits: what a recipe asks for, in the words of Transformers.

Light: a plan is made with it, so torch and Transformers are imported where they are used.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regrow.tasks.stage import StageError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from regrow.configs.recipe import Recipe

# QLoRA's base: normal floats, their scales quantized once more (Dettmers et al. 2023, arXiv
# 2305.14314); Axolotl's defaults too.
_NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@dataclass(frozen=True)
class Quantization:
    """In how many bits bitsandbytes holds the linear layers of a frozen base."""

    bits: int
    """4 or 8."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of Transformers' `BitsAndBytesConfig`; dtypes by name."""
    experts: bool = False
    """Stacks of experts, too."""

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Quantization | None:
        """None for a base that is not quantized."""
        if recipe.load_in_8bit:
            return cls(8, dict(recipe.bnb_config_kwargs), recipe.quantize_moe_experts)
        if not recipe.load_in_4bit:
            return None
        defaults = {**_NF4, "bnb_4bit_compute_dtype": recipe.dtype}
        settings = {**defaults, **recipe.bnb_config_kwargs}
        return cls(4, settings, recipe.quantize_moe_experts)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Quantization | None:
        """The inverse of canonical JSON."""
        return cls(**data) if data else None

    def __str__(self) -> str:
        with_experts = ", experts too" if self.experts else ""
        if self.bits == 8:
            return f"int8{with_experts}"
        double = self.settings.get("bnb_4bit_use_double_quant")
        kind = self.settings.get("bnb_4bit_quant_type", "nf4")
        times = "double quantization" if double else "simple quantization"
        return f"{kind}, {times}{with_experts}"

    def config(self, *, divided: bool = False) -> BitsAndBytesConfig:
        """As Transformers takes it.

        Args:
            divided: of a model in 4 bits whose layers are divided over processes.

        Raises:
            StageError: bitsandbytes is missing, or an argument is not what it takes.
        """
        from transformers import BitsAndBytesConfig

        key = f"load_in_{self.bits}bit"
        require_package("bitsandbytes", "bitsandbytes", key)
        # It would say, for every layer and step, that int8 is computed from float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        try:
            config = BitsAndBytesConfig(**{key: True, **self.settings})
        except (TypeError, ValueError, AttributeError) as error:
            raise StageError(f"bnb_config_kwargs: {error}") from error
        if divided:
            from regrow.tasks.modeling.quantized_parts import in_parts

            return in_parts(config)
        if not self.experts:
            return config
        from regrow.tasks.modeling.quantized_experts import experts_too

        return experts_too(config)

    def is_quantized(self, name: str) -> bool:
        """Whether a linear layer of this name is: all but the output head and those left out."""
        left_out = self.settings.get("llm_int8_skip_modules") or ["lm_head"]
        return not any(part in name.split(".") or name.endswith(part) for part in left_out)


def by_own_quantizer(config: Any, method: str, quantizer: Callable[[], type]) -> Any:
    """A `BitsAndBytesConfig` like `config`, which Transformers gives to a quantizer of ours.

    Args:
        method: our name among Transformers' quantization methods.
        quantizer: makes the class.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer

    if method not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(method)(quantizer())

    class OwnConfig(BitsAndBytesConfig):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.quant_method = method  # type: ignore[assignment]

    settings = {k: v for k, v in config.to_dict().items() if not k.startswith(("_", "quant_m"))}
    return OwnConfig(**settings)


def require_package(install: str, module: str, key: str) -> None:
    """Raises StageError, naming the recipe's `key`, when a package is not installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise StageError(
            f"{key}: this needs the package {install}, which is not installed where training runs: "
            f"pip install {install}"
        )

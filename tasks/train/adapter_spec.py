"""The part of a train spec that says which adapter is trained (`AdapterSpec`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrow.tasks.modeling.adapter_settings import AdapterSettings
from regrow.tasks.stage import StageError

if TYPE_CHECKING:
    from regrow.configs.recipe import Recipe


@dataclass(frozen=True)
class AdapterSpec(AdapterSettings):
    """An adapter, and where its values come from."""

    start: str | None = None
    """Digest of an adapter to go on from; all else is then as its own configuration says."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, start: str | None = None) -> AdapterSpec | None:
        """None when all weights are trained.

        Raises:
            StageError: for an adapter without rank or scale.
        """
        if recipe.adapter is None:
            return None
        if start is not None:
            return cls(r=0, alpha=0, start=start)
        if recipe.lora_r is None or recipe.lora_alpha is None:
            raise StageError("adapter: lora needs lora_r and lora_alpha")
        layers, tokens = recipe.peft_layers_to_transform, recipe.peft_trainable_token_indices
        loftq = recipe.peft.loftq_config
        return cls(
            r=recipe.lora_r,
            alpha=recipe.lora_alpha,
            dropout=recipe.lora_dropout,
            target_modules=_names(recipe.lora_target_modules),
            target_linear=recipe.lora_target_linear,
            target_parameters=tuple(sorted(recipe.lora_target_parameters)),
            exclude_modules=_names(recipe.lora_exclude_modules),
            rank_pattern=recipe.lora_rank_pattern,
            alpha_pattern=recipe.lora_alpha_pattern,
            layers=(layers,) if isinstance(layers, int) else layers,
            layers_pattern=recipe.peft_layers_pattern,
            rslora=recipe.peft_use_rslora,
            dora=recipe.peft_use_dora,
            init=recipe.peft_init_lora_weights,
            loftq=loftq.model_dump() if loftq else {},
            modules_to_save=tuple(sorted(recipe.lora_modules_to_save)),
            trainable_tokens=tokens,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterSpec:
        """The inverse of canonical JSON."""
        plain = {name: _tuples(value) for name, value in data.items()}
        return cls(**plain)


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _names(names: tuple[str, ...]) -> tuple[str, ...] | str | None:
    """One text that is no plain name is a regular expression, as in PEFT."""
    if len(names) == 1 and not names[0].replace(".", "_").isidentifier():
        return names[0]
    return tuple(sorted(names)) or None

"""What decides the merged model (`MergeSpec`), and where its base is (`MergePlacement`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from regrow.tasks.modeling.quantization import Quantization

if TYPE_CHECKING:
    from regrow.configs.recipe import Recipe

VERSION = 2
"""Raised whenever the same spec and inputs would give other bytes."""

TOLERANCE = 0.25
"""See `MergeSpec.tolerance`. Rounding to bfloat16 costs 2 to 16 % of a trained adapter's effect
(measured; see `regrow.tasks.modeling.rounding`), a scale wrong by a factor of 2 at least 50 %."""


@dataclass(frozen=True)
class MergeSpec:
    """All that decides the merged weights, besides the adapter and the tokenizer."""

    base_model_digest: str
    dtype: str
    """Of the base during training, and of the merged weights: "bfloat16" or "float32"."""
    quantization: Quantization | None = None
    """Of the base during training; the merged model stands on the unquantized base in `dtype`, and
    the result says how much that changes."""
    tolerance: float = TOLERANCE
    """The most that the merged model's logits may differ from those of base and adapter, as a share
    of the difference that the adapter makes (both root mean squares)."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, base_model_digest: str) -> MergeSpec:
        """The part of the recipe that decides the merged weights."""
        quantization = Quantization.from_recipe(recipe)
        return cls(base_model_digest, recipe.dtype, quantization)


@dataclass(frozen=True)
class MergePlacement:
    """Where the base model is."""

    base_model: str
    """Local directory, or a pinned place on the hub."""
    trust_remote_code: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, base_model: str) -> MergePlacement:
        """The placement for a base model at a known place."""
        return cls(base_model=base_model, trust_remote_code=recipe.trust_remote_code)

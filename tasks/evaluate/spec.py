"""What decides an evaluation's result (`EvaluateSpec`), and what only its pace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regrow.configs.recipe import Recipe

VERSION = 1
"""Raised whenever the same spec and inputs would give other scores."""


@dataclass(frozen=True)
class EvaluateSpec:
    """All that decides the scores, besides the prepared data and the model of an input stage."""

    model_digest: str | None
    """Identity of a base model; None when the model is the input `model`."""
    dtype: str
    """Of the weights while they are evaluated: "bfloat16" or "float32"."""
    max_new_tokens: int
    """Longest answer."""
    num_prompts: int
    """At most this many of the held-out prompts are answered."""
    eval_prompts: tuple[str, ...] = ()
    """Answered too; nobody knows the right answers."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, model_digest: str | None = None) -> EvaluateSpec:
        """The spec for a base model of known digest, or (None) for an input stage's model."""
        return cls(
            model_digest=model_digest,
            dtype=recipe.dtype,
            max_new_tokens=recipe.eval_max_new_tokens,
            num_prompts=recipe.eval_table_size,
            eval_prompts=tuple(recipe.eval_prompts),
        )


@dataclass(frozen=True)
class EvaluatePlacement:
    """Where and how fast; changes scores by rounding only."""

    base_model: str | None = None
    """Local directory, or pinned place on the hub; None when the model is an input."""
    rows_per_batch: int = 1
    """Packed rows in one forward pass."""
    prompts_per_batch: int = 64
    """Prompts answered side by side, if they are short. Weights are read once for all of them:
    64 answers of 30 tokens took 13 s at once, 19 s by 32 (SmolLM2-135M, 2 busy cores)."""
    device: str = "auto"
    """"auto" (CUDA where there is some), "cpu" or "cuda"."""
    trust_remote_code: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, base_model: str | None = None) -> EvaluatePlacement:
        """The placement for a base model at a known place, or (None) for an input stage's model."""
        return cls(
            base_model=base_model,
            rows_per_batch=recipe.eval_batch_size or recipe.rows_at_once,
            trust_remote_code=recipe.trust_remote_code,
        )

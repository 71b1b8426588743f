"""Rules about batches."""

from __future__ import annotations

from collections.abc import Iterator

from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule

_KEYS = ("micro_batch_size", "gradient_accumulation_steps", "batch_size")


@rule(*_KEYS)
def the_global_batch_is_said(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Two of the three batch keys are given: one alone leaves the global batch to chance."""
    present = [key for key in _KEYS if key in given]
    if len(present) < 2:
        missing = " and ".join(f"`{key}`" for key in _KEYS[:2] if key not in present)
        why = "the number of rows in each optimizer step is not said"
        yield (present[0] if present else _KEYS[0],), why, f"Add {missing}"


@rule(*_KEYS)
def the_batch_keys_agree(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """batch_size is micro_batch_size * gradient_accumulation_steps where all three are given."""
    product = recipe.rows_at_once * recipe.gradient_accumulation_steps
    if recipe.micro_batch_size == "auto":
        return
    if given.issuperset(_KEYS) and recipe.batch_size != product:
        why = f"micro_batch_size * gradient_accumulation_steps is {product}"
        yield ("batch_size",), why, "Keep `batch_size` or `gradient_accumulation_steps`"


@rule(*_KEYS)
def the_batch_divides_evenly(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """batch_size is a multiple of the one other key that is given."""
    others = [key for key in _KEYS[:2] if key in given]
    if recipe.batch_size and len(others) == 1:
        key, part = others[0], getattr(recipe, others[0])
        if part != "auto" and recipe.batch_size % part:
            why = f"it is no multiple of {key}, {part}"
            yield ("batch_size",), why, f"Use {max(1, recipe.batch_size // part) * part}"


@rule(*_KEYS)
def a_chosen_micro_batch_needs_the_global_batch(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Breach]:
    """A micro-batch that each machine chooses for itself must not decide the global batch."""
    key = "gradient_accumulation_steps"
    decides = recipe.batch_size is None or recipe.gradient_accumulation_steps != 1
    if recipe.micro_batch_size == "auto" and key in given and decides:
        why = "with `micro_batch_size: auto` it would make the global batch another on each machine"
        yield (key,), why, "Give `batch_size` in its place"


RULES = (
    the_global_batch_is_said,
    the_batch_keys_agree,
    the_batch_divides_evenly,
    a_chosen_micro_batch_needs_the_global_batch,
)

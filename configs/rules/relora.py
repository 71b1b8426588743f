"""Rules about ReLoRA, whose adapter begins anew at each restart."""

from __future__ import annotations

from collections.abc import Iterator

from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule

_OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
)
"""Those whose moments `regrow.tasks.train.relora.prune` knows."""


@rule("relora", "jagged_restart_steps", "adapter", "optimizer", "lora_model_dir")
def relora_is_complete(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """ReLoRA needs an adapter, the steps of a round, and moments that can be pruned."""
    if not recipe.relora:
        return
    if not recipe.uses_adapter:
        yield ("relora",), "it restarts an adapter, and there is none", "Add `adapter: lora`"
    elif recipe.lora_model_dir:
        yield ("lora_model_dir",), "`relora` begins with a fresh adapter", "Remove one of the two"
    if recipe.jagged_restart_steps is None:
        why = "it needs the number of steps of a round"
        yield ("relora",), why, "Add `jagged_restart_steps: 150`"
    if recipe.optimizer not in _OPTIMIZERS:
        why = f"relora cannot prune the state of {recipe.optimizer}"
        yield ("optimizer",), why, f"Use one of {', '.join(_OPTIMIZERS)}"


@rule(
    "relora",
    "peft_use_dora",
    "peft_use_rslora",
    "peft_init_lora_weights",
    "lora_modules_to_save",
    "peft_trainable_token_indices",
    "lora_target_parameters",
    "load_best_model_at_end",
    "early_stopping_patience",
    "fsdp_config",
    "deepspeed",
    "tensor_parallel_size",
)
def rounds_sum_up(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Rounds are summed up to one adapter: what is not a plain product of two matrices is not."""
    if not recipe.relora:
        return
    plain = "the rounds of `relora` sum up only for plain LoRA"
    for key in (
        "peft_use_dora",
        "peft_use_rslora",
        "lora_modules_to_save",
        "peft_trainable_token_indices",
        "lora_target_parameters",
    ):
        if getattr(recipe, key):
            yield (key,), plain, "Remove it"
    if recipe.peft_init_lora_weights is not True:
        yield ("peft_init_lora_weights",), "each round of `relora` begins at 0", "Remove it"
    if recipe.load_best_model_at_end:
        why = "the best step may be of an earlier round, whose adapter is gone"
        asked = ("load_best_model_at_end", "early_stopping_patience")
        yield (next(key for key in asked if key in given),), why, "Remove it"
    for key in ("fsdp_config", "deepspeed"):
        if getattr(recipe, key):
            yield (key,), "`relora` was not made for sharded models", "Remove it: DDP works"
    if recipe.tensor_parallel_size > 1:
        why = "`relora` was not made for divided layers"
        yield ("tensor_parallel_size",), why, "Remove it: DDP works"


RULES = (relora_is_complete, rounds_sum_up)

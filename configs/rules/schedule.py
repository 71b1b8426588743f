"""Rules about when the learning rate changes, checkpoints are kept and validation runs."""

from __future__ import annotations

from collections.abc import Iterator

from regrow.configs.optimizers import LOW_RANK
from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule


@rule("warmup_steps", "warmup_ratio")
def warmup_is_said_once(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Warm-up is a number of steps or a share of them."""
    if recipe.warmup_steps and recipe.warmup_ratio:
        why = f"`warmup_ratio: {recipe.warmup_ratio}` says otherwise"
        yield ("warmup_steps",), why, "Use one of the two"


@rule("save_steps", "saves_per_epoch")
def saving_is_said_once(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Checkpoints come every so many steps or so many times an epoch."""
    if recipe.save_steps and recipe.saves_per_epoch:
        yield ("save_steps",), "`saves_per_epoch` says otherwise", "Use one of the two"


@rule("eval_steps", "evals_per_epoch")
def validating_is_said_once(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Validation comes every so many steps or so many times an epoch."""
    if recipe.eval_steps and recipe.evals_per_epoch:
        yield ("eval_steps",), "`evals_per_epoch` says otherwise", "Use one of the two"


@rule("save_strategy", "save_steps", "saves_per_epoch")
def saving_fits_its_strategy(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """save_steps and saves_per_epoch are about save_strategy: steps."""
    for key in ("save_steps", "saves_per_epoch"):
        if getattr(recipe, key) and recipe.save_strategy != "steps":
            why = f"it has no meaning with `save_strategy: {recipe.save_strategy}`"
            yield (key,), why, "Remove it or use `save_strategy: steps`"


@rule("eval_strategy", "eval_steps", "evals_per_epoch", "val_set_size", "test_datasets")
def validating_fits_its_strategy(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """eval_steps and evals_per_epoch are about eval_strategy: steps."""
    for key in ("eval_steps", "evals_per_epoch"):
        if getattr(recipe, key) and recipe.validates and recipe.eval_strategy != "steps":
            why = f"it has no meaning with `eval_strategy: {recipe.eval_strategy}`"
            yield (key,), why, "Remove it or use `eval_strategy: steps`"


@rule("save_strategy", "save_steps", "saves_per_epoch")
def saving_by_steps_has_steps(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """save_strategy: steps comes with a number of steps."""
    if recipe.save_strategy == "steps" and not (recipe.save_steps or recipe.saves_per_epoch):
        why = "neither `save_steps` nor `saves_per_epoch` is given"
        yield ("save_strategy",), why, "Add one of them"


@rule("eval_strategy", "eval_steps", "evals_per_epoch")
def validating_by_steps_has_steps(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """eval_strategy: steps comes with a number of steps."""
    if recipe.eval_strategy == "steps" and not (recipe.eval_steps or recipe.evals_per_epoch):
        why = "neither `eval_steps` nor `evals_per_epoch` is given"
        yield ("eval_strategy",), why, "Add one of them"


@rule("eval_strategy", "eval_steps", "val_set_size", "test_datasets")
def validating_needs_data(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """A recipe that asks for validation does not take the data away. (evals_per_epoch is let pass
    with a notice: published recipes keep it beside `val_set_size: 0`.)"""
    if recipe.validates:
        return
    for key in ("eval_steps", "eval_strategy"):
        if key in given and getattr(recipe, key) not in (None, "no"):
            why = "there is no validation data"
            yield (key,), why, "Add `val_set_size` or `test_datasets`, or remove it"


@rule("save_steps", "eval_steps")
def steps_are_whole_or_a_share(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """2.5 is neither a number of steps nor a share of all steps."""
    for key in ("save_steps", "eval_steps"):
        steps = getattr(recipe, key)
        if steps and steps >= 1 and not float(steps).is_integer():
            why = "steps are a whole number, or a share of all steps below 1"
            yield (key,), why, f"Use {int(steps)}"


@rule("lr_scheduler", "cosine_min_lr_ratio")
def a_lowest_rate_needs_a_cosine(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """cosine_min_lr_ratio is about the cosine schedule, and the lowest rate of rex."""
    cosines = ("cosine", "cosine_with_min_lr", "rex")
    if recipe.cosine_min_lr_ratio is not None and recipe.lr_scheduler not in cosines:
        why = f"it has no meaning with `lr_scheduler: {recipe.lr_scheduler}`"
        yield ("cosine_min_lr_ratio",), why, "Remove it or use `lr_scheduler: cosine`"


@rule("lr_scheduler", "lr_scheduler_kwargs", "cosine_min_lr_ratio")
def schedulers_have_their_arguments(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Schedulers that end at a lowest rate, or decay in a last part, say so."""
    kwargs = recipe.lr_scheduler_kwargs
    if "min_lr" in recipe.lr_scheduler and not kwargs.keys() & {"min_lr", "min_lr_rate"}:
        why = "`lr_scheduler_kwargs` says no lowest learning rate"
        yield ("lr_scheduler",), why, "Add `lr_scheduler_kwargs: {min_lr_rate: 0.1}`"
    if recipe.lr_scheduler == "warmup_stable_decay" and "num_decay_steps" not in kwargs:
        why = "`lr_scheduler_kwargs` says no decay"
        yield ("lr_scheduler",), why, "Add `lr_scheduler_kwargs: {num_decay_steps: 100}`"


_NEED_VALIDATION = (
    "early_stopping_patience",
    "load_best_model_at_end",
    "save_strategy",
    "lr_scheduler",
)


@rule(*_NEED_VALIDATION, "val_set_size", "test_datasets", "eval_strategy")
def what_follows_validation_has_it(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """A best model, an early stop and a plateau are seen in validations."""
    if recipe.validates and recipe.eval_strategy != "no":
        return
    plateau, best = recipe.lr_scheduler == "reduce_lr_on_plateau", recipe.save_strategy == "best"
    asked = (recipe.early_stopping_patience, recipe.load_best_model_at_end, best, plateau)
    for key, wanted in zip(_NEED_VALIDATION, asked, strict=True):
        if wanted and not (key == "load_best_model_at_end" and key not in given):
            yield (key,), "there is no validation", "Add `val_set_size: 0.05`"


@rule("lr_scheduler", "cosine_constant_lr_ratio", "cosine_min_lr_ratio")
def a_constant_end_has_a_rate(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """cosine_constant_lr_ratio says when the lowest rate is reached, cosine_min_lr_ratio which."""
    if not recipe.cosine_constant_lr_ratio:
        return
    if recipe.lr_scheduler != "cosine":
        why = f"it has no meaning with `lr_scheduler: {recipe.lr_scheduler}`"
        yield ("cosine_constant_lr_ratio",), why, "Use `lr_scheduler: cosine`"
    elif not recipe.cosine_min_lr_ratio:
        remedy = "Add `cosine_min_lr_ratio: 0.1`"
        yield ("cosine_constant_lr_ratio",), "it needs a lowest rate", remedy


@rule("lr_scheduler_kwargs", "cosine_min_lr_ratio")
def a_lowest_rate_is_said_once(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """A schedule ends at one rate."""
    kwargs, ratio = recipe.lr_scheduler_kwargs, recipe.cosine_min_lr_ratio
    path = ("cosine_min_lr_ratio",) if ratio is not None else ("lr_scheduler_kwargs", "min_lr")
    if "min_lr" in kwargs and (ratio is not None or "min_lr_rate" in kwargs):
        why = f"`lr_scheduler_kwargs` says min_lr: {kwargs['min_lr']}"
        yield path, why, "Keep one of the two"
    elif ratio is not None and kwargs.get("min_lr_rate", ratio) != ratio:
        why = f"`lr_scheduler_kwargs` says min_lr_rate: {kwargs['min_lr_rate']}"
        yield path, why, "Keep one of the two"


@rule("lr_scheduler", "lr_quadratic_warmup", "lr_div_factor")
def curves_have_their_own_keys(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """lr_quadratic_warmup is about the cosine schedule, lr_div_factor about one_cycle."""
    for key, scheduler in (("lr_quadratic_warmup", "cosine"), ("lr_div_factor", "one_cycle")):
        if getattr(recipe, key) and recipe.lr_scheduler != scheduler:
            why = f"it has no meaning with `lr_scheduler: {recipe.lr_scheduler}`"
            yield (key,), why, f"Remove it or use `lr_scheduler: {scheduler}`"


@rule(
    "jagged_restart_steps",
    "jagged_restart_warmup_steps",
    "jagged_restart_anneal_steps",
    "lr_scheduler",
)
def restarts_are_complete(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Restarts come every so many steps, and hold their warm-up and annealing."""
    warmup, anneal = recipe.jagged_restart_warmup_steps, recipe.jagged_restart_anneal_steps
    every = recipe.jagged_restart_steps
    if every is None:
        for key in ("jagged_restart_warmup_steps", "jagged_restart_anneal_steps"):
            if getattr(recipe, key):
                yield (key,), "`jagged_restart_steps` is missing", "Add it or remove this"
        return
    if (warmup or 0) + (anneal or 0) > every:
        why = "warm-up and annealing are longer than that"
        yield ("jagged_restart_steps",), why, f"Use at least {(warmup or 0) + (anneal or 0)}"
    if recipe.lr_scheduler in ("one_cycle", "reduce_lr_on_plateau"):
        why = f"`lr_scheduler: {recipe.lr_scheduler}` cannot restart"
        yield ("jagged_restart_steps",), why, "Use `lr_scheduler: cosine`"


@rule("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio", "optimizer")
def learning_rates_are_said_once(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """LoRA+, groups and rates of embeddings each divide the parameters in their own way."""
    if recipe.embedding_lr and recipe.embedding_lr_scale:
        yield ("embedding_lr_scale",), "`embedding_lr` says otherwise", "Use one of the two"
    for key in ("lr_groups", "embedding_lr", "embedding_lr_scale"):
        if recipe.loraplus_lr_ratio and getattr(recipe, key):
            yield (key,), "`loraplus_lr_ratio` divides the parameters already", "Use one of the two"
    if recipe.optimizer in (*LOW_RANK, "muon"):
        for key in ("loraplus_lr_ratio", "lr_groups", "embedding_lr", "embedding_lr_scale"):
            if getattr(recipe, key):
                why = f"`optimizer: {recipe.optimizer}` divides the parameters in its own way"
                yield (key,), why, "Use `optimizer: adamw_torch_fused`"


@rule("optimizer", "adapter")
def projections_are_for_whole_weights(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """An adapter's matrices have a low rank already."""
    if recipe.optimizer in LOW_RANK and recipe.uses_adapter:
        why = f"{recipe.optimizer} projects whole weights, which an adapter leaves frozen"
        yield ("optimizer",), why, "Use adamw_torch_fused, or train without `adapter`"


RULES = (
    warmup_is_said_once,
    saving_is_said_once,
    validating_is_said_once,
    saving_fits_its_strategy,
    validating_fits_its_strategy,
    saving_by_steps_has_steps,
    validating_by_steps_has_steps,
    validating_needs_data,
    steps_are_whole_or_a_share,
    a_lowest_rate_needs_a_cosine,
    schedulers_have_their_arguments,
    what_follows_validation_has_it,
    a_constant_end_has_a_rate,
    a_lowest_rate_is_said_once,
    curves_have_their_own_keys,
    restarts_are_complete,
    learning_rates_are_said_once,
    projections_are_for_whole_weights,
)

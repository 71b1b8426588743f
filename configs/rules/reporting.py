"""Rules about reporters beside MLflow."""

from __future__ import annotations

from collections.abc import Iterator

from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule

_NAMES = {
    "wandb": "wandb_name",
    "trackio": "trackio_run_name",
    "swanlab": "swanlab_experiment_name",
}


@rule(*_NAMES.values(), "use_wandb", "use_trackio", "use_swanlab")
def reporters_share_one_name(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Transformers gives every reporter the same name of the run."""
    names = recipe.reported_names
    if len(set(names.values())) > 1:
        first, second, *_ = names
        why = f"all reporters get one name, and `{_NAMES[first]}` says {names[first]}"
        yield (_NAMES[second],), why, "Use the same name"


@rule("use_swanlab", "swanlab_project")
def swanlab_has_a_project(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """SwanLab files runs under projects."""
    if "swanlab" in recipe.reporters and not recipe.swanlab_project:
        yield ("use_swanlab",), "`swanlab_project` is not given", "Add it"


@rule("comet_experiment_key")
def comet_keys_have_their_length(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Comet takes keys of 32 to 50 letters and digits."""
    key = recipe.comet_experiment_key
    if key and not (key.isalnum() and 32 <= len(key) <= 50):
        why = "Comet takes 32 to 50 letters and digits"
        yield ("comet_experiment_key",), why, "Remove it, for a new experiment"


RULES = (reporters_share_one_name, swanlab_has_a_project, comet_keys_have_their_length)

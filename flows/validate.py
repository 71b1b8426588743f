"""`regrow validate` and `regrow schema`: a recipe checked, and its form, without a store."""

from __future__ import annotations

import json
from collections.abc import Sequence

from regrow.configs.load import load_recipe
from regrow.flows.progress import say
from regrow.infra.settings import environment


def validate(recipe: str, overrides: Sequence[str]) -> int:
    """Print what was set, renamed or ignored, and that the recipe can run.

    Raises:
        RecipeError: with every reason why it cannot.
    """
    loaded = load_recipe(recipe, overrides, environment=environment())
    for notice in loaded.notices:
        say(str(notice))
    say(f"{recipe} can run")
    return 0


def print_schema() -> int:
    """Print the JSON Schema of recipes."""
    from regrow.configs.schema import json_schema

    # Not by `say`, which would mask what stands behind names such as comet_experiment_key.
    print(json.dumps(json_schema(), indent=1), flush=True)
    return 0

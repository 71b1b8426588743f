"""YAML and overrides to a Recipe, in three phases: rename, default, check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from regrow.configs.check import check_facts, check_rules, check_types
from regrow.configs.defaults import fill_in
from regrow.configs.draft import Draft
from regrow.configs.facts import Facts, facts_at_hand
from regrow.configs.faults import Fault, Notice, RecipeError
from regrow.configs.layers import read_layers
from regrow.configs.local_paths import expanded, find_local_paths
from regrow.configs.overrides import Overrides, apply_overrides
from regrow.configs.plain_values import NestedTooDeeplyError, copied, keep_plain_values
from regrow.configs.recipe import Recipe
from regrow.configs.rename import rename
from regrow.configs.secret_values import refuse_secrets
from regrow.configs.sharding import read_sharding


@dataclass(frozen=True)
class Loaded:
    """A recipe that can run, and how it came to be."""

    recipe: Recipe
    notices: tuple[Notice, ...]
    """What was set, renamed or ignored, and why."""
    text: str
    """The source as it was written."""
    path: Path | None = None
    """The source file, if there is one."""

    @property
    def name(self) -> str:
        """The run's name: the recipe's, else the file's without its ending."""
        return self.recipe.name or (self.path.stem if self.path else "recipe")


def load_recipe(
    path: str | Path,
    overrides: Overrides = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> Loaded:
    """The recipe in the YAML file `path`, with those it extends, changed by `overrides` (`--key
    value` words, or a map of dotted keys).

    Args:
        environment: what `${NAME}` in the recipe may name, and where the hub's cache is.

    Raises:
        RecipeError: with every reason why it cannot run.
    """
    path = expanded(path)
    draft, text = read_layers(path, environment or {})
    recipe = _finish(draft, overrides, path.absolute().parent, str(path), environment or {})
    return Loaded(recipe, _grouped(draft.notices), text, path)


def parse_recipe(
    data: Mapping[str, Any], overrides: Overrides = (), *, directory: str | Path | None = None
) -> Loaded:
    """The recipe in a map of keys, as from a form; `directory` is where relative paths start.

    Raises:
        RecipeError: with every reason why it cannot run.
    """
    if not isinstance(data, Mapping):
        fault = Fault("", None, None, f"a recipe is a map of keys, not {type(data).__name__}")
        raise RecipeError([fault])
    try:
        draft = Draft(copied(data))
    except NestedTooDeeplyError as error:
        raise RecipeError([Fault("", None, None, f"the recipe is {error}")]) from error
    text = _as_yaml(draft.data)
    where = Path(directory).absolute() if directory is not None else None
    recipe = _finish(draft, overrides, where, "recipe")
    return Loaded(recipe, _grouped(draft.notices), text)


def _finish(
    draft: Draft,
    overrides: Overrides,
    directory: Path | None,
    source: str,
    environment: Mapping[str, str] | None = None,
) -> Recipe:
    """Overrides, then the three phases; raises with all faults of all of them."""
    apply_overrides(draft, overrides)
    keep_plain_values(draft)
    refuse_secrets(draft)
    rename(draft)
    if directory is not None:
        find_local_paths(draft, directory)
    read_sharding(draft, directory)
    given = frozenset(draft.data)
    recipe = check_types(draft)
    if recipe is not None:
        recipe = fill_in(recipe, given, draft)
        check_rules(recipe, given, draft)
        check_facts(recipe, _facts(recipe, environment or {}), draft)
    if draft.faults:
        raise RecipeError(_in_order(draft.faults), source, _grouped(draft.notices))
    assert recipe is not None, "no recipe and no fault"
    return recipe


def _facts(recipe: Recipe, environment: Mapping[str, str]) -> Facts:
    """What is known without asking anyone."""
    more = recipe.tokens or recipe.special_tokens.additional_special_tokens
    with_tokens = bool(recipe.eot_tokens or (recipe.uses_adapter and more))
    places = recipe.base_model, recipe.tokenizer_config, recipe.revision_of_model
    return facts_at_hand(*places, environment, with_tokens)


def _as_yaml(data: dict[str, Any]) -> str:
    try:
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, ValueError):  # what is no YAML value: the check will name it
        return ""


def _in_order(faults: Sequence[Fault]) -> list[Fault]:
    """Faults by line, those without one last; each once."""
    unique = list({(fault.key, fault.line, fault.why): fault for fault in faults}.values())
    return sorted(unique, key=lambda fault: (fault.line is None, fault.line or 0))


def _grouped(notices: Sequence[Notice]) -> tuple[Notice, ...]:
    """Notices, with keys ignored for one reason in one line."""
    grouped: dict[Any, Notice] = {}
    for i, notice in enumerate(notices):
        place = ("ignored", notice.why) if notice.action == "ignored" else i
        before = grouped.get(place)
        keys = (before.keys if before else ()) + notice.keys
        grouped[place] = Notice(notice.action, keys, notice.why, notice.value)
    return tuple(grouped.values())

"""What decides a publication (`PublishSpec`), and what only its card tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

from regrow.infra.secrets import mask_secrets
from regrow.tasks.stage import StageError

if TYPE_CHECKING:
    from regrow.configs.recipe import Recipe

VERSION = 1
"""Raised whenever the same spec and inputs would be delivered otherwise."""


@dataclass(frozen=True)
class PublishSpec:
    """Under which name the model goes where."""

    model_name: str
    output_dir: str | None
    """Where the files go, as the recipe says it: the same text on every machine."""
    hub_model_id: str | None = None
    """owner/name on the Hugging Face hub."""
    hub_private_repo: bool = True
    """Whether that repository is made private."""
    register_as: str | None = None
    """Name in MLflow's model registry."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, model_name: str) -> PublishSpec:
        """The destinations of a recipe.

        Raises:
            StageError: when `output_dir` holds a password, which would be written into records.
        """
        return cls(
            model_name=model_name,
            output_dir=_tidy(recipe.output_dir),
            hub_model_id=recipe.hub_model_id,
            hub_private_repo=recipe.hub_private_repo,
            register_as=recipe.register_as,
        )


@dataclass(frozen=True)
class PublishPlacement:
    """Where `output_dir` is on this machine, and what the card tells of the run that published."""

    target: str | None = None
    """URL or absolute path that the files are copied to."""
    recipe_text: str = ""
    """The recipe as YAML, without secrets."""
    base_model: str | None = None
    """Local directory, or pinned place on the hub."""
    base_model_name: str | None = None
    """As the recipe names it."""
    datasets: tuple[str, ...] = ()
    """Paths or hub names, as the recipe names them."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, base_model: str | None = None) -> PublishPlacement:
        """The placement for a base model at a known place.

        A relative `output_dir` starts in the current directory.
        """
        given = recipe.given()
        text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
        output_dir = _tidy(recipe.output_dir)
        return cls(
            target=_here(output_dir) if output_dir else None,
            recipe_text=mask_secrets(text),
            base_model=base_model,
            base_model_name=recipe.base_model,
            datasets=tuple(str(dataset.path) for dataset in recipe.datasets),
        )


def _here(output_dir: str) -> str:
    return output_dir if "://" in output_dir else str(Path(output_dir).absolute())


def _tidy(output_dir: str | None) -> str | None:
    """One way of writing for one place, without looking at this machine."""
    if not output_dir:
        return None
    if "://" not in output_dir:
        return str(Path(output_dir).expanduser())
    if urlsplit(output_dir).password:
        raise StageError(
            f"output_dir: {mask_secrets(output_dir)} holds a password, which would stand in the "
            "run's records; give it to the storage driver by its own configuration or environment"
        )
    return output_dir.rstrip("/")

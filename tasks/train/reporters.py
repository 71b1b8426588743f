"""Reporters beside MLflow (W&B, TensorBoard, ...), in the words that Transformers reads. Light."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.configs.recipe import Recipe

logger = logging.getLogger(__name__)

_VARIABLES = {
    "wandb": {
        "WANDB_PROJECT": "wandb_project",
        "WANDB_ENTITY": "wandb_entity",
        "WANDB_RUN_ID": "wandb_run_id",
        "WANDB_MODE": "wandb_mode",
        "WANDB_WATCH": "wandb_watch",
    },
    "comet_ml": {
        "COMET_PROJECT_NAME": "comet_project_name",
        "COMET_WORKSPACE": "comet_workspace",
        "COMET_EXPERIMENT_KEY": "comet_experiment_key",
        "COMET_MODE": "comet_mode",
        "COMET_START_ONLINE": "comet_online",
    },
    "swanlab": {
        "SWANLAB_PROJECT": "swanlab_project",
        "SWANLAB_WORKSPACE": "swanlab_workspace",
        "SWANLAB_MODE": "swanlab_mode",
        "SWANLAB_WEB_HOST": "swanlab_web_host",
        "SWANLAB_API_HOST": "swanlab_api_host",
    },
}
"""Reporter -> {environment variable that it or Transformers reads: recipe key}."""

_MODULES = {"tensorboard": ("tensorboard", "tensorboardX")}


@dataclass(frozen=True)
class Reporters:
    """Who hears of the course of training, and how: placement, never in a key."""

    names: tuple[str, ...] = ()
    """As `TrainingArguments.report_to` takes them."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Further arguments of `TrainingArguments`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for the worker."""

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Reporters:
        """What the recipe asks for."""
        names = recipe.reporters
        if not names:
            return cls()
        run = next(iter(recipe.reported_names.values()), recipe.name)
        arguments = {"run_name": run}
        if "trackio" in names:
            arguments["project"] = recipe.trackio_project_name
            arguments["trackio_space_id"] = recipe.trackio_space_id
        environment: dict[str, str] = {}
        for name in names:
            for variable, key in _VARIABLES.get(name, {}).items():
                value = getattr(recipe, key)
                if value is not None:
                    environment[variable] = str(value)
        if "WANDB_RUN_ID" in environment:
            environment["WANDB_RESUME"] = "allow"  # a worker that is started again goes on with it
        if "tensorboard" in names:
            environment["TENSORBOARD_LOGGING_DIR"] = _runs(recipe.output_dir)
        given = {name: value for name, value in arguments.items() if value}
        return cls(names, given, environment)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Reporters:
        """The inverse of canonical JSON."""
        return cls(**{**data, "names": tuple(data["names"])}) if data else cls()

    def settings(self, known: set[str]) -> dict[str, Any]:
        """For `TrainingArguments`: the reporters whose packages are installed here.

        Args:
            known: names of the arguments that this Transformers has.
        """
        here = [name for name in self.names if _installed(name)]
        for name in self.names:
            if name not in here:
                logger.warning(
                    "nothing is reported to %s, whose package is not installed where training "
                    "runs; MLflow records the run",
                    name,
                )
        arguments = {name: value for name, value in self.arguments.items() if name in known}
        return {"report_to": here, **(arguments if here else {})}


def _installed(name: str) -> bool:
    return any(importlib.util.find_spec(module) for module in _MODULES.get(name, (name,)))


def _runs(output_dir: str | None) -> str:
    """Where TensorBoard's files go: a local directory."""
    here = output_dir is None or "://" in output_dir
    return str(Path("." if here else str(output_dir)).expanduser().absolute() / "runs")

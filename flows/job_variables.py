"""What a work pool needs to know of a deployment's runs: environment, image, GPUs, memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.configs.recipe import Recipe
from regrow.infra import settings as infra_settings
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import HOME_OF_DEPLOYMENT, Settings
from regrow.infra.store import is_url
from regrow.tasks.stage import StageError

KUBERNETES = "kubernetes"
"""The type of work pool whose runs are Kubernetes Jobs."""

_TEMPLATE = Path(infra_settings.__file__).parent / "deploy" / "kubernetes" / "work-pool.json"


@dataclass(frozen=True)
class Resources:
    """What one run gets; None leaves it to the pool's template."""

    image: str | None = None
    memory: str | None = None
    """In Kubernetes' words: 64Gi."""
    gpus: int | None = None
    """Default: one for each training process that the recipe names."""


def job_variables(
    recipe: Recipe, settings: Settings, pool_type: str, wanted: Resources
) -> dict[str, Any]:
    """The variables of the pool's template that this recipe decides.

    Raises:
        StageError: for what a pool of this type cannot give.
    """
    if pool_type != KUBERNETES:
        if wanted.image or wanted.memory:
            raise StageError(
                f"--image and --memory are for Kubernetes; a {pool_type} pool runs on its worker's "
                "own machine. Leave them out, or set --pool-type kubernetes"
            )
        return {"env": _shown(_everywhere(settings) | _of_this_machine(settings))}
    # Kubernetes tells `prefect flow-run execute` to stop, which would end without this.
    env = _everywhere(settings) | {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule"}
    if settings.store_url and is_url(settings.store_url):
        env["REGROW_STORE"] = settings.store_url  # otherwise what the cluster's settings say
    for key, place in (("store", recipe.store), ("output_dir", recipe.output_dir)):
        if place and not is_url(place):
            raise StageError(
                f"{key}: {place} is a folder, and a pod's disk ends with it; name a URL such as "
                f"s3://bucket/{key}"
            )
    gpus = recipe.num_processes if wanted.gpus is None else wanted.gpus
    found = {"env": _shown(env), "gpus": gpus, "image": wanted.image, "memory": wanted.memory}
    return {name: value for name, value in found.items() if value is not None}


def base_job_template(pool_type: str) -> dict[str, Any] | None:
    """The template for a pool that is made new; None: Prefect's own."""
    if pool_type != KUBERNETES:
        return None
    return json.loads(_TEMPLATE.read_text())


def _everywhere(settings: Settings) -> dict[str, str | None]:
    return {
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
        "HF_HUB_OFFLINE": "1" if settings.hub_offline else None,
        # The shortest that Prefect allows; its own is 180 s.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }


def _of_this_machine(settings: Settings) -> dict[str, str | None]:
    store = settings.store_url or str(settings.home / "store")
    return {
        HOME_OF_DEPLOYMENT: str(settings.home),  # a worker's own REGROW_HOME comes first
        "REGROW_STORE": store if is_url(store) else str(Path(store).absolute()),
    }


def _shown(places: dict[str, str | None]) -> dict[str, str]:
    """Without what holds a password: job variables are shown on Prefect's pages."""
    return {n: v for n, v in places.items() if v is not None and mask_secrets(v) == v}

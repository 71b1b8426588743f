"""What a work pool needs to know of a deployment's runs: environment, image, GPUs, memory."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from regrow.configs.recipe import Recipe
from regrow.infra import settings as infra_settings
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import HOME_OF_DEPLOYMENT, Settings
from regrow.infra.store import is_url
from regrow.tasks.stage import StageError

KUBERNETES = "kubernetes"
"""The type of work pool whose runs are Kubernetes Jobs."""

# Where things are, for the libraries that open a store, data or a model hub. None is secret.
_ADDRESSES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "GOOGLE_CLOUD_PROJECT",
    "HF_ENDPOINT",
    "MLFLOW_S3_ENDPOINT_URL",
)

_TEMPLATE = Path(infra_settings.__file__).parent / "deploy" / "kubernetes" / "work-pool.json"


@dataclass(frozen=True)
class Resources:
    """What one run gets; None leaves it to the pool's template."""

    image: str | None = None
    memory: str | None = None
    """In Kubernetes' words: 64Gi."""
    gpus: int | None = None
    """Default: one for each training process that the recipe names."""


A_LOOK = {"gpus": 0, "cpu": "1", "memory": "2Gi"}
"""What a look at source data needs on Kubernetes: it reads some megabytes at a time."""


# A pool without template gets its worker's, once that has started; these stand in all of Prefect's.
_WORKERS_OWN = ("env", "image")


@dataclass(frozen=True)
class JobVariables:
    """What the pool's template is filled with."""

    values: dict[str, Any]
    left_out: tuple[str, ...] = ()
    """Lines for people: addresses of this machine that no run elsewhere could use."""

    def require_in(self, template: Mapping[str, Any], pool: str) -> None:
        """Raises StageError for variables that the pool would drop without a word."""
        known = template["variables"]["properties"] if template else _WORKERS_OWN
        lacking = sorted(set(self.values) - set(known))
        if lacking:
            raise StageError(
                f"--pool {pool}: its template has no variable {', '.join(lacking)}, so the pool "
                "would ignore what this recipe needs. Add it on Prefect's page of the pool "
                "(infra/deploy/kubernetes/work-pool.json shows how), or name another pool"
            )


def job_variables(
    recipe: Recipe,
    settings: Settings,
    pool_type: str,
    wanted: Resources,
    environment: Mapping[str, str],
) -> JobVariables:
    """The variables of the pool's template that this recipe decides.

    Args:
        environment: of this process, for the addresses that runs need too.

    Raises:
        StageError: for what a pool of this type cannot give.
    """
    everywhere = _everywhere(settings)
    everywhere |= {name: environment.get(name) or None for name in _ADDRESSES}
    if pool_type != KUBERNETES:
        if wanted.image or wanted.memory:
            raise StageError(
                f"--image and --memory are for Kubernetes; a {pool_type} pool runs on its worker's "
                "own machine. Leave them out, or set --pool-type kubernetes"
            )
        return JobVariables({"env": _shown(everywhere | _of_this_machine(settings))})
    # Kubernetes tells `prefect flow-run execute` to stop, which would end without this.
    env, left_out = _reachable(everywhere)
    env |= {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule"}
    if settings.store_url and is_url(settings.store_url):
        env["REGROW_STORE"] = settings.store_url  # otherwise what the cluster's settings say
    for key, place in (("store", recipe.store), ("output_dir", recipe.output_dir)):
        if place and not is_url(place):
            raise StageError(
                f"{key}: {place} is a folder, and a pod's disk ends with it; name a URL such as "
                f"s3://bucket/{key}"
            )
    if recipe.mlflow_tracking_uri and not is_reachable(recipe.mlflow_tracking_uri):
        raise StageError(
            f"mlflow_tracking_uri: {mask_secrets(recipe.mlflow_tracking_uri)} is on this machine, "
            "and a pod would look on its own; name an address that the cluster knows"
        )
    found = {"gpus": _gpus(recipe, wanted), "image": wanted.image, "memory": wanted.memory}
    found = {"env": _shown(env)} | {name: x for name, x in found.items() if x is not None}
    return JobVariables(found, left_out)


def _gpus(recipe: Recipe, wanted: Resources) -> int | None:
    gpus, processes = wanted.gpus, recipe.num_processes
    if gpus is None or processes is None:
        return processes if gpus is None else gpus
    if gpus < processes:
        raise StageError(
            f"--gpus-per-run {gpus}: num_processes is {processes}, and each process needs a GPU; "
            "raise the one or lower the other"
        )
    return gpus


def is_reachable(url: str) -> bool:
    """Whether an address means the same on another machine: no loopback, no file."""
    if url.startswith("databricks"):  # MLflow's word for a place that its own settings name
        return True
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme in ("", "file", "sqlite"):
        return False
    try:
        return not (ipaddress.ip_address(host).is_loopback or host == "0.0.0.0")
    except ValueError:  # a name
        return host != "localhost" and not host.endswith(".localhost")


def _reachable(places: dict[str, str | None]) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """What of these a pod can use; lines about what it cannot."""
    local = {
        name: value
        for name, value in places.items()
        if value and name.endswith(("_URI", "_URL", "_URL_S3", "_ENDPOINT"))
        if not is_reachable(value)
    }
    lines = tuple(
        f"{name}={mask_secrets(value)} is an address of this machine and does not go to the pods; "
        "theirs comes from the cluster's settings"
        for name, value in local.items()
    )
    return {name: value for name, value in places.items() if name not in local}, lines


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

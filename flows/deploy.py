"""`regrow deploy`: a recipe as a Prefect deployment, started by form, clock, event or new data."""

# No `from __future__ import annotations` here: it breaks Prefect flows that are served.
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate as LimitUpdate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import DeploymentApplyError
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.types.entrypoint import EntrypointType

from regrow.configs.load import Loaded
from regrow.flows.automations import ensure_automations
from regrow.flows.finetune import finetune
from regrow.flows.gpu_slots import LIMIT
from regrow.flows.job_variables import (
    A_LOOK,
    KUBERNETES,
    JobVariables,
    Resources,
    base_job_template,
    job_variables,
)
from regrow.flows.watch import watch_source
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import Settings, environment
from regrow.infra.store import is_url
from regrow.tasks.stage import StageError


@dataclass(frozen=True)
class Wish:
    """How the deployment is to be started, and where it runs."""

    pool: str = "regrow"
    pool_type: str = "process"
    """process or kubernetes."""
    cron: str | None = None
    on_event: str | None = None
    on_change: str | None = None
    """URL, file or folder of source data."""
    every: float = 60.0
    """Seconds between two looks at `on_change`."""
    gpus: int | None = None
    """GPUs that all runs share; None: no limit is set."""
    resources: Resources = field(default_factory=Resources)
    """What one run gets where the pool gives each run a machine."""


def deploy(loaded: Loaded, settings: Settings, wish: Wish) -> list[str]:
    """Make or renew the deployment; lines that say what there is now.

    Raises:
        StageError: when Prefect refuses something that was asked for.
    """
    _check(loaded, wish)
    given = (loaded.recipe, settings, wish.pool_type, wish.resources, environment())
    variables = job_variables(*given)
    try:
        return _deploy(loaded, wish, variables)
    except PrefectHTTPStatusError as error:
        code = error.response.status_code
        refused = code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
        remedy = "check PREFECT_API_AUTH_STRING" if refused else f"it says: {error.response.text}"
        raise StageError(
            f"PREFECT_API_URL: the Prefect server refuses with {code}; {mask_secrets(remedy)}"
        ) from error
    except (httpx.HTTPError, DeploymentApplyError) as error:
        raise StageError(
            f"PREFECT_API_URL: the Prefect server does not do it: {mask_secrets(str(error))}"
        ) from error


def _check(loaded: Loaded, wish: Wish) -> None:
    """Raises StageError for wishes that would fail, or wait for ever, only later."""
    if wish.on_change and mask_secrets(wish.on_change) != wish.on_change:
        raise StageError(
            "--on-change: the address holds a secret, and parameters are shown on Prefect's pages. "
            "Give the credentials in the worker's environment"
        )
    if wish.on_change and wish.pool_type == KUBERNETES and not is_url(wish.on_change):
        raise StageError(
            f"--on-change {wish.on_change}: a pod does not see this machine's files; name a URL"
        )
    if wish.on_change and not wish.every > 0:
        raise StageError(f"--every {wish.every:g}: it must be a number of seconds above 0")
    processes = loaded.recipe.num_processes or 1
    for option, gpus in (("--gpus", wish.gpus), ("--gpus-per-run", wish.resources.gpus)):
        if gpus is not None and gpus < 0:
            raise StageError(f"{option} {gpus}: it must be 0 or more")
    if wish.gpus is not None and wish.gpus < processes:
        raise StageError(
            f"--gpus {wish.gpus}: one run of this recipe uses {processes} (num_processes), and "
            "would wait for ever; raise the one or lower the other"
        )


def _deploy(loaded: Loaded, wish: Wish, variables: JobVariables) -> list[str]:
    name, told = loaded.name, list(variables.left_out)
    looks = variables.values | (A_LOOK if wish.pool_type == KUBERNETES else {})
    needed = JobVariables(looks) if wish.on_change else variables
    with get_client(sync_client=True) as client:
        told.append(_ensure_pool(client, wish, needed))
        if wish.gpus is not None:
            told.append(_ensure_limit(client, wish.gpus))
    identifier = _apply(
        finetune,
        name,
        {"recipe": _given(loaded), "name": name},
        wish,
        ConcurrencyLimitStrategy.ENQUEUE,
        triggers=_triggers(name, wish),
        cron=wish.cron,
        job_variables=variables.values,
    )
    told.append(f"deployment finetune/{name} in pool {wish.pool} (id {identifier})")
    if wish.cron:
        told.append(f"starts by itself: cron {wish.cron}")
    if wish.on_event:
        told.append(f"starts at every event {wish.on_event}")
    told += _watch(loaded, wish, looks) if wish.on_change else _unwatch(name)
    return told + ensure_automations()


def _given(loaded: Loaded) -> dict[str, Any]:
    """The recipe's keys with whole paths: a worker stands in a directory that ends with its run."""
    given = loaded.recipe.given()
    for key in ("output_dir", "store"):
        place = given.get(key)
        if place and not is_url(place):
            given[key] = str(Path(place).expanduser().absolute())
    return given


def _watch(loaded: Loaded, wish: Wish, variables: dict[str, Any]) -> list[str]:
    assert wish.on_change is not None
    # The worker stands in another directory.
    url = wish.on_change if is_url(wish.on_change) else str(Path(wish.on_change).absolute())
    _apply(
        watch_source,
        loaded.name,
        {"url": url, "name": loaded.name, "store": _given(loaded).get("store")},
        wish,
        # A look that is due while another is still at it, or was missed while no worker was there,
        # would find nothing that the next one does not: were they to queue, short intervals would
        # fill the worker with processes and keep the run that they start waiting behind them.
        ConcurrencyLimitStrategy.CANCEL_NEW,
        interval=wish.every,
        job_variables=variables,
    )
    return [f"starts when {mask_secrets(url)} has changed, looked at every {wish.every:g} s"]


def _unwatch(name: str) -> list[str]:
    """A deployment that is renewed without `on_change` is watched no longer."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(f"{watch_source.name}/{name}")
        except ObjectNotFound:
            return []
        client.delete_deployment(found.id)
    return ["its data is watched no longer"]


def _apply(
    flow: Any,
    name: str,
    parameters: dict[str, Any],
    wish: Wish,
    if_busy: ConcurrencyLimitStrategy,
    **options: Any,
) -> Any:
    try:
        deployment = flow.to_deployment(
            name=name,
            parameters=parameters,
            work_pool_name=wish.pool,
            entrypoint_type=EntrypointType.MODULE_PATH,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=if_busy),
            **options,
        )
        return deployment.apply()
    except ValueError as error:
        raise StageError(f"Prefect refuses the deployment: {error}") from error


def _triggers(name: str, wish: Wish) -> list[DeploymentEventTrigger]:
    if wish.on_event is None:
        return []
    return [DeploymentEventTrigger(name=f"{name}: {wish.on_event}", expect={wish.on_event})]


def _ensure_pool(client: SyncPrefectClient, wish: Wish, variables: JobVariables) -> str:
    try:
        pool = client.read_work_pool(wish.pool)
    except ObjectNotFound:
        template = base_job_template(wish.pool_type)
        made = WorkPoolCreate(name=wish.pool, type=wish.pool_type)
        if template is not None:
            made = made.model_copy(update={"base_job_template": template})
        variables.require_in(client.create_work_pool(made).base_job_template, wish.pool)
        return (
            f"made the {wish.pool_type} pool {wish.pool}: prefect worker start --pool {wish.pool}"
        )
    if pool.type != wish.pool_type:
        raise StageError(
            f"--pool {wish.pool}: it is a {pool.type} pool, not a {wish.pool_type} one; name "
            f"another, or set --pool-type {pool.type}"
        )
    variables.require_in(pool.base_job_template, wish.pool)
    return f"pool {wish.pool} is there"


def _ensure_limit(client: SyncPrefectClient, gpus: int) -> str:
    try:
        client.read_global_concurrency_limit_by_name(LIMIT)
        client.update_global_concurrency_limit(LIMIT, LimitUpdate(limit=gpus))
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=gpus))
    return f"all runs together use at most {gpus} GPUs (concurrency limit {LIMIT})"

"""`regrow deploy`: a recipe as a Prefect deployment, started by form, clock, event or new data."""

# No `from __future__ import annotations` here: it breaks Prefect flows that are served.
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate as LimitUpdate
from prefect.client.schemas.objects import (
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
    StateType,
)
from prefect.events import DeploymentEventTrigger
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.types.entrypoint import EntrypointType

from regrow.configs.load import Loaded
from regrow.flows.finetune import finetune
from regrow.flows.gpu_slots import LIMIT
from regrow.flows.watch import CHANGED, resource_of, watch_source
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import Settings
from regrow.infra.store import is_url
from regrow.tasks.stage import StageError

HEARTBEAT = "regrow: a run without heartbeat has crashed"
"""Name of the automation. Prefect has none by itself, and refuses to retry a run that it believes
alive (platform.md B3)."""

_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Cancelling", "Paused", "Suspended")
# More than two heartbeats of 30 s, the shortest that Prefect allows (platform.md B3).
_SILENCE = timedelta(seconds=70)
_HEARTBEAT_SECONDS = 30


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


def deploy(loaded: Loaded, settings: Settings, wish: Wish) -> list[str]:
    """Make or renew the deployment; lines that say what there is now.

    Raises:
        StageError: when Prefect refuses something that was asked for.
    """
    name = loaded.name
    told = []
    with get_client(sync_client=True) as client:
        told.append(_ensure_pool(client, wish))
        if wish.gpus is not None:
            told.append(_ensure_limit(client, wish.gpus))
    parameters = {"recipe": loaded.recipe.given(), "name": name}
    triggers = _triggers(name, wish)
    environment = _environment(settings)
    identifier = _apply(
        finetune, name, parameters, wish, triggers=triggers, cron=wish.cron, **environment
    )
    told.append(f"deployment finetune/{name} in pool {wish.pool} (id {identifier})")
    if wish.cron:
        told.append(f"starts by itself: cron {wish.cron}")
    if wish.on_event:
        told.append(f"starts at every event {wish.on_event}")
    if wish.on_change:
        # The worker stands in another directory.
        url = wish.on_change if is_url(wish.on_change) else str(Path(wish.on_change).absolute())
        watch = {"url": url, "name": name, "store": loaded.recipe.store}
        _apply(watch_source, name, watch, wish, interval=wish.every, **environment)
        told.append(
            f"starts when {mask_secrets(url)} has changed, looked at every {wish.every:g} s"
        )
    told.append(_ensure_heartbeat())
    return told


def _apply(flow: Any, name: str, parameters: dict[str, Any], wish: Wish, **options: Any) -> Any:
    try:
        deployment = flow.to_deployment(
            name=name,
            parameters=parameters,
            work_pool_name=wish.pool,
            entrypoint_type=EntrypointType.MODULE_PATH,
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
            ),
            **options,
        )
        return deployment.apply()
    except ValueError as error:
        raise StageError(f"Prefect refuses the deployment: {error}") from error


def _triggers(name: str, wish: Wish) -> list[DeploymentEventTrigger]:
    found = []
    if wish.on_event:
        found.append(
            DeploymentEventTrigger(name=f"{name}: {wish.on_event}", expect={wish.on_event})
        )
    if wish.on_change:
        found.append(
            DeploymentEventTrigger(
                name=f"{name}: data changed",
                expect={CHANGED},
                match={"prefect.resource.id": resource_of(name)},
            )
        )
    return found


def _environment(settings: Settings) -> dict[str, Any]:
    """Where the runs work, for the worker's processes. What holds a password stays out: job
    variables are shown on Prefect's pages."""
    places = {
        "REGROW_HOME": str(settings.home),
        "REGROW_STORE": settings.store_url,
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
        "HF_HUB_OFFLINE": "1" if settings.hub_offline else None,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT_SECONDS),
    }
    shown = {n: v for n, v in places.items() if v is not None and mask_secrets(v) == v}
    return {"job_variables": {"env": shown}}


def _ensure_pool(client: SyncPrefectClient, wish: Wish) -> str:
    try:
        pool = client.read_work_pool(wish.pool)
    except ObjectNotFound:
        pool = client.create_work_pool(WorkPoolCreate(name=wish.pool, type=wish.pool_type))
        return (
            f"made the {wish.pool_type} pool {wish.pool}: prefect worker start --pool {wish.pool}"
        )
    if pool.type != wish.pool_type:
        raise StageError(
            f"--pool {wish.pool}: it is a {pool.type} pool, not a {wish.pool_type} one; name "
            f"another, or set --pool-type {pool.type}"
        )
    return f"pool {wish.pool} is there"


def _ensure_limit(client: SyncPrefectClient, gpus: int) -> str:
    try:
        client.read_global_concurrency_limit_by_name(LIMIT)
        client.update_global_concurrency_limit(LIMIT, LimitUpdate(limit=gpus))
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=gpus))
    return f"all runs together use at most {gpus} GPUs (concurrency limit {LIMIT})"


def _ensure_heartbeat() -> str:
    try:
        _ = Automation.read(name=HEARTBEAT)
    except ValueError:  # Prefect's word for "there is none of that name"
        made: Any = _heartbeat()
        made.create()
    return f"a run that is silent for {_SILENCE.total_seconds():g} s is marked as crashed"


def _heartbeat() -> Automation:
    beat = "prefect.flow-run.heartbeat"
    crashed = ChangeFlowRunState(
        state=StateType.CRASHED, name=None, message="no heartbeat", force=False
    )
    return Automation(
        name=HEARTBEAT,
        trigger=EventTrigger(
            after={beat},
            expect={beat, *(f"prefect.flow-run.{state}" for state in _ENDS)},
            match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=_SILENCE,
        ),
        actions=[crashed],
    )

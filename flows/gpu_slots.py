"""GPUs shared by all runs of a Prefect server: a stage that uses some takes its number of slots."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from regrow.infra.settings import load_settings
from regrow.tasks.stage import Stage, StageError

LIMIT = "regrow-gpus"
"""Name of Prefect's global concurrency limit; where it does not exist nothing is limited."""

# Prefect's shortest: the slots of a killed run come back after it (69 s measured, platform.md B4).
_LEASE_SECONDS = 60


@contextmanager
def gpus_of(stage: Stage) -> Iterator[None]:
    """Hold as many slots as the stage uses GPUs; waits until they are free.

    Raises:
        StageError: when there are fewer in all, which no waiting would change.
    """
    wanted = _wanted(stage)
    if not wanted or load_settings().prefect_api_url is None:
        yield
        return
    if not _limited(wanted):
        yield
        return
    with concurrency(LIMIT, occupy=wanted, lease_duration=_LEASE_SECONDS, strict=False):
        yield


def _limited(wanted: int) -> bool:
    """Whether the server counts GPUs. Raises StageError when it has fewer than `wanted` in all."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            return False
    if limit.active and wanted > limit.limit:
        raise StageError(
            f"num_processes: this stage uses {wanted} GPUs, and all runs of this Prefect server "
            f"together have {limit.limit} (concurrency limit {LIMIT}); lower num_processes, or "
            "raise the limit (`regrow deploy --gpus N`)"
        )
    return limit.active


def _wanted(stage: Stage) -> int:
    if stage.name == "train":
        return stage.placement.num_processes
    return 1 if stage.name == "evaluate" else 0  # the others work on the CPU

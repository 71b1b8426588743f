"""GPUs shared by all runs of a Prefect server: a stage that uses some takes its number of slots."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.concurrency.sync import concurrency

from regrow.infra.settings import load_settings
from regrow.tasks.stage import Stage

LIMIT = "regrow-gpus"
"""Name of Prefect's global concurrency limit; where it does not exist nothing is limited."""

# Prefect's shortest: the slots of a killed run come back after it (69 s measured, platform.md B4).
_LEASE_SECONDS = 60


@contextmanager
def gpus_of(stage: Stage) -> Iterator[None]:
    """Hold as many slots as the stage uses GPUs; waits until they are free."""
    wanted = _wanted(stage)
    if not wanted or load_settings().prefect_api_url is None:
        yield
        return
    with concurrency(LIMIT, occupy=wanted, lease_duration=_LEASE_SECONDS, strict=False):
        yield


def _wanted(stage: Stage) -> int:
    if stage.name == "train":
        return stage.placement.num_processes
    return 1 if stage.name == "evaluate" else 0  # the others work on the CPU

"""A run of `regrow run` tells the user's server that it lives, in a thread that ends at once.

Prefect's own thread for this looks once a second whether the run is over, and the run's end waits
for it: half a second, on average. A run that a worker starts has Prefect's.
"""

# No `from __future__ import annotations` here: it breaks Prefect flows that are served.
import contextvars
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from prefect.context import FlowRunContext
from prefect.events import RelatedResource, emit_event
from prefect.settings import get_current_settings, temporary_settings

from regrow.infra.beside import beside
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import load_settings

_logger = logging.getLogger(__name__)

BEAT = "prefect.flow-run.heartbeat"
"""The event, as Prefect calls it."""

_every: contextvars.ContextVar[float | None] = contextvars.ContextVar("heartbeat", default=None)


@contextmanager
def ours_instead() -> Iterator[None]:
    """The flows that begin inside leave their heartbeats to `beating`."""
    before = _every.set(get_current_settings().flows.heartbeat_frequency)
    try:
        with temporary_settings({"flows.heartbeat_frequency": None}):
            yield
    finally:
        _every.reset(before)


@contextmanager
def beating() -> Iterator[None]:
    """Inside, the flow run's heart beats, if it is to and somebody may listen.

    Nobody does at a server of this run's own, which ends with it.
    """
    every, context = _every.get(), FlowRunContext.get()
    if every is None or context is None or load_settings().prefect_api_url is None:
        yield
        return
    resource, related = _event_of(context)

    def beat(over: threading.Event) -> None:
        while True:
            try:
                emit_event(BEAT, resource, related=related)
            except Exception as error:  # noqa: BLE001 (the next one may be heard)
                _logger.warning("a heartbeat was not sent: %s", mask_secrets(str(error)))
            if over.wait(every):
                return

    # Prefect finds the server's address in the context.
    here = contextvars.copy_context()
    with beside(partial(here.run, beat), "heartbeat"):
        yield


def _event_of(context: FlowRunContext) -> tuple[dict[str, str], list[RelatedResource]]:
    """The resources of the event, as Prefect's own has them."""
    run, flow = context.flow_run, context.flow
    assert run is not None
    assert flow is not None
    resource = {
        "prefect.resource.id": f"prefect.flow-run.{run.id}",
        "prefect.resource.name": run.name,
    }
    of_flow = {
        "prefect.resource.id": f"prefect.flow.{run.flow_id}",
        "prefect.resource.role": "flow",
        "prefect.resource.name": flow.name,
    }
    return resource, [RelatedResource.model_validate(of_flow)]

"""A flow that looks at source data and tells Prefect when its content has changed."""

# No `from __future__ import annotations` here: it breaks Prefect flows that are served.
import json
from typing import Any

from prefect import flow
from prefect.events import emit_event

from regrow.flows.workplace import Workplace
from regrow.infra.settings import load_settings
from regrow.infra.store import expand
from regrow.tasks.stage import StageError, fingerprint

CHANGED = "regrow.data.changed"
"""Name of the event."""


def resource_of(name: str) -> str:
    """What the event is about: the data of a deployment."""
    return f"regrow.data.{name}"


@flow(name="watch-data", flow_run_name="{name}")
def watch_source(url: str, name: str, store: str | None = None) -> Any:
    """Compare the content below `url` with what was there before; the first look only remembers.

    Raises:
        StageError: when there is nothing at `url`.
    """
    place = Workplace(load_settings(), store)
    files = expand(url)
    if not files:
        raise StageError(f"{url}: there is nothing to watch; check the address")
    digest = fingerprint({file: place.memo.sha256(file) for file in files})
    note = f"watch/{name}.json"
    before = _remembered(place, note)
    if before == digest:
        return None
    if before is not None:
        payload = {"url": url, "digest": digest}
        emit_event(CHANGED, {"prefect.resource.id": resource_of(name)}, payload=payload)
    # After the event: told twice starts a run that finds all its stages done, not told starts none.
    place.artifacts.store.write_bytes(note, json.dumps({"digest": digest}).encode())
    return None


def _remembered(place: Workplace, note: str) -> str | None:
    try:
        return json.loads(place.artifacts.store.read_bytes(note))["digest"]
    except FileNotFoundError:
        return None

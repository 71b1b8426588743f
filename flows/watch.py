"""A flow that looks at source data and starts a deployment when its content has changed."""

# No `from __future__ import annotations` here: it breaks Prefect flows that are served.
import json
from typing import Any

from prefect import flow
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.runtime import deployment, flow_run

from regrow.flows.workplace import Workplace
from regrow.infra.settings import load_settings, quiet_environment
from regrow.infra.store import expand, identity, is_url
from regrow.tasks.stage import StageError, fingerprint

CHANGED = "regrow.data.changed"
"""Name of the event, for whoever wants to hear of it."""


@flow(name="watch-data", flow_run_name="{name}")
def watch_source(url: str, name: str, store: str | None = None) -> Any:
    """Compare the content below `url` with what was there before; the first look only remembers.

    Args:
        name: of the deployment to start.

    Raises:
        StageError: when there is nothing at `url`.
    """
    quiet_environment()  # a worker starts this flow without any command of ours
    place = Workplace(load_settings(), store)
    files = expand(url)
    if not files:
        raise StageError(f"{url}: there is nothing to watch; check the address")
    note = f"watch/{name}.json"
    # Of another address, or of a watch that was given up meanwhile, nothing is to be remembered.
    this = {"url": url, "deployment": deployment.id}
    before = _remembered(place, note)
    if {key: before.get(key) for key in this} != this:
        before = {}
    seen = _look(place, files, before.get("files", {}))
    digest = fingerprint({file: sha256 for file, (_, _, sha256) in seen.items()})
    if before.get("digest") == digest:
        return None
    if before:
        # Started by a call that is answered. An event is sent and forgotten, and a busy server on
        # SQLite drops some ("database is locked", then its dead letters: seen on two cores).
        run_deployment(
            f"finetune/{name}",
            timeout=0,  # it starts; nobody waits for its end
            as_subflow=False,
            tags=[CHANGED],
            idempotency_key=flow_run.id,
        )
        payload = {"url": url, "digest": digest}
        emit_event(CHANGED, {"prefect.resource.id": f"regrow.data.{name}"}, payload=payload)
    # Last: told twice starts a run that finds all its stages done, not told starts none.
    known = this | {"digest": digest, "files": seen}
    place.artifacts.store.write_bytes(note, json.dumps(known).encode())
    return None


def _look(
    place: Workplace, files: list[str], before: dict[str, list[Any]]
) -> dict[str, tuple[int, str, str]]:
    """{file: (bytes, mark, sha256)}; what the store knows of a URL that has not changed is not read
    again. (A pod's own memory ends with it, and the next look is another pod's.)"""
    seen = {}
    for file in files:
        size, mark = identity(file)
        known = before.get(file, [])
        same = is_url(file) and mark and known[:2] == [size, mark]
        seen[file] = (size, mark, known[2] if same else place.memo.sha256(file))
    return seen


def _remembered(place: Workplace, note: str) -> dict[str, Any]:
    try:
        return json.loads(place.artifacts.store.read_bytes(note))
    except FileNotFoundError:
        return {}

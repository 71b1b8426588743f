"""A run that is killed leaves no process behind, and nobody who keeps its lease alive."""

from __future__ import annotations

import os
import signal
import time

import pytest

from regrow.flows.workplace import Workplace
from regrow.infra.lease import Lease
from regrow.infra.settings import load_settings
from tests.flows.conftest import Place
from tests.flows.test_interrupt import processes_of
from tests.services.whole_platform import PATIENCE, eventually

pytestmark = [pytest.mark.services, pytest.mark.extended]

LEASE_SECONDS = 6
STEPS = 3000


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_leaves_no_process_and_no_lease(place: Place, kill: signal.Signals):
    place.env["REGROW_LEASE_SECONDS"] = str(LEASE_SECONDS)
    place.write_recipe(max_steps=STEPS, save_steps=25, eval_steps=STEPS, logging_steps=25)
    process = place.start("train", str(place.recipe))
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "is safe" in line:
            break
    os.kill(process.pid, kill)  # of the run alone: what it started must notice by itself
    rest, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0, "".join(said) + rest
    eventually(lambda: not processes_of(place), lambda: str(processes_of(place)), PATIENCE)

    store = Workplace(load_settings(), str(place.root / "home" / "store")).artifacts.store
    (key,) = store.folders("checkpoints")
    assert Lease(store, f"stages/{key}", LEASE_SECONDS).holder() is None
    before = beats(store, key)
    time.sleep(LEASE_SECONDS / 2)  # more than a heartbeat: a third of the lease
    assert beats(store, key) == before


def beats(store, key: str) -> dict[str, bytes]:
    folder = f"leases/stages/{key}"
    return {name: store.read_bytes(f"{folder}/{name}") for name in store.sizes(folder)}

"""A deployed recipe starts by form, clock, event and new data, on a real Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flows.conftest import Place, kill_tree

pytestmark = pytest.mark.extended

PORT = 4300 + os.getpid() % 500


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Variables that name a running server; its database is a file of its own."""
    home = tmp_path_factory.mktemp("prefect")
    url = f"http://127.0.0.1:{PORT}/api"
    env = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    # Services look every few seconds instead of every minute, so that a test need not wait.
    env |= {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(PORT)]
    log = (home / "server.log").open("w")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, process_group=0)
    try:
        wait(lambda: answers(url), 120, home / "server.log")
        yield {"PREFECT_API_URL": url, "PREFECT_HOME": str(home)}
    finally:
        kill_tree(process)


def answers(url: str) -> bool:
    import urllib.request

    try:
        urllib.request.urlopen(f"{url}/health", timeout=2).close()
    except OSError:
        return False
    return True


def wait(ready: Callable[[], object], seconds: float, log: Path | None = None) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, log.read_text()[-3000:] if log else "it did not happen"
        time.sleep(1)


@pytest.fixture
def deployed(place: Place, server, tmp_path) -> Iterator[Place]:
    """A place whose commands use the server, with a worker for the pool `regrow`."""
    here = Place(place.root, place.recipe, place.env | server)
    first = here.regrow("deploy", str(here.recipe), "--gpus", "1")
    assert first.returncode == 0, first.stdout
    log = (tmp_path / "worker.log").open("w")
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "regrow"]
    # Asks every second: the default of ten only makes the test longer.
    env = here.env | {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    worker = subprocess.Popen(command, env=env, stdout=log, stderr=log, process_group=0)
    try:
        yield here
    finally:
        kill_tree(worker)


def api(server: dict[str, str], path: str, body: dict) -> list[dict] | dict:
    import json
    import urllib.request

    request = urllib.request.Request(
        f"{server['PREFECT_API_URL']}/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


def runs(server: dict[str, str], flow: str = "finetune") -> list[dict]:
    return api(server, "flow_runs/filter", {"flows": {"name": {"any_": [flow]}}})  # type: ignore[return-value]


def ended(server: dict[str, str], count: int) -> bool:
    return sum(run["state_type"] == "COMPLETED" for run in runs(server)) >= count


def test_form_event_data_and_clock_start_the_pipeline(deployed: Place, server):
    (deployment,) = api(server, "deployments/filter", {})  # type: ignore[misc]
    form = deployment["parameter_openapi_schema"]["definitions"]["Recipe"]["properties"]
    assert form["learning_rate"]["description"].startswith("Highest learning rate")

    # By form, with one field changed.
    recipe = deployment["parameters"]["recipe"] | {"max_steps": 2}
    api(
        server,
        f"deployments/{deployment['id']}/create_flow_run",
        {"parameters": {"recipe": recipe}},
    )
    wait(lambda: ended(server, 1), 180)
    assert list((deployed.root / "home" / "store" / "stages").iterdir())

    # By event, and by data that has changed.
    data = str(deployed.root / "rows.jsonl")
    words = ["--on-event", "data.landed", "--on-change", data, "--every", "5"]
    done = deployed.regrow("deploy", str(deployed.recipe), *words)
    assert done.returncode == 0, done.stdout
    event = {"event": "data.landed", "resource": {"prefect.resource.id": "test"}, "payload": {}}
    event |= {"id": "00000000-0000-4000-8000-000000000001"}
    api(server, "events", [event | {"occurred": now()}])  # type: ignore[arg-type]
    wait(lambda: ended(server, 2), 180)
    wait(lambda: any(r["state_type"] == "COMPLETED" for r in runs(server, "watch-data")), 120)
    with (deployed.root / "rows.jsonl").open("a") as file:
        file.write((deployed.root / "rows.jsonl").read_text().splitlines()[0] + "\n")
    wait(lambda: ended(server, 3), 240)

    # By the clock: every minute.
    assert deployed.regrow("deploy", str(deployed.recipe), "--cron", "* * * * *").returncode == 0
    wait(lambda: ended(server, 4), 200)


def now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat()


def test_a_faulty_form_ends_in_failed_with_the_faults(deployed: Place, server):
    (deployment,) = api(server, "deployments/filter", {"flows": {"name": {"any_": ["finetune"]}}})  # type: ignore[misc]
    recipe = deployment["parameters"]["recipe"] | {"save_steps": 3, "saves_per_epoch": 2}
    path = f"deployments/{deployment['id']}/create_flow_run"
    run = api(server, path, {"parameters": {"recipe": recipe}})
    identifier = run["id"]  # type: ignore[call-overload]
    find = {"flow_runs": {"id": {"any_": [identifier]}}}
    wait(lambda: api(server, "flow_runs/filter", find)[0]["state_type"] == "FAILED", 120)
    assert "saves_per_epoch" in api(server, "flow_runs/filter", find)[0]["state"]["message"]


def test_without_a_server_that_stays_it_says_so(place: Place):
    done = place.regrow("deploy", str(place.recipe))
    assert done.returncode == 1
    assert "PREFECT_API_URL" in done.stdout

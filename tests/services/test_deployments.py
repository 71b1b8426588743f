"""What starts and stops a deployed run: form, clock, new data; preemption, pause, cancellation."""

from __future__ import annotations

import json
import re
import signal
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from regrow.flows.workplace import Workplace
from regrow.infra.lease import Lease
from regrow.infra.settings import load_settings
from tests.conftest import ROOT
from tests.flows.conftest import Place, rows
from tests.services.whole_platform import PATIENCE, Platform, Worker, eventually

STEPS = 3000
"""More than a test waits for: the runs are stopped on the way."""


def place_on(place: Place, platform: Platform) -> Place:
    return Place(place.root, place.recipe, place.env | platform.env)


def deploy(place: Place, *words: str) -> str:
    done = place.regrow("deploy", str(place.recipe), *words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def last_resume(worker: Worker) -> int:
    return int(re.findall(r"resuming after step (\d+) of", worker.said())[-1])


@pytest.mark.extended
def test_stopped_run_keeps_its_checkpoint_and_goes_on(place: Place, platform: Platform, tmp_path):
    here = place_on(place, platform)
    here.write_recipe(max_steps=STEPS, save_steps=25, eval_steps=STEPS, logging_steps=25)
    deploy(here, "--pool", "stops", "--gpus", "1")
    env = here.env | {"REGROW_STORE": str(here.root / "home" / "store")}
    artifacts = Workplace(load_settings(), env["REGROW_STORE"]).artifacts

    def nothing_left() -> bool:
        return not worker.survivors()

    with Worker(tmp_path / "worker", env, "stops") as worker:
        run_id = platform.start_run("tiny")
        seen = worker.await_line("is safe")

        # Preempted: the machine tells the process to stop. A worker takes the run up by itself.
        (process,) = worker.flows()
        process.send_signal(signal.SIGTERM)
        seen = worker.await_line("resuming after step", seen)
        assert "Preempted" in platform.states(run_id)
        steps = [last_resume(worker)]
        seen = worker.await_line("is safe", seen)

        # Paused on Prefect's page: training stops now, not when it is through.
        platform.set_state(
            run_id, type="PAUSED", name="Suspended", state_details={"pause_reschedule": True}
        )
        eventually(nothing_left, lambda: f"alive: {worker.survivors()}", PATIENCE)
        assert platform.run(run_id)["state_type"] == "PAUSED"
        platform.post(f"flow_runs/{run_id}/resume", {})
        seen = worker.await_line("resuming after step", seen)
        steps.append(last_resume(worker))
        seen = worker.await_line("is safe", seen)

        # Cancelled: no process and no lease is left, the checkpoint is.
        platform.set_state(run_id, type="CANCELLING", name="Cancelling")
        platform.await_state(run_id, "Cancelled")
        eventually(nothing_left, lambda: f"alive: {worker.survivors()}", PATIENCE)
        (train,) = artifacts.store.folders("checkpoints")
        assert Lease(artifacts.store, f"stages/{train}", 30).holder() is None

        # Retried on Prefect's page.
        platform.set_state(run_id, type="SCHEDULED", name="AwaitingRetry")
        seen = worker.await_line("resuming after step", seen)
        steps.append(last_resume(worker))
        worker.await_line("is safe", seen)
        platform.set_state(run_id, type="CANCELLING", name="Cancelling")
        platform.await_state(run_id, "Cancelled")

    # And from the command line, which finds the very same stages.
    asked = here.start("train", str(here.recipe))
    assert asked.stdout is not None
    for line in asked.stdout:
        if found := re.search(r"resuming after step (\d+) of", line):
            steps.append(int(found[1]))
            break
    asked.terminate()
    rest, _ = asked.communicate(timeout=PATIENCE)
    assert "run the same command again" in rest
    assert steps == sorted(steps)
    assert len(steps) == 4
    stages = platform.stage_states(run_id)
    assert stages["prepare"] == ["Completed", "Cached", "Cached", "Cached"]


@pytest.mark.extended
def test_form_event_clock_and_new_data_each_start_a_run(place: Place, platform: Platform, tmp_path):
    here = place_on(place, platform)
    data = here.root / "rows.jsonl"
    deploy(here, "--pool", "starts", "--on-event", "data.landed")
    form = platform.deployment("tiny")["parameter_openapi_schema"]["definitions"]["Recipe"]
    described = form["properties"]["learning_rate"]["description"]
    assert described.startswith("Highest learning rate")
    with Worker(tmp_path / "worker", here.env, "starts"):
        # By form, with a field changed, and with fields that contradict each other.
        good = platform.start_run("tiny", {"max_steps": 2})
        bad = platform.start_run("tiny", {"save_steps": 3, "saves_per_epoch": 2})
        platform.await_state(good, "Completed")
        assert "saves_per_epoch" in platform.await_state(bad, "Failed")["state"]["message"]

        # From here on what starts by itself does the same two steps.
        here.write_recipe(max_steps=2)
        deploy(here, "--pool", "starts", "--on-event", "data.landed")
        landed = {"event": "data.landed", "resource": {"prefect.resource.id": "test"}}
        landed |= {"payload": {}, "id": str(uuid.uuid4())}
        platform.post("events", [landed | {"occurred": datetime.now(UTC).isoformat()}])
        by_event = await_run(platform, by_automation)
        assert all_cached(platform, by_event)

        assert "cron * * * * *" in deploy(here, "--pool", "starts", "--cron", "* * * * *")
        by_clock = await_run(platform, lambda run: run["auto_scheduled"])
        assert all_cached(platform, by_clock)

        told = deploy(here, "--pool", "starts", "--on-change", str(data), "--every", "10")
        assert "has changed, looked at every 10 s" in told
        eventually(
            lambda: [r for r in platform.runs("tiny", "watch-data") if done(r)],
            lambda: str(platform.runs("tiny", "watch-data")),
            PATIENCE,
        )
        assert not [run for run in platform.runs("tiny") if by_data(run)]
        with data.open("a") as file:
            file.write(json.dumps(rows(41)[-1]) + "\n")
        changed = await_run(platform, by_data)
        assert platform.stage_states(changed)["prepare"] == ["Completed"]  # not Cached
        assert len([run for run in platform.runs("tiny") if by_data(run)]) == 1

    assert "watched no longer" in deploy(here, "--pool", "starts")
    assert not platform.post("deployments/filter", {"flows": {"name": {"any_": ["watch-data"]}}})


@pytest.mark.services
def test_kubernetes_pool_gets_our_template_and_its_runs_their_resources(
    place: Place, platform: Platform
):
    here = place_on(place, platform)
    here.write_recipe(num_processes=2, output_dir="s3://models/tiny", store="s3://store/regrow")
    pod = ["--image", "registry.example.com/regrow:1", "--memory", "96Gi"]
    deploy(here, "--pool", "cluster", "--pool-type", "kubernetes", *pod)
    template = json.loads((ROOT / "infra/deploy/kubernetes/work-pool.json").read_text())
    assert platform.get("work_pools/cluster")["base_job_template"] == template
    given = platform.deployment("tiny")["job_variables"]
    assert (given["gpus"], given["image"], given["memory"]) == (2, pod[1], "96Gi")
    assert str(here.root) not in str(given)


def done(run: dict[str, Any]) -> bool:
    return run["state_name"] == "Completed"


def by_automation(run: dict[str, Any]) -> bool:
    return (run["created_by"] or {}).get("type") == "AUTOMATION"


def by_data(run: dict[str, Any]) -> bool:
    return "regrow.data.changed" in run["tags"]


def all_cached(platform: Platform, run_id: str) -> bool:
    return all(states == ["Cached"] for states in platform.stage_states(run_id).values())


def await_run(platform: Platform, which: Callable[[dict[str, Any]], bool]) -> str:
    """Wait until such a run has completed; its id."""
    (run, *_) = eventually(
        lambda: [run for run in platform.runs("tiny") if which(run) and done(run)],
        lambda: str([(run["state_name"], run["created_by"]) for run in platform.runs("tiny")]),
        PATIENCE,
    )
    return run["id"]

"""Ctrl-C and SIGTERM end a run cleanly: nothing is left running, and the next run goes on."""

import os
import re
import signal
import time

import psutil
import pytest

from regrow.infra.tracking import Tracker


def processes_of(place) -> list[str]:
    """Command lines of living processes that belong to this place."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("REGROW_HOME") == place.env["REGROW_HOME"]:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


# A machine with other work on it is up to ten times slower: only a hang should fail here.
PATIENCE = 300


@pytest.mark.parametrize(
    ("how", "moment"),
    [
        pytest.param("ctrl-c", "[prepare] starts", marks=pytest.mark.slow),
        pytest.param("terminate", "[prepare] starts", marks=pytest.mark.extended),
        pytest.param("ctrl-c", "checkpoint of step 2 is safe", marks=pytest.mark.extended),
        pytest.param("terminate", "checkpoint of step 2 is safe", marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_leaves_nothing_behind_and_goes_on(place, how, moment):
    # So long that training is not through by the time that its line is read and answered.
    steps = 100 if "step 2" in moment else 2
    place.write_recipe(max_steps=steps, save_steps=2, eval_steps=steps)
    process = place.start("train", str(place.recipe))
    said = []
    for line in process.stdout:
        said.append(line)
        if moment in line:
            break
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    else:
        process.terminate()
    rest, _ = process.communicate(timeout=PATIENCE)
    output = "".join(said) + rest
    assert process.returncode != 0
    assert "run the same command again" in output
    assert "Traceback" not in output
    end = time.monotonic() + PATIENCE
    while processes_of(place) and time.monotonic() < end:
        time.sleep(0.2)
    assert processes_of(place) == []
    tracker = Tracker(f"sqlite:///{place.root}/home/mlflow.db", "regrow")
    assert tracker.find_runs("attributes.status = 'RUNNING'") == []
    again = place.regrow("train", str(place.recipe), timeout=3 * PATIENCE)
    assert again.returncode == 0, again.stdout
    if "step 2" in moment:
        assert "resuming after step" in again.stdout


@pytest.mark.extended
def test_run_that_is_out_of_time_asks_to_be_started_again(place):
    place.write_recipe(max_steps=100_000, save_steps=50_000, eval_steps=50_000, time_limit=0.05)
    place.write_recipe(logging_steps=50)
    for _ in range(2):
        done = place.regrow("train", str(place.recipe), timeout=3 * PATIENCE)
        assert done.returncode == 75, done.stdout
        assert re.search(r"stopped before its end: .*time_limit.* after step \d+", done.stdout)
    assert "resuming after step" in done.stdout
    assert "Traceback" not in done.stdout

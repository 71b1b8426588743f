"""Ctrl-C and SIGTERM end a run cleanly: nothing is left running, and the next run goes on."""

import os
import re
import signal
import subprocess
import time

import psutil
import pytest

from regrow.infra.tracking import Tracker
from tests.flows.conftest import kill_tree


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


def said_until(process: subprocess.Popen, moment: str) -> str:
    """The process's output up to and with the line of that moment, or all."""
    said = []
    for line in process.stdout:
        said.append(line)
        if moment in line:
            break
    return "".join(said)


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
    # So long that training is not through by the time that the line is read and answered, however
    # little of the machine this reader gets. Nobody waits for its end.
    place.write_recipe(max_steps=10_000, save_steps=2, eval_steps=10_000)
    process = place.start("train", str(place.recipe))
    said = said_until(process, moment)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    else:
        process.terminate()
    rest, _ = process.communicate(timeout=PATIENCE)
    output = said + rest
    assert process.returncode != 0
    assert "run the same command again" in output
    assert "Traceback" not in output
    end = time.monotonic() + PATIENCE
    while processes_of(place) and time.monotonic() < end:
        time.sleep(0.2)
    assert processes_of(place) == []
    tracker = Tracker(f"sqlite:///{place.root}/home/mlflow.db", "regrow")
    assert tracker.find_runs("attributes.status = 'RUNNING'") == []
    goes_on = "resuming after step" if "step 2" in moment else "[train] starts"
    again = place.start("train", str(place.recipe))
    output = said_until(again, goes_on)
    kill_tree(again)
    assert goes_on in output


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

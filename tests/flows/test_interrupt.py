"""Ctrl-C and SIGTERM end a run cleanly: nothing is left running, and the next run goes on."""

import os
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


@pytest.mark.extended
@pytest.mark.parametrize("how", ["ctrl-c", "terminate"])
@pytest.mark.parametrize("moment", ["[prepare] starts", "checkpoint of step 2 is safe"])
def test_interrupted_run_leaves_nothing_behind_and_goes_on(place, how, moment):
    process = place.start("run", str(place.recipe))
    said = []
    for line in process.stdout:
        said.append(line)
        if moment in line:
            break
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    else:
        process.terminate()
    rest, _ = process.communicate(timeout=90)
    output = "".join(said) + rest
    assert process.returncode != 0
    assert "run the same command again" in output
    assert "Traceback" not in output
    end = time.monotonic() + 10
    while processes_of(place) and time.monotonic() < end:
        time.sleep(0.2)
    assert processes_of(place) == []
    tracker = Tracker(f"sqlite:///{place.root}/home/mlflow.db", "regrow")
    assert tracker.find_runs("attributes.status = 'RUNNING'") == []
    again = place.regrow("run", str(place.recipe))
    assert again.returncode == 0, again.stdout
    if "step 2" in moment:
        assert "resuming after step" in again.stdout

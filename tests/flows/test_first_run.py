"""A home's first run makes its databases: beside each other, once, and whoever is killed at it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from regrow.flows.run_command import _server
from regrow.infra.settings import SettingError, load_settings
from tests.flows.conftest import Place, kill_tree

SEED = 20261122
# Runs the recipe up to where it waits for the server, which here is none.
_UNTIL_THE_SERVER = """
import sys, time
from regrow.flows import run_command
from regrow.flows.prefect_server import ServerFailed
class Server:
    def __init__(self, home, prefect_home):
        self.database = home / "mlflow.db"
    def start(self):
        print("starts before:", self.database.exists(), "fsspec" in sys.modules)
    def wait(self):
        end = time.monotonic() + 100
        while not self.database.exists() and time.monotonic() < end:
            time.sleep(0.05)
        raise ServerFailed(f"waited for after: {self.database.exists()}")
run_command.PrivateServer = Server
sys.exit(run_command.run_recipe(sys.argv[1], []))
"""


def test_mlflows_database_is_made_while_the_server_comes_up(place):
    done = subprocess.run(
        [sys.executable, "-c", _UNTIL_THE_SERVER, str(place.recipe)],
        cwd=place.root,
        env=place.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "starts before: False False" in done.stdout
    assert "error: waited for after: True" in done.stderr


def test_a_home_that_can_hold_nothing_is_named(tmp_path):
    (file := tmp_path / "file").touch()
    settings = replace(load_settings(), home=file / "home", prefect_api_url=None)
    with pytest.raises(SettingError, match=r"REGROW_HOME: .*/file/home can hold nothing"):
        _server(settings)


def test_a_home_that_is_there_and_can_hold_nothing_is_named():
    settings = replace(load_settings(), home=Path("/proc"), prefect_api_url=None)
    with pytest.raises(SettingError, match=r"REGROW_HOME: /proc can hold nothing"):
        _server(settings)


def test_a_home_of_prefects_that_can_hold_nothing_is_named(tmp_path, monkeypatch):
    (file := tmp_path / "file").touch()
    monkeypatch.setenv("PREFECT_HOME", str(file / "prefect"))
    settings = replace(load_settings(), home=tmp_path / "home", prefect_api_url=None)
    with pytest.raises(SettingError, match=r"PREFECT_HOME: .*/file/prefect can hold nothing"):
        _server(settings)


def begun(place: Place) -> subprocess.Popen[str]:
    return place.start("preprocess", str(place.recipe))


@pytest.mark.extended
@pytest.mark.parametrize("round_", range(3))
def test_databases_whose_making_was_killed_are_made_by_the_next_run(place, round_):
    """Right after it, while what the killed run has started may still be at work."""
    draw = random.Random(SEED + round_)
    home = place.root / "prefect"
    for _ in range(2):
        process = begun(place)
        while not list(home.glob("prefect.db*")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 4))
        if draw.random() < 0.5:
            kill_tree(process)
        else:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(30)
    done = place.regrow("preprocess", str(place.recipe), timeout=600)
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout


@pytest.mark.extended
def test_first_runs_that_begin_at_once_share_what_they_make(place):
    both = [begun(place), begun(place)]
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert not [output for output in outputs if "warning" in output]

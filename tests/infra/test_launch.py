"""Workers are started, heard, and ended: their real error comes back and no process stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from regrow.infra.launch import WorkerFailed, _stopped_by, run_workers

FAILING = """
import os
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"])
    if os.environ["RANK"] == "0":
        raise ValueError("datasets.0: the real reason")

main()
"""

SLEEPING = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(120)
"""

LAUNCHING = """
import sys
from pathlib import Path
from regrow.infra.launch import run_workers
log = Path(sys.argv[1], "log")
run_workers("sleeping", [sys.argv[1]], num_processes=2, on_line=print, log_path=log)
"""


def module(folder: Path, name: str, code: str) -> dict[str, str]:
    """Write a module; the environment in which workers find it."""
    (folder / f"{name}.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def test_error_of_the_failing_rank_comes_back_with_its_traceback(tmp_path):
    env = module(tmp_path, "failing", FAILING)
    lines: list[str] = []
    with pytest.raises(WorkerFailed, match="the real reason") as caught:
        run_workers(
            "failing",
            [],
            num_processes=1,
            on_line=lines.append,
            log_path=tmp_path / "log",
            env=env,
        )
    assert "rank 0 of 1" in lines
    assert 'raise ValueError("datasets.0: the real reason")' in caught.value.trace
    assert "rank 0 of 1" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_the_process_that_launched_it(tmp_path, death):
    env = os.environ | module(tmp_path, "sleeping", SLEEPING)
    parent = subprocess.Popen([sys.executable, "-c", LAUNCHING, str(tmp_path)], env=env)
    pids = [_wait_for(tmp_path / str(rank)) for rank in range(2)]
    parent.send_signal(death)
    parent.wait(60)
    end = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.2)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_wish_to_stop_ends_the_process():
    agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], text=True)
    stop = threading.Event()
    with _stopped_by(stop, agent):
        stop.set()
        assert agent.wait(60) == -signal.SIGTERM


def _wait_for(path: Path) -> int:
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.1)
    return int(path.read_text())

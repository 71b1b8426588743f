"""Real ranks of the worker as processes, for tests: started, killed, heard."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from regrow.infra.launch import WorkerFailed, run_workers
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.metrics import read_metrics

MODULE = "regrow.tasks.train.worker"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(Path(__file__).parents[3]),  # where MODULE is one of the tests
}
_STEP = re.compile(r"step (\d+)/\d+ \| loss")


def run_ranks(
    job: WorkerJob, ranks: int, on_line: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Train with so many ranks; the lines they said. Raises WorkerFailed."""
    job.work.mkdir(parents=True, exist_ok=True)
    job.write(job.work / "job.json")
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        on_line(line)

    run_workers(
        MODULE,
        [str(job.work / "job.json")],
        num_processes=ranks,
        on_line=hear,
        log_path=job.work / "log",
        env=_ENVIRONMENT,
    )
    return lines


def rank_pids(job: WorkerJob) -> dict[int, int]:
    """{rank: process id} of the living ranks of a job started by this process."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            words, env = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if str(job.work / "job.json") in words and "LOCAL_RANK" in env:
            found[int(env["LOCAL_RANK"])] = process.pid
    return found


def rank_pids_of(pid: int) -> dict[int, int]:
    """{local rank: process id} of the living ranks below a process."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            words, env = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if MODULE in words and "LOCAL_RANK" in env:
            found[int(env["LOCAL_RANK"])] = process.pid
    return found


class KillAtStep:
    """Sends a signal to a rank when a step is reported."""

    def __init__(self, job: WorkerJob, step: int, rank: int, how: signal.Signals) -> None:
        self._job, self._step, self._rank, self._how = job, step, rank, how
        self._pids: dict[int, int] = {}

    def __call__(self, line: str) -> None:
        found = _STEP.match(line)
        if not found:
            return
        self._pids = self._pids or rank_pids(self._job)
        if int(found[1]) == self._step:
            os.kill(self._pids[self._rank], self._how)


def run_and_kill(
    job: WorkerJob, ranks: int, step: int, rank: int, how: signal.Signals = signal.SIGKILL
) -> None:
    """Train until a step is reported, then kill a rank; the others end with it."""
    with pytest.raises(WorkerFailed) as caught:
        run_ranks(job, ranks, KillAtStep(job, step, rank, how))
    assert caught.value.signal == how.name or job.preempted_path.exists(), caught.value


def losses(path: Path) -> dict[int, float]:
    """{step: loss} of a metrics file."""
    return {r["step"]: r["loss"] for r in read_metrics(path) if "loss" in r}

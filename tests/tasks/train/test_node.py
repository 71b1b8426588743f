"""Two machines train as one: two agents on the loopback, one rank each, led by the train stage."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from regrow.infra.launch import WorkerFailed, free_port
from regrow.infra.nodes import Nodes
from regrow.infra.settings import child_environment
from regrow.tasks.stage import Stage, StageError, StageJob
from regrow.tasks.train import machines as machines_module
from regrow.tasks.train import run as stage
from regrow.tasks.train.machines import FirstMachine, most_telling
from regrow.tasks.train.part import Call, localize
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.worker import train
from tests.tasks.train.ranks import rank_pids_of


class Notes:
    """A reporter; `at_step[n]()` is called once at step n."""

    def __init__(self, at_step=None):
        self.lines, self.steps, self.at_step = [], [], dict(at_step or {})

    def progress(self, done, total, unit, note=""):
        self.steps.append(done)
        self.at_step.pop(done, lambda: None)()

    def log(self, message):
        self.lines.append(message)


def environment(rank, port):
    return {
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
        "PET_RDZV_BACKEND": "c10d",  # torchrun would go by it
        "PET_RDZV_ENDPOINT": "127.0.0.1:1",
    }


@pytest.fixture
def other_machine(tmp_path):
    """other_machine(port) -> the process of machine 1."""
    started = []

    def start(port):
        env = child_environment(environment(1, port) | {"REGROW_HOME": str(tmp_path / "home-1")})
        log = (tmp_path / "machine-1.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "regrow.tasks.train.node"],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        started.append((process, log))
        return process

    yield start
    for process, log in started:
        process.terminate()
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def stage_job(job, tmp_path, report):
    out, scratch = tmp_path / "stage-out", tmp_path / "stage-scratch"
    out.mkdir()
    scratch.mkdir()
    prepare = Stage("prepare", 1, {}, "")
    return StageJob(
        Stage("train", 1, job.spec, "", inputs={"prepare": prepare}, placement=job.placement),
        {"prepare": job.prepared},
        {},
        out,
        scratch,
        report,
        None,
        checkpoints=(tmp_path / "store").as_uri(),
        logs=tmp_path / "logs",
    )


@pytest.mark.slow
def test_two_machines_equal_one_also_when_a_rank_of_the_other_is_killed(
    make_job, tmp_path, other_machine, monkeypatch
):
    one = make_job("one", placement={"evaluation": Cadence()})
    alone = train(one)
    port = free_port()
    for name, value in environment(0, port).items():
        monkeypatch.setenv(name, value)
    other = other_machine(port)
    notes = Notes({8: lambda: os.kill(rank_pids_of(other.pid)[0], signal.SIGKILL)})
    job = stage_job(one, tmp_path, notes)
    together = stage.run(job)
    assert together["timing"]["world_size"] == 2
    assert any("started again: it was ended by SIGKILL" in line for line in notes.lines)
    assert any("resuming after step" in line for line in notes.lines), notes.lines
    for ours, theirs in zip(together["history"], alone["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    expected = load_file(one.out / "adapter_model.safetensors")
    for name, tensor in load_file(job.out / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)
    assert other.wait(90) == 0


@pytest.mark.slow
def test_a_machine_that_waits_ends_when_told(other_machine, tmp_path):
    other = other_machine(free_port())
    end = time.monotonic() + 120
    while "waiting for machine 0" not in (tmp_path / "machine-1.log").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    other.terminate()
    assert other.wait(60) == 128 + signal.SIGTERM


@pytest.fixture
def first(tmp_path):
    """Machine 0 of two, of which the second never comes."""
    nodes = Nodes(2, 0, "127.0.0.1", free_port())
    machine = FirstMachine(nodes, (tmp_path / "store").as_uri(), "stages/none", Notes())
    yield machine
    machine._meeting.close(9, "", seconds=0)


def test_a_machine_that_does_not_come_is_named(first, make_job, tmp_path):
    job = make_job("a", placement={"hang_timeout": 0.3})
    with pytest.raises(StageError, match=r"machine 1 of 2 did not come within 0\.3 s"):
        first.run(job, print, tmp_path / "log")


def test_a_machine_that_cannot_take_part_says_why(first, make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(
        machines_module.Meeting, "not_ready", lambda self, attempt: ([], ["machine 1: no store"])
    )
    with pytest.raises(StageError, match="machine 1: no store"):
        first.run(make_job("a"), print, tmp_path / "log")


def test_prepared_data_that_no_shared_store_has_is_a_fault_with_its_remedy(make_job, tmp_path):
    job = dataclasses.replace(make_job("a"), prepared=tmp_path / "elsewhere")
    call = Call(job.to_json(), (tmp_path / "store").as_uri(), "stages/none", 2, "127.0.0.1", 1)
    with pytest.raises(StageError, match="set `store` to a URL or a shared directory"):
        localize(Call.from_json(call.to_json()), tmp_path / "work")


def test_the_failure_that_the_others_follow_from_is_told(tmp_path):
    def failed(message, name=None):
        return WorkerFailed(message, 0, "", tmp_path, name)

    lost = failed("RuntimeError: Connection closed by peer [127.0.0.1]")
    killed, stopped = failed("it ended with SIGKILL", "SIGKILL"), failed("it ended", "SIGTERM")
    memory = failed("OutOfMemoryError: CUDA out of memory")
    assert most_telling([lost, killed]) is killed
    assert most_telling([stopped, lost]) is lost
    assert most_telling([lost, stopped, memory]) is memory

"""Two machines train as one: two agents on the loopback, one rank each, led by the train stage."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest
import torch
from safetensors.torch import load_file

from regrow.infra.artifacts import ArtifactStore
from regrow.infra.launch import WorkerFailed, free_port
from regrow.infra.nodes import Nodes
from regrow.infra.settings import child_environment
from regrow.tasks.stage import StageError
from regrow.tasks.train import machines as machines_module
from regrow.tasks.train import meeting as meeting_module
from regrow.tasks.train import node as node_module
from regrow.tasks.train import run as stage
from regrow.tasks.train.machines import FirstMachine, most_telling
from regrow.tasks.train.meeting import Meeting
from regrow.tasks.train.part import Call, Ended, localize
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.worker import train
from tests.tasks.train.ranks import rank_pids_of
from tests.tasks.train.stage_jobs import Notes, stage_job


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


def test_prepared_data_of_a_url_is_verified_although_it_is_there(make_job, tmp_path, monkeypatch):
    """Machine 0's cache may have the same path here, with files that were damaged since."""
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / "home"))
    url = f"memory://{tmp_path.name}-{uuid.uuid4().hex}"
    job = make_job("a")
    record = ArtifactStore.open_url(url).publish(
        "stages/ab", job.prepared, stage="prepare", spec={}, inputs={}, result={}
    )
    here = tmp_path / "here"
    shutil.copytree(job.prepared, here)
    file = next(each for each in sorted(here.rglob("*.arrow")))
    intact = file.read_bytes()
    file.write_bytes(b"damaged")
    call = Call(
        dataclasses.replace(job, prepared=here).to_json(), url, record.key, 2, "127.0.0.1", 1
    )
    found = localize(Call.from_json(call.to_json()), tmp_path / "work").prepared
    assert (found / file.relative_to(here)).read_bytes() == intact


def test_the_failure_that_the_others_follow_from_is_told(tmp_path):
    def failed(message, name=None):
        return WorkerFailed(message, 0, "", tmp_path, name)

    lost = failed("RuntimeError: Connection closed by peer [127.0.0.1]")
    killed, stopped = failed("it ended with SIGKILL", "SIGKILL"), failed("it ended", "SIGTERM")
    memory = failed("OutOfMemoryError: CUDA out of memory")
    assert most_telling([lost, killed]) is killed
    assert most_telling([stopped, lost]) is lost
    assert most_telling([lost, stopped, memory]) is memory


class Follower:
    """Machine 1's process as a thread, whose ranks are a function."""

    def __init__(self, monkeypatch, tmp_path, make_job):
        self.nodes = [
            Nodes(2, rank, "127.0.0.1", port) for port in [free_port()] for rank in (0, 1)
        ]
        self.call = Call(make_job("a").to_json(), "s3://none", "stages/none", 2, "127.0.0.1", 1)
        self.work, self.job, self.found, self.why = tmp_path / "work", make_job("a"), [], []
        self.faults, self.part = [], lambda: Ended()
        monkeypatch.setattr(meeting_module, "_POLL", 0.01)
        monkeypatch.setattr(meeting_module, "_GRACE", 0.05)
        monkeypatch.setattr(node_module, "localize", self.localize)
        monkeypatch.setattr(node_module, "take_part", lambda *args: self.part())
        self.thread = threading.Thread(target=self.follow, args=(tmp_path / "logs",), daemon=True)
        self.thread.start()

    def follow(self, logs):
        self.why.append(node_module.follow(self.nodes[1], self.work, logs))

    def localize(self, call, here):
        self.found.append(sorted(path.name for path in here.iterdir()) if here.exists() else None)
        if self.faults:
            raise self.faults.pop()
        here.mkdir(parents=True)
        return dataclasses.replace(self.job, work=here)

    def wait(self, condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture
def follower(monkeypatch, tmp_path, make_job):
    return Follower(monkeypatch, tmp_path, make_job)


def test_what_an_earlier_run_left_in_an_attempts_directory_is_removed(follower):
    stale = follower.work / "attempt-0" / "preempted.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    host = Meeting.host(follower.nodes[0])
    host.call(0, follower.call)
    follower.wait(lambda: host.ends(0))
    assert follower.found == [None]
    host.close(1, "")
    follower.thread.join(60)
    assert follower.why == [""]


def test_an_unforeseen_error_of_another_machine_is_told(follower):
    """Before its part, and in it; the machine goes on with the next attempt each time."""
    follower.faults.append(KeyError("a bug"))
    host = Meeting.host(follower.nodes[0])
    host.call(0, follower.call)
    follower.wait(lambda: not host.not_ready(0)[0])
    assert host.not_ready(0)[1] == ["machine 1: KeyError: 'a bug'"]

    def fail():
        raise ZeroDivisionError("in the middle")

    follower.part = fail
    host.call(1, follower.call)
    follower.wait(lambda: host.ends(1))
    failure = host.ends(1)[1].failure
    assert failure["message"] == "ZeroDivisionError: in the middle"
    assert "in fail" in failure["trace"]
    assert failure["signal"] is None
    host.close(2, "")
    follower.thread.join(60)
    assert follower.why == [""]


def test_machine_0_that_dies_and_comes_back_finds_the_others(follower):
    host = Meeting.host(follower.nodes[0])
    host.call(0, follower.call)
    host.call(1, follower.call)
    follower.wait(functools.partial(host.ends, 1))
    del host  # as a process that is killed: nobody has said that it is over
    again = Meeting.host(follower.nodes[0])
    again.call(0, follower.call)
    follower.wait(lambda: again.ends(0))
    again.close(1, "")
    follower.thread.join(60)
    assert follower.why == [""]
    assert follower.found == [None] * 3

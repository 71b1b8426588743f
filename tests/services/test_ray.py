"""Training through Ray: a cluster of two machines on the loopback, one worker on each."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
import torch
from safetensors.torch import load_file

from regrow.tasks.stage import StageError
from regrow.tasks.train import run as stage
from regrow.tasks.train.cluster import RayWorkers
from regrow.tasks.train.part import WORKER, Call, Ended
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.worker import train
from tests.tasks.train.conftest import (  # noqa: F401 (fixtures)
    make_job,
    model_dir,
    prepared_dir,
    tokenizer,
)
from tests.tasks.train.stage_jobs import Notes, stage_job

pytestmark = pytest.mark.services
ray = pytest.importorskip("ray")
ray_cluster = pytest.importorskip("regrow.tasks.train.ray_cluster")
machines_with = ray_cluster.machines_with


@pytest.fixture(scope="module")
def cluster():
    """Two raylets, each with two CPUs to give away and one of a resource of its own kind."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # by itself 15: beside other tests 8 minutes for 1
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        size = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 80 * 2**20}
        made = Cluster(initialize_head=True, head_node_args=size | {"include_dashboard": False})
        made.add_node(**size)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        ray.shutdown()
        made.shutdown()


def ranks():
    """Process ids of all living ranks that train below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if WORKER in words and "torch.distributed.run" not in words:
            found.append(process.pid)
    return found


@pytest.fixture
def ray_job(make_job, tmp_path):  # noqa: F811
    """ray_job(workers, report) -> the train stage's job, its checkpoints in a shared store."""

    def make(workers, report=None, **placement):
        job = make_job("ray", placement={"evaluation": Cadence()})
        return stage_job(job, tmp_path, report, ray=workers, **placement)

    return make


def test_two_machines_of_a_cluster_equal_one_also_when_a_rank_is_killed(
    cluster,
    ray_job,
    make_job,  # noqa: F811
    tmp_path,
):
    one = make_job("one", placement={"evaluation": Cadence()})
    alone = train(one)
    notes = Notes({8: lambda: os.kill(ranks()[-1], signal.SIGKILL)})
    # Of four workers' CPUs each machine has two, so that the two workers are not on one.
    job = ray_job(RayWorkers(2, {"CPU": 2}), notes)
    together = stage.run(job)
    assert together["timing"]["world_size"] == 2
    assert any("started again: it was ended by SIGKILL" in line for line in notes.lines)
    assert any("resuming after step" in line for line in notes.lines)
    for ours, theirs in zip(together["history"], alone["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    expected = load_file(one.out / "adapter_model.safetensors")
    for name, tensor in load_file(job.out / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)
    assert not list((tmp_path / "store").glob("handover/*/*"))


def test_what_a_cluster_does_not_have_is_named(cluster, ray_job):
    job = ray_job(RayWorkers(1, {"GPU": 8}), hang_timeout=1.0)
    with pytest.raises(StageError, match=r"does not have 1 times .*GPU.* 8"):
        stage.run(job)


def test_only_machines_that_can_hold_a_worker_are_counted():
    """A head node often has no GPU."""
    head = {"Alive": True, "Resources": {"CPU": 8.0}}
    gpus = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    dead = {"Alive": False, "Resources": {}}
    assert machines_with({"GPU": 8}, [head, gpus, dead, gpus]) == 2
    assert machines_with({"CPU": 4}, [head, gpus, dead]) == 2
    assert machines_with({"GPU": 16}, [head, gpus]) == 1  # which is then not found, and named


def test_an_unforeseen_error_in_a_worker_is_no_loss_of_it(monkeypatch, make_job):  # noqa: F811
    call = Call(make_job("a").to_json(), "s3://none", "stages/none", 1, "127.0.0.1", 1)

    def fail(call, work):
        raise KeyError("a bug")

    monkeypatch.setattr(ray_cluster, "localize", fail)
    ended = Ended.from_json(ray_cluster.Machine().take_part(call.to_json(), 0, "handover"))
    assert ended.failure["message"] == "KeyError: 'a bug'"
    assert ended.failure["signal"] is None

    def lost(reference):
        cause = KeyError("a bug")
        raise ray.exceptions.RayTaskError("take_part", "Traceback", cause)

    monkeypatch.setattr(ray_cluster.ray, "get", lost)
    failure = ray_cluster._ended(None).failure
    assert failure["message"] == "KeyError: 'a bug'"
    assert failure["signal"] is None

"""The worker as real processes: two ranks equal one, and a killed one loses nothing."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from regrow.infra.launch import WorkerFailed
from regrow.infra.settings import child_environment
from regrow.tasks.stage import StageError
from regrow.tasks.train import run as stage
from regrow.tasks.train.attempts import explained, memory_advice
from regrow.tasks.train.part import WORKER
from regrow.tasks.train.spec import AdapterSpec
from regrow.tasks.train.worker import train
from tests.tasks.train.killed import KillAt, Killed
from tests.tasks.train.stage_jobs import stage_job


@pytest.mark.slow
def test_two_ranks_equal_one(make_job, tmp_path):
    """21 rows in batches of 4: at the end of each epoch one rank has nothing to do."""
    one = make_job("one")
    alone = train(one)
    job = stage_job(one, tmp_path, num_processes=2)
    together = stage.run(job)
    assert together["timing"]["world_size"] == 2
    assert (together["tokens"], together["supervised_tokens"]) == (
        alone["tokens"],
        alone["supervised_tokens"],
    )
    for ours, theirs in zip(together["history"], alone["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    expected = load_file(one.out / "adapter_model.safetensors")
    found = load_file(job.out / "adapter_model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)
    assert {path.name for path in job.out.iterdir()} == {path.name for path in one.out.iterdir()}
    assert job.report.steps[-1] == (12, 12, "steps")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(make_job, tmp_path):
    one = make_job("one")
    train(one)
    job = stage_job(one, tmp_path, num_processes=2)
    with pytest.raises(Killed):
        train(make_job("killed", key=f"checkpoints/{job.stage.key}"), [KillAt(8)])
    stage.run(job)
    assert any("resuming after step 6 of 12" in line for line in job.report.lines)
    expected = load_file(one.out / "adapter_model.safetensors")
    for name, tensor in load_file(job.out / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_sigkill_loses_nothing(make_job, file_bytes):
    spec = {"adapter": AdapterSpec(r=4, alpha=8, dropout=0.2, target_linear=True)}
    undisturbed = make_job("undisturbed", spec)
    train(undisturbed)
    job = make_job("killed", spec, key="checkpoints/a")
    job.work.mkdir(parents=True)
    job.write(job.work / "job.json")
    worker = subprocess.Popen(
        [sys.executable, "-m", WORKER, str(job.work / "job.json")],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment({"OMP_NUM_THREADS": "1"}),
    )
    for line in worker.stdout:
        if line.startswith("step 8/"):
            worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    assert not job.out.exists()
    resumed = make_job("resumed", spec, key="checkpoints/a")
    assert train(resumed)["steps"] == 12
    assert file_bytes(resumed.out) == file_bytes(undisturbed.out)


@pytest.mark.slow
def test_a_fault_of_the_user_comes_back_as_one(make_job, tmp_path):
    empty = tmp_path / "no-model"
    empty.mkdir()
    job = stage_job(make_job("a"), tmp_path, base_model=str(empty))
    with pytest.raises(StageError, match=r"no-model has no config\.json"):
        stage.run(job)


def failure(message, tmp_path):
    log = tmp_path / "worker.log"
    log.write_text("first\nlast words\n")
    return WorkerFailed(message, 0, "", log)


def test_running_out_of_memory_is_explained(make_job, tmp_path):
    found = failure("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", tmp_path)
    advice = memory_advice(found, make_job("a"))
    assert "micro_batch_size" in advice
    assert "Tried to allocate" in advice


def test_other_failures_name_the_log_with_all_output(tmp_path):
    error = explained(failure("RuntimeError: boom", tmp_path))
    assert isinstance(error, WorkerFailed)
    assert "RuntimeError: boom" in str(error)
    assert str(error.log_path) in str(error)
    assert "last words" in error.log_path.read_text()


def test_a_missing_package_is_named_with_its_extra(tmp_path):
    error = explained(failure("ImportError: You need to install `bitsandbytes`", tmp_path))
    assert isinstance(error, StageError)
    assert "regrow[gpu]" in str(error)

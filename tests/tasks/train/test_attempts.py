"""Real workers of the train stage that hang or run out of memory: it goes on to the same result."""

from __future__ import annotations

import dataclasses

import psutil
import pytest

from regrow.tasks.stage import StageError
from regrow.tasks.train import part
from regrow.tasks.train import run as stage
from regrow.tasks.train.attempts import Attempts
from regrow.tasks.train.reporters import Reporters
from regrow.tasks.train.spec import AdapterSpec
from regrow.tasks.train.worker import train
from tests.tasks.train import failing_worker
from tests.tasks.train.ranks import ROOT, run_forked, run_ranks
from tests.tasks.train.stage_jobs import Notes, stage_job

DROPOUT = {"adapter": AdapterSpec(r=4, alpha=8, dropout=0.2, target_linear=True)}


class Heard(Attempts):
    """Keeps how its workers failed."""

    failures: list = []

    def after(self, failure):
        self.failures.append(failure)
        super().after(failure)


@pytest.fixture
def run_with(monkeypatch, tmp_path):
    """run_with(fault, job) -> (the stage's job, its result), each worker begun with that fault."""

    def run(fault, job):
        monkeypatch.setattr(part, "WORKER", failing_worker.__name__)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        # torchrun's wait for ranks that it told to end, 30 s; one that is stopped does not hear it
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
        monkeypatch.setattr(stage, "Attempts", Heard)
        monkeypatch.setattr(Heard, "failures", [])
        reporters = Reporters(environment={failing_worker.FAULT: fault})
        staged = stage_job(job, tmp_path, reporters=reporters)
        return staged, stage.run(staged)

    return run


@pytest.mark.slow
def test_a_rank_that_stands_still_is_ended_and_the_training_goes_on(
    make_job, run_with, file_bytes, tmp_path
):
    place = {"num_processes": 2, "micro_batch_size": 1, "hang_timeout": 5.0}
    calm = make_job("calm", DROPOUT, place)
    run_ranks(calm, 2)
    job, result = run_with("stands still", make_job("stopped", DROPOUT, place))
    said = "\n".join(job.report.lines)
    assert "the worker is started again: no step came for 5 s" in said
    assert "resuming after step 6 of 12" in said
    (stacks,) = (tmp_path / "logs").rglob("stacks-rank-*.txt")  # who is stopped writes none
    assert stacks.name == "stacks-rank-00000.txt"
    assert str(stacks) in said
    assert "in training_step" in stacks.read_text()  # where it waits for the other rank
    stopped = int((job.scratch / "train" / failing_worker.STOPPED).read_text())
    assert not psutil.pid_exists(stopped)
    assert len(Heard.failures) == 1
    assert result["timing"]["world_size"] == 2
    assert file_bytes(job.out) == file_bytes(calm.out)


@pytest.mark.slow
def test_a_worker_out_of_memory_is_followed_by_one_with_half_the_micro_batch(
    make_job, run_with, monkeypatch
):
    monkeypatch.setattr(part, "run_workers", run_forked)
    calm = train(make_job("calm"))
    starved = make_job("starved")
    job, result = run_with("small device", starved)
    assert "for micro_batch_size 2: going on with 1" in "\n".join(job.report.lines)
    assert any("resuming after step 6 of 12" in line for line in job.report.lines)
    split = ("micro_batch_size", "accumulation")
    assert [calm["timing"][name] for name in split] == [2, 2]
    assert [result["timing"][name] for name in split] == [1, 4]
    before, now = (
        {r["step"]: r["loss"] for r in run["history"] if "loss" in r} for run in (calm, result)
    )
    assert now == pytest.approx(before, abs=1e-6, rel=0)
    # The same failure where the recipe allows no other split.
    (failure,) = Heard.failures
    fixed = dataclasses.replace(starved.placement, retry_on_oom=False)
    strict = Attempts(dataclasses.replace(starved, placement=fixed), Notes(), job.scratch)
    advice = r"too little memory \(.*Tried to allocate 2\.00 GiB.*lower micro_batch_size and raise"
    with pytest.raises(StageError, match=advice):
        strict.after(failure)

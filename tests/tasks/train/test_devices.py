"""What a recipe asks of the GPUs is checked against what they are, before anything is loaded."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch

from regrow.infra.device_files import Devices
from regrow.infra.devices import Gpu
from regrow.tasks.stage import StageError
from regrow.tasks.train import part
from regrow.tasks.train.devices import DeviceFacts, check_devices, limit_memory
from regrow.tasks.train.machines import ThisMachine
from regrow.tasks.train.spec import TrainPlacement, TrainSpec
from regrow.tasks.train.worker import train

SPEC = TrainSpec("digest", "bfloat16", 1, 1.0, 1e-4)
TWO = TrainPlacement("/models/m", num_processes=2)
OLD, NEW = (DeviceFacts(2, name, its) for name, its in (("T4", (7, 5)), ("H100", (9, 0))))


def test_more_processes_than_gpus_are_refused_with_both_numbers():
    with pytest.raises(StageError, match="2 processes need as many GPUs, and this machine has 1"):
        check_devices(SPEC, TWO, dataclasses.replace(NEW, count=1))


@pytest.mark.parametrize("facts", [NEW, None])
def test_what_fits_is_not_spoken_of(caplog, facts):
    with caplog.at_level(logging.INFO):
        check_devices(SPEC, TWO, facts)
    assert not caplog.text


def test_slow_bfloat16_is_said(caplog):
    check_devices(SPEC, TWO, OLD)
    assert "T4 computes bfloat16 slowly" in caplog.text


def test_on_the_cpu_gpus_do_not_matter(caplog):
    check_devices(SPEC, dataclasses.replace(TWO, device="cpu", num_processes=9), OLD)
    assert not caplog.text


@pytest.mark.parametrize(("gib", "share"), [(20, 0.25), (7.6, 0.095), (90, 1.0)])
def test_a_limit_is_a_share_of_the_gpu_that_there_is(monkeypatch, caplog, gib, share):
    given = []
    whole = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole)
    taken = "set_per_process_memory_fraction"
    monkeypatch.setattr(torch.cuda, taken, lambda *its: given.extend(its))
    limit_memory(torch.device("cuda", 1), gib)
    assert given == [pytest.approx(share), torch.device("cuda", 1)]
    assert ("has only 80.0 GiB" in caplog.text) == (gib > 80)


def test_a_limit_of_the_gpu_s_memory_does_nothing_on_the_cpu(make_job, caplog):
    assert train(make_job("a", {"max_steps": 1}, {"gpu_memory_limit": 1.0}))["steps"] == 1
    assert "gpu_memory_limit does nothing here" in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_a_machine_says_it_for_all(monkeypatch, caplog, rank):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    limit_memory(torch.device("cpu"), 8.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (rank == 0)


@pytest.mark.parametrize("has_some", [True, False])
def test_ranks_see_the_gpus_of_their_run_alone_and_hold_them(make_job, monkeypatch, has_some):
    given = {}
    monkeypatch.setattr(part, "run_workers", lambda *_args, **options: given.update(options))
    gpus = tuple(Gpu("H100", 80 * 2**30, word, i, word) for i, word in enumerate(("GPU-a", "3")))
    job = make_job("placed")
    job.work.mkdir(parents=True, exist_ok=True)
    ThisMachine(Devices(gpus, (7, 8)) if has_some else None).run(job, print, job.work / "log")
    assert given["env"].get("CUDA_VISIBLE_DEVICES") == ("GPU-a,3" if has_some else None)
    assert given["keep"] == ((7, 8) if has_some else ())

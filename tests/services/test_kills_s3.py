"""Seeded kills of a training whose checkpoints are in S3: every result is the same to the byte."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import time

import pytest

from regrow.infra.settings import child_environment
from regrow.tasks.train.job import CheckpointPlace
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.spec import AdapterSpec
from tests.forked_ranks import Forker, Group
from tests.tasks.train.conftest import (  # noqa: F401 (fixtures)
    file_bytes,
    make_job,
    model_dir,
    prepared_dir,
    tokenizer,
)

pytestmark = pytest.mark.services

SEED = 20261122
RANKS = 2
STEPS = 24
SPEC = {"max_steps": STEPS, "adapter": AdapterSpec(r=4, alpha=8, dropout=0.2, target_linear=True)}
PLACEMENT = {"saving": Cadence(steps=2), "evaluation": Cadence(), "micro_batch_size": 1}
KILLS_OF_ONE_TRAINING = 5
ATTEMPT_SECONDS = 300.0  # one takes 3 s on an idle machine
_STEP = re.compile(rb"^step (\d+)/", re.MULTILINE)


class Killer:
    """Kills random ranks at random moments, a number of times."""

    def __init__(self, kills: int) -> None:
        self._random, self.left = random.Random(SEED), kills
        self.done: list[str] = []

    def watch(self, group: Group, log) -> None:
        """Until the kill has been done, or a rank has ended before it."""
        begin, seen = time.monotonic(), len(steps_of(log))
        early = self._random.random() < 0.25  # while it starts, restores, makes its model
        steps = 0 if early else self._random.randint(1, 6)
        delay = self._random.uniform(0, 2.0 if early else 0.2)
        rank = self._random.randrange(RANKS)
        how = self._random.choice([signal.SIGKILL, signal.SIGTERM])
        while len(steps_of(log)) - seen < steps:
            if group.ended():
                return
            assert time.monotonic() - begin < ATTEMPT_SECONDS, log.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(delay)
        if group.ended():
            return
        os.kill(group.pids[rank], how)
        self.left -= 1
        self.done.append(f"{how.name} of rank {rank} {delay:.2f} s after {steps} steps")


def steps_of(log) -> list[int]:
    return [int(number) for number in _STEP.findall(log.read_bytes())] if log.exists() else []


@pytest.fixture(scope="module")
def forker():
    env = child_environment({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    made = Forker(env, ["s3fs"])
    yield made
    made.close()


@pytest.fixture
def run_group(make_job, s3_bucket, forker, tmp_path):  # noqa: F811
    """run_group(name, key, kill) -> (exit statuses, the job): one attempt on two ranks."""
    env = s3_bucket.env | {"REGROW_HOME": str(tmp_path / "home")}

    def run(name, key, watch=lambda group, log: None):
        job = make_job(name, SPEC, PLACEMENT)
        place = CheckpointPlace(f"{s3_bucket.url}/store", f"checkpoints/{key}")
        job = dataclasses.replace(job, checkpoints=place)
        job.work.mkdir(parents=True, exist_ok=True)
        job.write(job.work / "job.json")
        log = tmp_path / f"{key}.log"
        group = Group(forker, RANKS, env, job.work / "job.json", log)
        watch(group, log)
        return group.finish(), job, log

    return run


@pytest.mark.parametrize(
    "kills", [8, pytest.param(100, marks=pytest.mark.extended)], ids=lambda n: f"{n} kills"
)
def test_killed_at_any_moment_the_adapter_is_the_same_to_the_byte(run_group, file_bytes, kills):  # noqa: F811
    statuses, calm, log = run_group("calm", "calm")
    assert statuses == [0, 0], log.read_text()[-3000:]
    expected = file_bytes(calm.out)
    killer, begin, trainings, attempts = Killer(kills), time.monotonic(), 0, 0
    while killer.left:
        trainings += 1
        name, before = f"killed-{trainings}", len(killer.done)
        while True:
            attempts += 1
            may = killer.left and len(killer.done) - before < KILLS_OF_ONE_TRAINING
            statuses, job, log = run_group(name, name, killer.watch if may else _leave)
            if statuses == [0, 0]:
                break
            assert may, f"it failed without a kill: {statuses}\n{log.read_text()[-3000:]}"
        assert file_bytes(job.out) == expected, killer.done[before:]
    print(
        f"{kills} kills in {trainings} trainings and {attempts} attempts, "
        f"{time.monotonic() - begin:.0f} s: {'; '.join(killer.done[:8])} ..."
    )


def _leave(group: Group, log) -> None:
    """Nobody is killed."""

"""The best model is the result; training stops when it gets no better, also over a resume."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from regrow.infra.artifacts import ArtifactStore
from regrow.tasks.stage import StageError
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.worker import train
from tests.tasks.train.killed import KillAt, Killed

# So fast that the validation loss soon gets worse.
FAST = {
    "learning_rate": 5e-2,
    "num_epochs": 4,
    "warmup_steps": 0,
    "lr_scheduler": "constant",
    "validation": Cadence(steps=1),
    "keep_best": True,
}


def best_of(result):
    return min(result["eval_losses"], key=lambda one: one["loss"])


def test_the_result_is_the_model_of_the_lowest_validation_loss(make_job):
    job = make_job("all", FAST)
    result = train(job)
    best = best_of(result)
    assert best["step"] < result["steps"]
    upto = make_job("upto", FAST | {"max_steps": best["step"]})
    assert best_of(train(upto)) == best
    ours, theirs = (load_file(j.out / "adapter_model.safetensors") for j in (job, upto))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_training_stops_after_so_many_validations_without_a_lower_loss(make_job):
    result = train(make_job("stops", FAST | {"early_stopping_patience": 3}))
    assert result["steps"] == best_of(result)["step"] + 3
    assert result["steps"] < 24


@pytest.mark.parametrize("saving", [1, 2])
def test_a_killed_training_stops_at_the_same_step_with_the_same_result(
    make_job, file_bytes, saving
):
    spec = FAST | {"early_stopping_patience": 3}
    place = {"saving": Cadence(steps=saving)}
    straight = make_job("straight", spec, place, key="checkpoints/a")
    result = train(straight)
    stopped = result["steps"]
    with pytest.raises(Killed):
        train(make_job("killed", spec, place, "checkpoints/b"), [KillAt(stopped - 1)])
    resumed = make_job("resumed", spec, place, key="checkpoints/b")
    assert train(resumed)["steps"] == stopped
    assert file_bytes(resumed.out) == file_bytes(straight.out)
    # Once more, from the checkpoint of the last step, if there is one.
    again = make_job("again", spec, place, key="checkpoints/b")
    assert train(again)["steps"] == stopped
    assert file_bytes(again.out) == file_bytes(straight.out)


def test_checkpoints_can_follow_the_best(make_job):
    place = {"saving": Cadence(), "save_at_best": True, "save_total_limit": None}
    job = make_job("a", FAST, place, key="checkpoints/a")
    result = train(job)
    lowest, expected = float("inf"), []
    for one in result["eval_losses"]:
        if one["loss"] < lowest:
            lowest = one["loss"]
            expected.append(one["step"])
    store = ArtifactStore.open_url(job.checkpoints.url)
    assert [int(key[-8:]) for key in store.children("checkpoints/a")] == expected


def test_a_loss_that_stays_high_ends_the_training(make_job):
    watch = {"loss_watchdog_threshold": 1.0, "loss_watchdog_patience": 2}
    job = make_job("a", placement=watch)
    with pytest.raises(StageError, match=r"loss_watchdog_threshold 1\.0 in 2 reports"):
        train(job)
    assert len([r for r in job.metrics_path.read_text().splitlines() if '"loss"' in r]) <= 2
    watch["loss_watchdog_threshold"] = 100.0
    quiet, plain = make_job("quiet", placement=watch), make_job("plain")
    train(quiet)
    train(plain)
    ours, theirs = (json.loads(j.result_path.read_text())["train_loss"] for j in (quiet, plain))
    assert ours == theirs

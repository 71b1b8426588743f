"""Reporters beside MLflow get what the recipe says of them, and training does not need them."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from regrow.configs.load import parse_recipe
from regrow.tasks.stage import canonical_json
from regrow.tasks.train.reporters import Reporters
from regrow.tasks.train.spec import TrainPlacement
from regrow.tasks.train.worker import train

RECIPE = {
    "base_model": "org/model",
    "datasets": [{"path": "org/data", "type": "alpaca"}],
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
}


def reporters(**keys) -> Reporters:
    return Reporters.from_recipe(parse_recipe(RECIPE | keys).recipe)


def test_nobody_is_told_unless_asked_for():
    assert reporters(run_name="mine") == Reporters()


def test_a_project_is_enough():
    found = reporters(wandb_project="p", wandb_entity="us", wandb_name="n", wandb_mode="offline")
    assert found.names == ("wandb",)
    assert found.arguments == {"run_name": "n"}
    assert found.environment == {
        "WANDB_PROJECT": "p",
        "WANDB_ENTITY": "us",
        "WANDB_MODE": "offline",
    }


@pytest.mark.parametrize("off", [{"use_wandb": False}, {"wandb_mode": "disabled"}])
def test_what_is_off_is_off(off):
    assert reporters(wandb_project="p", **off) == Reporters()


def test_a_run_with_an_id_goes_on_after_an_interruption():
    assert reporters(wandb_project="p", wandb_run_id="r").environment["WANDB_RESUME"] == "allow"


def test_each_reporter_is_told_in_its_own_words(tmp_path):
    found = reporters(
        run_name="mine",
        output_dir=str(tmp_path),
        use_tensorboard=True,
        trackio_project_name="t",
        trackio_space_id="us/space",
        comet_project_name="c",
        comet_online=False,
        swanlab_project="s",
        swanlab_mode="local",
    )
    assert found.names == ("tensorboard", "trackio", "comet_ml", "swanlab")
    assert found.arguments == {"run_name": "mine", "project": "t", "trackio_space_id": "us/space"}
    assert found.environment == {
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "runs"),
        "COMET_PROJECT_NAME": "c",
        "COMET_START_ONLINE": "False",
        "SWANLAB_PROJECT": "s",
        "SWANLAB_MODE": "local",
    }


def test_a_job_keeps_its_reporters():
    recipe = parse_recipe(RECIPE | {"wandb_project": "p", "run_name": "r"}).recipe
    placement = TrainPlacement.from_recipe(recipe, "/models/m")
    assert TrainPlacement.from_json(json.loads(canonical_json(placement))) == placement


def test_a_reporter_without_its_package_is_left_out_and_said(caplog):
    absent = Reporters(("surely_not_installed",), {"run_name": "r"})
    with caplog.at_level(logging.WARNING):
        assert absent.settings({"run_name"}) == {"report_to": []}
    assert "nothing is reported to surely_not_installed" in caplog.text


def test_tensorboard_gets_the_losses(make_job, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    told = Reporters(("tensorboard",))
    job = make_job("told")
    job = dataclasses.replace(job, placement=dataclasses.replace(job.placement, reporters=told))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    train(job)
    events = b"".join(path.read_bytes() for path in (tmp_path / "runs").rglob("events*"))
    assert b"train/loss" in events

"""The spec holds what decides the weights and nothing of the machine; both survive JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from regrow.configs.load import parse_recipe
from regrow.tasks.stage import StageError, canonical, fingerprint
from regrow.tasks.train.job import CheckpointPlace, WorkerJob
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.spec import AdapterSpec, TrainPlacement, TrainSpec

RECIPE = {
    "base_model": "a/b",
    "datasets": [{"path": "c/d", "type": "alpaca"}],
    "learning_rate": 2e-4,
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_modules": ["v_proj", "q_proj"],
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
}


def recipe(**changes):
    return parse_recipe(RECIPE | changes).recipe


def spec(**changes):
    return TrainSpec.from_recipe(recipe(**changes), "f" * 64)


def placement(**changes):
    return TrainPlacement.from_recipe(recipe(**changes), "/models/b", 2)


def test_the_spec_follows_the_recipe():
    found = spec(num_epochs=3, warmup_steps=10, seed=7, adam_beta2=0.95)
    assert found.global_batch_size == 8
    assert found.adapter == AdapterSpec(r=8, alpha=16, target_modules=("q_proj", "v_proj"))
    assert (found.num_epochs, found.warmup_steps, found.seed) == (3, 10, 7)
    assert (found.learning_rate, found.adam_beta2, found.dtype) == (2e-4, 0.95, "bfloat16")


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
        {"micro_batch_size": 1, "batch_size": 8, "gradient_accumulation_steps": None},
        {"num_processes": 4},
        {"save_steps": 5},
        {"logging_steps": 7},
        {"gradient_checkpointing": True},
        {"lora_target_modules": ["q_proj", "v_proj"]},
    ],
)
def test_placement_is_not_in_the_key(changes):
    given = {name: value for name, value in changes.items() if value is not None}
    removed = {name for name, value in changes.items() if value is None}
    data = {name: value for name, value in RECIPE.items() if name not in removed} | given
    other = TrainSpec.from_recipe(parse_recipe(data).recipe, "f" * 64)
    assert fingerprint(other) == fingerprint(spec())


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"learning_rate": 1e-4}, {"lora_r": 9}, {"micro_batch_size": 4}]
)
def test_what_changes_the_weights_is_in_the_key(changes):
    assert fingerprint(spec(**changes)) != fingerprint(spec())


def test_cosine_min_lr_ratio_becomes_the_scheduler_that_has_it():
    found = spec(cosine_min_lr_ratio=0.1)
    assert found.lr_scheduler == "cosine_with_min_lr"
    assert found.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


@pytest.mark.parametrize(
    ("changes", "evaluation", "saving"),
    [
        ({"save_steps": 10}, Cadence(per_epoch=1), Cadence(steps=10)),
        ({"saves_per_epoch": 2}, Cadence(per_epoch=1), Cadence(per_epoch=2)),
        ({"save_strategy": "no"}, Cadence(per_epoch=1), Cadence()),
        ({"eval_steps": 0.1}, Cadence(steps=0.1), Cadence(per_epoch=1)),
        ({"evals_per_epoch": 4}, Cadence(per_epoch=4), Cadence(per_epoch=1)),
    ],
)
def test_cadences_follow_axolotls_keys(changes, evaluation, saving):
    found = placement(val_set_size=0.1, **changes)
    assert (found.evaluation, found.saving) == (evaluation, saving)


def test_a_pattern_of_modules_stays_a_pattern():
    found = spec(lora_target_modules=r".*\.(q|v)_proj")
    assert found.adapter.target_modules == r".*\.(q|v)_proj"
    assert spec(lora_target_modules="q_proj").adapter.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    "changes",
    [{"peft_init_lora_weights": "corda"}, {"lr_scheduler": "reduce_lr_on_plateau"}],
)
def test_what_cannot_be_done_is_refused_when_planning(changes):
    with pytest.raises((StageError, ValueError), match=next(iter(changes))):
        spec(**changes)


def test_a_job_survives_its_file(tmp_path):
    job = WorkerJob(
        spec=spec(lr_scheduler_kwargs={"num_cycles": 0.5}, lora_modules_to_save=["lm_head"]),
        placement=placement(),
        prepared=Path("/p"),
        base_model=Path("/b"),
        out=Path("/o"),
        work=Path("/w"),
        checkpoints=CheckpointPlace("file:///s", "checkpoints/k"),
        tracking={"uri": "sqlite:///x", "run_id": "1"},
    )
    job.write(tmp_path / "job.json")
    assert WorkerJob.read(tmp_path / "job.json") == job
    assert json.loads(json.dumps(canonical(job.spec))) == canonical(job.spec)


def test_specs_load_nothing_heavy():
    code = (
        "import regrow.tasks.train.spec, regrow.tasks.merge.spec, sys; "
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The whole pipeline through the command line, as a person runs it."""

import re

import pytest

from regrow.infra.tracking import Tracker

STAGES = ("prepare", "train", "merge", "baseline", "evaluate", "publish")


def states(output: str) -> dict[str, str]:
    """{stage: state} of the table that ends a run."""
    found = re.findall(r"^(\w+) +(built|Cached) ", output, re.MULTILINE)
    return dict(found)


@pytest.fixture(scope="module")
def tracker_of():
    return lambda place: Tracker(f"sqlite:///{place.root}/home/mlflow.db", "regrow")


def test_pipeline_runs_then_is_cached_then_reruns_what_changed(place, tracker_of):
    first = place.regrow("run", str(place.recipe))
    assert first.returncode == 0, first.stdout
    assert states(first.stdout) == dict.fromkeys(STAGES, "built")
    assert "Traceback" not in first.stdout
    published = place.root / "outputs"
    assert (published / "model.safetensors").is_file()
    assert "Built with Regrow" in (published / "README.md").read_text()

    second = place.regrow("run", str(place.recipe))
    assert second.returncode == 0, second.stdout
    assert states(second.stdout) == dict.fromkeys(STAGES, "Cached")

    plan = place.regrow("plan", str(place.recipe), "--learning_rate", "0.02")
    assert re.search(r"train .*to run .*learning_rate: 0.01 -> 0.02", plan.stdout), plan.stdout
    assert re.search(r"prepare .*cached", plan.stdout)

    lineage = place.regrow("lineage", str(place.recipe))
    assert lineage.returncode == 0, lineage.stdout
    for stage in ("publish", "evaluate", "merge", "train", "prepare"):
        assert stage in lineage.stdout

    _check_mlflow(tracker_of(place))


def _check_mlflow(tracker: Tracker) -> None:
    parents = tracker.find_runs("tags.stage = 'flow'")
    assert [run.status for run in parents] == ["FINISHED", "FINISHED"]
    trained = tracker.find_runs("tags.stage = 'train' and tags.cached = 'false'")
    assert len(trained) == 1
    assert trained[0].params["learning_rate"] == "0.01"
    live = ("loss", "eval_loss", "learning_rate", "grad_norm")
    live += ("tokens_per_second", "supervised_tokens_per_second", "memory_gib")
    assert set(live) <= set(trained[0].metrics)
    again = tracker.find_runs("tags.stage = 'train' and tags.cached = 'true'")
    assert [run.tags["built.run_id"] for run in again] == [trained[0].run_id]
    assert again[0].tags["stage.key"] == trained[0].tags["stage.key"]


def test_full_fine_tune_publishes_whole_weights_and_registers_them(place, tracker_of):
    place.write_recipe(adapter=None, lora_r=None, lora_alpha=None, lora_dropout=None)
    place.write_recipe(lora_target_linear=None, learning_rate=1e-3, register_as="tiny")
    done = place.regrow("run", str(place.recipe))
    assert done.returncode == 0, done.stdout
    assert set(states(done.stdout)) == set(STAGES) - {"merge"}
    assert "warning" not in done.stdout
    assert (place.root / "outputs" / "model.safetensors").is_file()
    tracker = tracker_of(place)
    (trained,) = tracker.find_runs("tags.stage = 'train'")
    model, run = trained.tags["regrow.model_id"], trained.run_id
    same, other = {"stage.key": trained.tags["stage.key"]}, {"stage.key": "another"}
    assert tracker.register(model, "tiny", run, tags=other) == "2"  # so there is a version 1,
    assert tracker.register(model, "tiny", run, tags=same) == "1"  # and it is this model


def test_two_runs_at_once_build_each_stage_once(place):
    processes = [place.start("run", str(place.recipe)) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    built = [stage for output in outputs for stage, s in states(output).items() if s == "built"]
    assert sorted(built) == sorted(STAGES)

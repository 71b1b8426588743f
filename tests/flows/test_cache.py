"""What is rebuilt when something changes: that, what follows from it, and nothing else."""

import json

import pytest

from regrow.flows.progress import LineReporter
from tests.flows.conftest import rows


def keys(place) -> dict[str, str]:
    plan, _ = place.plan()
    return {stage.title: stage.key for stage in plan.stages}


def changed(place, **changes) -> set[str]:
    """Titles of the stages whose keys differ after a change of the recipe."""
    before = keys(place)
    place.write_recipe(**changes)
    after = keys(place)
    return {title for title in before if before[title] != after[title]}


AFTER_PREPARE = {"train", "merge", "baseline", "evaluate", "publish"}
AFTER_TRAIN = {"merge", "evaluate", "publish"}


def test_learning_rate_reruns_training_and_what_follows_not_prepare(place):
    assert changed(place, learning_rate=0.02) == {"train"} | AFTER_TRAIN


@pytest.mark.parametrize(
    "change",
    [
        {"logging_steps": 5},
        {"dataset_num_proc": 7},
        {"save_steps": 3},
        {"eval_steps": 2},
        {"eval_batch_size": 4},
        {"num_processes": 2},
        {"gradient_checkpointing": True},
        {"mlflow_experiment_name": "another"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_placement_and_reporting_rerun_nothing(place, change):
    assert changed(place, **change) == set()


def test_split_of_the_global_batch_reruns_nothing(place):
    assert changed(place, micro_batch_size=2, gradient_accumulation_steps=1) == set()


def test_one_row_of_data_reruns_prepare_and_all_that_follows(place):
    before = keys(place)
    changed_rows = rows(40)
    changed_rows[17]["messages"][1]["content"] += " Indeed."
    place.write_rows("rows.jsonl", changed_rows)
    after = keys(place)
    assert {t for t in before if before[t] != after[t]} == {"prepare"} | AFTER_PREPARE


def test_moving_the_same_data_reruns_nothing(place):
    before = keys(place)
    (place.root / "elsewhere").mkdir()
    (place.root / "rows.jsonl").rename(place.root / "elsewhere" / "rows.jsonl")
    place.write_recipe(datasets=[{"path": "elsewhere/rows.jsonl", "type": "chat_template"}])
    assert keys(place) == before


def test_base_model_by_another_path_reruns_nothing(place, tiny_llama_dir):
    before = keys(place)
    link = place.root / "model"
    link.symlink_to(tiny_llama_dir)
    place.write_recipe(base_model=str(link))
    assert keys(place) == before


def test_key_is_the_same_on_every_machine():
    """Pinned: keys that stores out there hold must stay what they are."""
    from regrow.tasks.stage import Stage

    stage = Stage("train", 1, {"learning_rate": 1e-4, "seed": 42, "x": None}, "m:f")
    assert stage.key == "775684eb9b0514088a7b9538c87a81e28fd4ccad90146f30ff907dfa228602c6"
    again = Stage("train", 1, {"x": None, "seed": 42, "learning_rate": 0.0001}, "other:g")
    assert again.key == stage.key


def test_prepare_record_holds_digests_of_all_its_files(place):
    plan, builder = place.plan()
    record = builder.build(plan.prepare, LineReporter("prepare", lambda _line: None)).record
    folder = builder.artifacts.fetch(record)
    assert set(record.files) == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }
    assert json.loads(record.to_json())["result"]["splits"]["train"]["examples"] == 34

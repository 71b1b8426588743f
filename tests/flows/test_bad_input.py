"""Bad input ends in one clear message that says what to do: no traceback, nothing lost."""

import pytest

from regrow.flows.cli import main
from regrow.flows.progress import LineReporter
from regrow.infra.store import StoreError
from regrow.tasks.stage import StageError
from tests.flows.conftest import Place, rows


@pytest.fixture
def plan_says(place, monkeypatch, capsys):
    """Run `regrow plan` in this process; what it said and its exit code."""
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(place.root)

    def run(*words: str) -> tuple[int, str]:
        code = main(["plan", str(place.recipe), *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def prepare(place: Place) -> None:
    plan, builder = place.plan()
    builder.build(plan.prepare, LineReporter("prepare", lambda _line: None))


def test_missing_recipe(plan_says, place):
    place.recipe.unlink()
    code, said = plan_says()
    assert code != 0
    assert "no such file" in said


def test_unknown_key_names_the_nearest_and_its_line(plan_says, place):
    place.recipe.write_text("lerning_rate: 1\n" + place.recipe.read_text())
    code, said = plan_says()
    assert code != 0
    assert "line 1" in said
    assert "learning_rate" in said


def test_all_faults_are_told_at_once(plan_says, place):
    place.write_recipe(lora_r="many", seqence_len=3, num_epochs=-1)
    code, said = plan_says()
    assert code != 0
    for key in ("lora_r", "seqence_len", "num_epochs"):
        assert key in said


def test_wrong_type_names_the_value(plan_says):
    code, said = plan_says("--lora_r", "several")
    assert code != 0
    assert "lora_r" in said
    assert "several" in said


def test_missing_data_file_names_the_key_and_path(plan_says, place):
    (place.root / "rows.jsonl").unlink()
    code, said = plan_says()
    assert code != 0
    assert "datasets" in said
    assert "rows.jsonl" in said


def test_missing_base_model_names_the_key(plan_says):
    code, said = plan_says("--base_model", "./nowhere/model")
    assert code != 0
    assert "base_model" in said
    assert "nowhere" in said


def test_unwritable_store_names_the_remedy(plan_says, place):
    (place.root / "file").write_text("")
    code, said = plan_says("--store", str(place.root / "file" / "store"))
    assert code != 0
    assert "REGROW_STORE" in said


def test_empty_dataset(place):
    place.write_rows("rows.jsonl", [])
    with pytest.raises(StageError, match=r"rows\.jsonl"):
        prepare(place)


def test_malformed_row_names_file_and_line(place):
    with (place.root / "rows.jsonl").open("a") as file:
        file.write('{"messages": [\n')
    with pytest.raises(StageError, match=r"rows\.jsonl:41"):
        prepare(place)


def test_absent_column_names_the_columns_that_are_there(place):
    place.write_recipe(
        datasets=[{"path": "rows.jsonl", "type": "chat_template", "field_messages": "talk"}]
    )
    with pytest.raises(StageError, match=r"talk(.|\n)*messages"):
        prepare(place)


def test_all_rows_too_long_says_so_in_numbers(place):
    place.write_recipe(sequence_len=8)
    with pytest.raises(StageError, match=r"sequence_len"):
        prepare(place)


def test_no_space_left_is_explained_and_nothing_is_published(place, monkeypatch):
    import errno

    from regrow.tasks.prepare import run

    def full(_job):
        raise OSError(errno.ENOSPC, "No space left on device", "shard-00000.arrow")

    monkeypatch.setattr(run, "run", full)
    plan, builder = place.plan()
    with pytest.raises(StageError, match=r"no space left.*REGROW_HOME"):
        builder.build(plan.prepare, LineReporter("prepare", lambda _line: None))
    assert builder.find(plan.prepare) is None


def test_unwritable_store_is_found_before_any_work(place):
    from regrow.infra.store import Store

    (place.root / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        Store(place.root / "file" / "store").check_writable()


def test_failing_stage_ends_the_run_with_its_message_and_keeps_what_was_done(place):
    place.write_rows("rows.jsonl", [*rows(3), {"messages": "not a list"}])
    done = place.regrow("run", str(place.recipe))
    assert done.returncode == 1
    assert "rows.jsonl:4" in done.stdout
    assert "Traceback" not in done.stdout
    place.write_rows("rows.jsonl", rows(40))
    assert place.regrow("preprocess", str(place.recipe)).returncode == 0


@pytest.mark.extended
def test_a_database_of_mlflow_that_cannot_be_made_is_no_bug(place):
    done = place.regrow(
        "run", str(place.recipe), "--mlflow_tracking_uri", "sqlite:////proc/nope/mlflow.db"
    )
    assert done.returncode == 1
    assert "mlflow_tracking_uri" in done.stdout
    assert "bug" not in done.stdout

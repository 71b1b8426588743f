"""What is logged to MLflow can be read back; failures are quick and clear."""

import json
import logging
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from regrow.infra.tracking import Dataset, MetricsReporter, Tracker, TrackingError


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/home/mlflow.db"


@pytest.fixture(scope="module")
def tracker(uri: str) -> Tracker:
    return Tracker(uri, "finetune/test")


@pytest.fixture(scope="module")
def client(tracker: Tracker, uri: str) -> MlflowClient:
    tracker.connect()
    return MlflowClient(uri)


def _artifact(client: MlflowClient, run_id: str, path: str) -> bytes:
    uri = client.get_run(run_id).info.artifact_uri
    assert uri is not None
    return (Path(uri.removeprefix("file://")) / path).read_bytes()


def _dead_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_run_keeps_what_was_logged(tracker: Tracker, client: MlflowClient) -> None:
    parent = tracker.start_run("flow")
    run_id = tracker.start_run("1-train", {"stage": "train", "cached": True}, "**key** k", parent)
    tracker.log_params(run_id, {f"p{i}": i for i in range(250)} | {"lr": 2e-4, "r": [1, 2]})
    tracker.log_metrics(run_id, {f"m{i}": i for i in range(1200)} | {"eval/loss@1": 0.5}, step=7)
    tracker.set_tags(run_id, {"prefect": "x"})
    tracker.finish(run_id, "FAILED")

    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.info.run_name == "1-train"
    assert run.data.params["p249"] == "249"
    assert run.data.params["r"] == "[1, 2]"
    assert len(run.data.metrics) == 1201
    assert run.data.metrics["eval/loss_1"] == 0.5
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["mlflow.note.content"] == "**key** k"
    assert run.data.tags["cached"] == "true"
    assert run.data.tags["prefect"] == "x"


def test_long_values_are_cut_visibly(tracker: Tracker, client: MlflowClient) -> None:
    run_id = tracker.start_run("long", {"t": "y" * 9000})
    tracker.log_params(run_id, {"long": "x" * 7000})
    value = client.get_run(run_id).data.params["long"]
    assert len(value) == 6000
    assert value.endswith("(7000 characters in all)")


def test_no_secret_is_recorded(tracker: Tracker, client: MlflowClient) -> None:
    run_id = tracker.start_run("secret", {"api_key": "hush1"}, "see https://u:hush2@h/x")
    tracker.log_params(run_id, {"hub_token": "hush3", "url": "s3://k:hush4@b", "eos_token": "</s>"})
    tracker.log_text(run_id, "password: hush5\n", "recipe.yaml")
    tracker.log_datasets(run_id, [Dataset("d", "https://u:hush6@h/d.jsonl", "0", "source")])
    tracker.log_table(run_id, ["answer"], [["api_key: hush7"]], "t.json")
    run = client.get_run(run_id)
    written = f"{run.to_dictionary()}{_artifact(client, run_id, 'recipe.yaml')!r}"
    written += str(_artifact(client, run_id, "t.json"))
    assert "hush" not in written
    assert run.data.params["eos_token"] == "</s>"


def test_files_are_kept_as_given(tracker: Tracker, client: MlflowClient) -> None:
    run_id = tracker.start_run("files")
    tracker.log_figure_bytes(run_id, b"\x89PNG...", "figures/loss.png")
    tracker.log_html(run_id, "<p>hé</p>", "lineage/lineage.html")
    tracker.log_table(run_id, ["prompt", "before"], [["hi", "a"], ["you", "b"]], "gen.json")
    assert _artifact(client, run_id, "figures/loss.png") == b"\x89PNG..."
    assert _artifact(client, run_id, "lineage/lineage.html").decode() == "<p>hé</p>"
    table = json.loads(_artifact(client, run_id, "gen.json"))
    assert table == {"columns": ["prompt", "before"], "data": [["hi", "a"], ["you", "b"]]}


def test_files_lie_beside_the_database_and_nothing_in_the_current_directory(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(uri, "elsewhere")
    run_id = tracker.start_run("r")
    tracker.log_text(run_id, "x", "x.txt")
    model = tracker.external_model("m", run_id, "merged", "s3://x", "d")
    tracker.register(model, "elsewhere", run_id)
    home = Path(uri.removeprefix("sqlite:///")).parent
    assert list((home / "mlartifacts").rglob("x.txt"))
    assert list(tmp_path.iterdir()) == []
    assert not mlflow.is_tracking_uri_set()


def test_datasets_show_their_address(tracker: Tracker, client: MlflowClient) -> None:
    run_id = tracker.start_run("data")
    places = {
        "s3://b/x.jsonl": ("s3", "uri"),
        "file:///d/x.jsonl": ("local", "uri"),
        "/d/y.jsonl": ("local", "uri"),
        "https://h/x.jsonl": ("http", "url"),
    }
    tracker.log_datasets(
        run_id,
        [Dataset(f"d{i}", x, "f" * 64, "training", {"rows": 5}) for i, x in enumerate(places)],
    )
    inputs = {i.dataset.name: i for i in client.get_run(run_id).inputs.dataset_inputs}
    for i, (place, (kind, field)) in enumerate(places.items()):
        dataset = inputs[f"d{i}"].dataset
        assert dataset.source_type == kind
        assert json.loads(dataset.source) == {field: place}
        assert json.loads(dataset.profile or "") == {"rows": 5, "uri": place}
        assert dataset.digest == "f" * 36
        assert [tag.value for tag in inputs[f"d{i}"].tags] == ["training"]


def test_models_are_linked_to_their_maker_and_user(tracker: Tracker, client: MlflowClient) -> None:
    train, merge = tracker.start_run("train"), tracker.start_run("merge")
    adapter = tracker.external_model("a.b/c", train, "lora", "s3://a", "d1", {"r": 8})
    merged = tracker.external_model("merged", merge, "merged", "s3://m", "d2")
    tracker.link_models(train, outputs=[adapter])
    tracker.link_models(merge, [adapter], [merged])
    data = Dataset("alpaca", "s3://b/x", "f" * 64, "eval")
    tracker.log_datasets(merge, [data])
    tracker.log_metrics(merge, {"eval/loss": 1.5}, model_id=merged, dataset=data)

    run = client.get_run(merge)
    assert [m.model_id for m in run.inputs.model_inputs] == [adapter]
    assert [m.model_id for m in run.outputs.model_outputs] == [merged]
    model = client.get_logged_model(merged)
    assert str(model.status) == "READY"
    assert (model.params or {})["uri"] == "s3://m"
    assert [(m.key, m.dataset_name) for m in model.metrics or []] == [("eval/loss", "alpaca")]
    assert client.get_logged_model(adapter).name == "a-b-c"
    assert tracker.find_model("d2") == merged
    assert tracker.find_model("d3") is None
    tracker.set_model_tags(merged, {"mlflow.note.content": "**text**"})
    assert (client.get_logged_model(merged).tags or {})["mlflow.note.content"] == "**text**"


def test_one_model_is_registered_once(tracker: Tracker, client: MlflowClient) -> None:
    run_id = tracker.start_run("publish")
    model = tracker.external_model("m", run_id, "merged", "s3://m", "d2")
    first = tracker.register(model, "smol's", run_id, "text", {"digest": "d2"})
    again = tracker.register(model, "smol's", run_id, "text", {"digest": "d2"})
    other = tracker.register(model, "smol's", run_id, "text", {"digest": "d3"})
    assert [first, again, other] == ["1", "1", "2"]
    version = client.get_model_version("smol's", "1")
    assert version.source == f"models:/{model}"
    assert version.run_id == run_id


def test_runs_are_found_by_tag(tracker: Tracker) -> None:
    run_id = tracker.start_run("findme", {"stage.key": "abc123"})
    tracker.log_metrics(run_id, {"loss": 2.0})
    found = tracker.find_runs("tags.`stage.key` = 'abc123'")
    assert [(run.run_id, run.name, run.metrics) for run in found] == [
        (run_id, "findme", {"loss": 2.0})
    ]
    assert tracker.url("#/x") is None


def test_runs_of_other_experiments_are_found_when_asked_for(tracker: Tracker, uri: str) -> None:
    run_id = Tracker(uri, "neighbour").start_run("far", {"stage.key": "far"})
    assert tracker.find_runs("tags.`stage.key` = 'far'") == []
    (found,) = tracker.find_runs("tags.`stage.key` = 'far'", everywhere=True)
    assert (found.run_id, found.experiment_id != tracker.experiment_id) == (run_id, True)


def test_addresses_of_pages_hold_no_password() -> None:
    assert Tracker("http://me:hush@host:5000/", "e").url("#/x") == "http://host:5000/#/x"


def test_a_parameter_cannot_be_changed(tracker: Tracker) -> None:
    run_id = tracker.start_run("twice")
    tracker.log_params(run_id, {"lr": 1})
    with pytest.raises(TrackingError, match="lr"):
        tracker.log_params(run_id, {"lr": 2})


def test_a_deleted_experiment_is_named_with_the_remedy(uri: str, client: MlflowClient) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        Tracker(uri, "gone").start_run("r")


def test_an_unreachable_server_is_named_within_seconds() -> None:
    url = _dead_url().replace("http://", "http://me:pw@")
    begin = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        Tracker(url, "x").start_run("r")
    assert time.monotonic() - begin < 5
    message = str(caught.value)
    assert url.replace("me:pw", "***") in message
    assert "mlflow server" in message
    assert "mlflow_tracking_uri" in message


def test_reported_metrics_are_all_there_and_nothing_else_is_touched(
    tracker: Tracker, client: MlflowClient, uri: str
) -> None:
    run_id = tracker.start_run("live")
    before = client.get_run(run_id)
    reporter = MetricsReporter(uri, run_id)
    for step in range(1, 31):
        reporter.log({"train/loss": 1 / step, "train/lr": 1e-4}, step)
    reporter.close()
    history = client.get_metric_history(run_id, "train/loss")
    assert [(p.step, p.value) for p in history] == [(s, 1 / s) for s in range(1, 31)]
    after = client.get_run(run_id)
    assert after.info.status == "RUNNING"
    assert after.data.params == {}
    assert after.data.tags == before.data.tags


def test_replayed_steps_are_not_recorded_twice(
    tracker: Tracker, client: MlflowClient, uri: str
) -> None:
    run_id = tracker.start_run("resumed")
    for steps in (range(1, 13), range(9, 21)):  # killed after 12, resumed from a checkpoint at 8
        reporter = MetricsReporter(uri, run_id)
        for step in steps:
            reporter.log({"loss": float(step)}, step)
        reporter.close()
    history = client.get_metric_history(run_id, "loss")
    assert [p.step for p in history] == list(range(1, 21))


def test_a_dead_server_costs_training_nothing_but_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    reporter = MetricsReporter(_dead_url(), "0" * 32)
    begin = time.monotonic()
    for step in range(1000):
        reporter.log({"loss": 1.0}, step)
    assert time.monotonic() - begin < 10
    reporter.close()
    assert time.monotonic() - begin < 100
    messages = [record.message for record in caplog.records if record.name.startswith("regrow")]
    assert len(messages) == 2
    assert "does not answer" in messages[0]
    assert messages[1] == "1000 metric values could not be recorded"


_WRITER = """
import sys
from regrow.infra.tracking import MetricsReporter, Tracker
tracker = Tracker(sys.argv[1], "shared")
run_id = tracker.start_run("r")
reporter = MetricsReporter(sys.argv[1], run_id)
for step in range(200):
    reporter.log({"loss": 1.0}, step)
    if step % 20 == 0:
        tracker.log_metrics(run_id, {"other": step}, step)
reporter.close()
tracker.finish(run_id, "FINISHED")
"""


def test_a_database_whose_making_was_killed_is_made_anew(tmp_path: Path) -> None:
    made = tmp_path / "mlflow.db.new"
    with closing(sqlite3.connect(made)) as half, half:
        half.execute("CREATE TABLE runs (deleted_time BIGINT)")
    made.with_name(f"{made.name}-journal").write_bytes(b"of another attempt")
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "e")
    tracker.connect()
    assert {path.name for path in tmp_path.glob("mlflow.db*")} == {"mlflow.db", "mlflow.db.lock"}


def test_a_database_that_cannot_be_made_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match=r"mlflow_tracking_uri .*file/mlflow\.db: "):
        Tracker(f"sqlite:///{tmp_path}/file/mlflow.db", "e").connect()


def test_processes_share_a_new_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    command = [sys.executable, "-c", _WRITER, uri]
    writers = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(3)
    ]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], errors
    runs = Tracker(uri, "shared").find_runs("")
    assert [run.status for run in runs] == ["FINISHED"] * 3
    client = MlflowClient(uri)
    # On a machine too busy for 15 s of grace the rest is given up, and that is said.
    told = "could not be recorded" in "".join(errors)
    for run in runs:
        assert len(client.get_metric_history(run.run_id, "loss")) == 200 or told, errors

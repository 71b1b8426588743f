"""In MLflow everything leads to what it was made from, and back to what was made from it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient

from regrow.flows.journal import Closing, Journal
from regrow.flows.session import Origin, Session
from regrow.flows.workplace import Workplace
from regrow.infra.artifacts import ArtifactStore
from regrow.infra.device_files import Devices
from regrow.infra.devices import Gpu
from regrow.infra.settings import load_settings
from regrow.infra.tracking import RunInfo, Tracker, TrackingError
from regrow.tasks.stage import Stage
from tests.flows.made_pipeline import BASE, DATA, ROWS, TOKENS, make_plan, run_made

NOTE = "mlflow.note.content"


@contextmanager
def two_gpus(stage: Stage) -> Iterator[Devices | None]:
    """Training has them."""
    gpus = tuple(Gpu("H100", 80 * 2**30, word, i, word) for i, word in enumerate("13"))
    yield Devices(gpus) if stage.name == "train" else None


class Shown:
    """Two runs on the same data, told to a SQLite file, and a third that found all in the store."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.plans = [make_plan("first", 1e-3), make_plan("second", 2e-3)]
        self.sessions = [
            run_made(plan, folder / "home", self.uri, slots=two_gpus)
            for plan in (*self.plans, self.plans[0])
        ]
        self.tracker, self.client = Tracker(self.uri, "regrow"), MlflowClient(self.uri)
        self.runs = self.tracker.find_runs("")

    def page(self, key: str) -> RunInfo:
        """The run that built a key."""
        (run,) = [r for r in self.runs if r.tags.get("stage.key") == key and built(r)]
        return run

    def links(self, text: str) -> dict[str, str]:
        """{text: address} of the links of a description."""
        return dict(re.findall(r"\[([^]]+)\]\(([^)]+)\)", text))

    def followed(self, run: RunInfo, name: str) -> RunInfo:
        """The run that a run's description links to by that name."""
        page = self.links(run.tags[NOTE])[name]
        run_id = page.split("/runs/")[1].partition("?")[0]
        (found,) = [r for r in self.runs if r.run_id == run_id]
        return found


def built(run: RunInfo) -> bool:
    return run.tags.get("cached") == "false"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    return Shown(tmp_path_factory.mktemp("journal"))


def test_each_stage_leads_to_what_it_was_made_from(shown: Shown):
    plan = shown.plans[0]
    evaluate = shown.page(plan.evaluate.key)
    merge = shown.followed(evaluate, "merge")
    train = shown.followed(merge, "train")
    prepare = shown.followed(train, "prepare")
    assert [run.tags["stage.key"] for run in (merge, train, prepare)] == [
        stage.key for stage in (plan.model, plan.train, plan.prepare)
    ]
    data = shown.links(prepare.tags[NOTE])["smart_home.jsonl"]
    assert unquote(data).endswith(f"dataset.digest = '{DATA[:36]}'")


def test_version_leads_to_all_its_stages_and_its_recipe(shown: Shown):
    (version,) = shown.client.search_model_versions("name='first-model'")
    links = shown.links(version.description or "")
    for name in ("evaluate", "merge", "train", "prepare", "publish", "recipe", "report"):
        assert name in links, name
    run_id = links["recipe"].split("/runs/")[1].partition("/")[0]
    recipe = shown.client.download_artifacts(run_id, "recipe.yaml")
    assert "SmolLM2-135M" in Path(recipe).read_text()
    assert "exact 50 %" in (version.description or "")


def test_data_leads_to_every_model_trained_on_it(shown: Shown):
    prepare = shown.page(shown.plans[0].prepare.key)
    links = shown.links(prepare.tags[NOTE])
    for plan in shown.plans:
        assert f"train of {plan.name}" in links
        model = shown.client.get_logged_model(links[f"{plan.name}-trained"].split("/")[-1][:34])
        assert (model.tags or {})["digest"] == plan.train.key
    assert f"dataset.digest = '{prepare.tags['stage.key'][:36]}'" in unquote(
        links["all runs on this data"]
    )


def test_base_model_leads_to_what_was_made_of_it(shown: Shown):
    model_id = shown.tracker.find_model(BASE)
    assert model_id is not None
    text = (shown.client.get_logged_model(model_id).tags or {})[NOTE]
    assert {"train of first", "train of second", "baseline of first"} <= set(shown.links(text))


def test_models_are_inputs_and_outputs_of_runs(shown: Shown):
    plan = shown.plans[0]
    merge = shown.client.get_run(shown.page(plan.model.key).run_id)
    inputs = [m.model_id for m in merge.inputs.model_inputs]
    adapter = shown.page(plan.train.key).tags["regrow.model_id"]
    assert set(inputs) == {adapter, shown.tracker.find_model(BASE)}
    (output,) = merge.outputs.model_outputs
    assert shown.client.get_logged_model(output.model_id).name == "first-merged"
    text = (shown.client.get_logged_model(adapter).tags or {})[NOTE]
    assert {"train", "merge of first", "first-merged"} <= set(shown.links(text))


def test_prepared_data_shows_digest_rows_and_tokens(shown: Shown):
    plan = shown.plans[0]
    run = shown.client.get_run(shown.page(plan.train.key).run_id)
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.digest == plan.prepare.key[:36]
    assert f'"rows": {ROWS}' in (used.dataset.profile or "")
    assert f'"tokens": {TOKENS}' in (used.dataset.profile or "")


def test_cached_stage_leads_to_the_run_that_built_it(shown: Shown):
    plan = shown.plans[0]
    for stage in plan.stages:
        found = [
            run
            for run in shown.runs
            if run.tags.get("stage.key") == stage.key and run.tags["cached"] == "true"
        ]
        assert found, stage.title
        for run in found:
            home = shown.page(stage.key)
            assert run.tags["built.run_id"] == home.run_id
            assert home.run_id in run.tags[NOTE]
            assert "found in the store" not in home.tags[NOTE]
            assert "**Used by**" not in run.tags[NOTE]


def test_stage_built_before_mlflow_knew_has_a_page_of_its_own(shown: Shown, tmp_path: Path):
    plan = make_plan("lost")
    for uri in (shown.uri, f"sqlite:///{tmp_path}/new.db"):
        run_made(plan, tmp_path / "home", uri, "lost")
    runs = Tracker(f"sqlite:///{tmp_path}/new.db", "lost").find_runs("tags.cached = 'true'")
    assert len(runs) == len(plan.stages)
    (prepare,) = [run for run in runs if run.name == "prepare"]
    assert "train of lost" in prepare.tags[NOTE]
    assert "built.run_id" not in prepare.tags


def test_a_stage_built_in_another_experiment_is_found(shown: Shown, tmp_path: Path):
    uri, plan = shown.uri, make_plan("shared", 3e-3, "elsewhere")
    run_made(plan, tmp_path / "home", uri, "one")
    run_made(plan, tmp_path / "home", uri, "two")
    one, two = Tracker(uri, "one"), Tracker(uri, "two")
    builders = {run.tags["stage.key"]: run for run in one.find_runs("tags.cached = 'false'")}
    for run in two.find_runs("tags.cached = 'true'"):
        builder = builders[run.tags["stage.key"]]
        assert run.tags["built.run_id"] == builder.run_id
        assert f"#/experiments/{one.experiment_id}/runs/{builder.run_id}" in run.tags[NOTE]


def test_runs_compare_by_the_same_names(shown: Shown):
    flows = [run for run in shown.runs if run.tags.get("stage") == "flow"]
    assert len(flows) == 3
    for run in flows:
        assert {"loss", "exact", "before.loss", "before.exact"} <= set(run.metrics)
        assert run.status == "FINISHED"


def test_no_secret_reaches_mlflow_or_the_report(shown: Shown):
    folder = Path(shown.uri.removeprefix("sqlite:///")).parent
    reports = folder / "home" / "store" / "reports"
    pages = [*folder.glob("mlflow.db*"), *folder.glob("mlartifacts/**/*"), *reports.rglob("*.html")]
    files = [path for path in pages if path.is_file()]
    names = {path.name for path in files}
    assert {"mlflow.db", "generations.json", "report.html", "lineage.html"} <= names
    for path in files:
        assert b"hush" not in path.read_bytes(), path


def test_runs_killed_in_this_store_are_closed_and_those_of_another_go_on(tmp_path: Path):
    """Teams share an MLflow server, and the same recipe has the same keys in every store."""
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "regrow")
    stage = make_plan().prepare

    def begun(store: str) -> str:
        artifacts = ArtifactStore.open_url(str(tmp_path / store), tmp_path / "cache")
        journal = Journal(tracker, artifacts, "made")
        journal.begin("", {}, {}, "")
        return journal.start_stage(stage)

    killed, elsewhere, again = begun("here"), begun("there"), begun("here")
    states = {run.run_id: run.status for run in tracker.find_runs("tags.cached != ''")}
    assert states == {killed: "KILLED", elsewhere: "RUNNING", again: "RUNNING"}
    parents = [run.status for run in tracker.find_runs("tags.stage = 'flow'")]
    assert sorted(parents) == ["KILLED", "RUNNING", "RUNNING"]


def test_report_is_kept_beside_the_run_and_in_mlflow(shown: Shown):
    session = shown.sessions[0]
    assert session.report_url is not None
    page = Path(session.report_url).read_text()
    first = [run for run in shown.runs if run.name == "first"][-1]
    assert Path(shown.client.download_artifacts(first.run_id, "report.html")).read_text() == page


def test_runs_say_which_gpus_they_have(shown: Shown):
    found = {run.tags["stage.key"]: run.tags["gpus"] for run in shown.runs if "gpus" in run.tags}
    assert found == {plan.train.key: "1,3" for plan in shown.plans}


def test_a_server_that_is_away_is_told_once(tmp_path: Path):
    said: list[str] = []
    plan = make_plan("lonely")
    place = Workplace(replace(load_settings(), home=tmp_path, store_url=None))
    tracker = Tracker("http://127.0.0.1:9", "regrow")
    session = Session(plan, place, tracker, Origin("lonely", "", {}, {}), said.append)
    with pytest.raises(TrackingError, match="does not answer") as raised:
        session.run(plan.prepare)
    session.close("FAILED")
    assert not [line for line in said if str(raised.value) in line]


def test_a_run_that_is_stopped_while_it_writes_its_end_has_written_it(tmp_path: Path, monkeypatch):
    ended: list[str] = []
    hurried: list[bool] = []

    def end(closing: Closing) -> None:
        time.sleep(0.3)
        ended.append(closing.status)

    calls = ("begin", "start_stage", "fail_stage", "finish_stage")
    journal: Any = SimpleNamespace(
        **dict.fromkeys(calls, lambda *_: ""), end=end, hurry=lambda: hurried.append(True)
    )
    plan, place = make_plan("stopped"), Workplace(replace(load_settings(), home=tmp_path))
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "regrow")
    session = Session(plan, place, tracker, Origin("stopped", "", {}, {}), print, journal=journal)

    def interrupted(wait: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session._writer, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.close("KILLED")
    assert (ended, hurried) == (["KILLED"], [True])

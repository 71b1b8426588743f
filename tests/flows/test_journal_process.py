"""The journal of another process: it writes what the one here would, and its end is told."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest

from regrow.flows import journal_process
from regrow.flows.journal import FLOW_RUN, Closing
from regrow.flows.journal_process import JournalProcess, Place, journal_of, start_journal
from regrow.infra.settings import load_settings
from regrow.infra.tracking import Tracker, TrackingError
from tests.flows.made_pipeline import make_plan, run_made

# Ends its process right after the run of that number was made, once.
_DIES_AFTER_A_RUN = """
import os, sys
if not os.path.exists(os.environ["DIED"]):
    from regrow.infra.tracking import Tracker
    start, made = Tracker.start_run, []
    def start_run(*args, **options):
        made.append(start(*args, **options))
        if len(made) == int(os.environ["DIES_AFTER"]):
            open(os.environ["DIED"], "w").close()
            os.kill(os.getpid(), 9)
        return made[-1]
    Tracker.start_run = start_run
"""


@pytest.fixture
def place(tmp_path) -> Place:
    settings = replace(load_settings(), home=tmp_path / "home", store_url=None)
    uri = f"sqlite:///{tmp_path / 'away.db'}"
    return Place(settings, str(tmp_path / "home" / "store"), uri, "regrow", "made")


def shown(uri: str) -> dict[str, dict]:
    """{run: what MLflow says of it}, without what differs between any two runs."""
    varies = ("mlflow.", "stage.key", "stage.inputs", "built.", "regrow.", "prefect.")
    return {
        run.name: {
            "status": run.status,
            "params": run.params,
            "metrics": run.metrics,
            "tags": {k: v for k, v in run.tags.items() if not k.startswith(varies)},
        }
        for run in Tracker(uri, "regrow").find_runs("attributes.run_name != ''")
    }


def test_another_process_writes_what_this_one_would(place, tmp_path):
    here = f"sqlite:///{tmp_path / 'here.db'}"
    run_made(make_plan(target=str(tmp_path / "a")), tmp_path / "other", here)
    away = JournalProcess(place)
    plan = make_plan(target=str(tmp_path / "a"))
    session = run_made(plan, place.settings.home, place.tracking_uri, journal=away)
    assert shown(here)["train"]["metrics"]
    assert shown(place.tracking_uri) == shown(here)
    assert session.run_url is None  # no server shows it
    assert away._process.poll() is not None


def statuses(place: Place) -> list[str]:
    return [run["status"] for run in shown(place.tracking_uri).values()]


def test_a_process_that_was_killed_again_is_told_and_does_not_hang(place):
    journal = JournalProcess(place)
    journal._spares = 0
    journal._process.kill()
    with pytest.raises(TrackingError, match="was killed"):
        journal.begin("", {}, {}, "")
    journal.close()
    with pytest.raises(TrackingError, match="is closed"):
        journal.begin("", {}, {}, "")


def test_a_process_that_was_killed_is_started_again_and_goes_on(place, tmp_path, capsys):
    journal, train = JournalProcess(place), make_plan(target=str(tmp_path)).train
    journal.begin("", {}, {}, "")
    run_id = journal.start_stage(train)
    journal._process.kill()  # while it has nothing to do
    journal._process.wait()
    journal.end(Closing([], "FAILED"))
    assert "was killed" in capsys.readouterr().out
    assert run_id
    assert statuses(place) == ["FAILED", "FAILED"]  # the stage's, which was open, and the run's


def test_a_stop_of_all_processes_leaves_it_to_write_how_the_run_ended(place):
    journal = JournalProcess(place)
    os.kill(journal._process.pid, signal.SIGTERM)  # before it runs a line of ours
    journal.begin("", {}, {}, "")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(journal._process.pid, number)
    journal._spares = 0
    journal.end(Closing([], "KILLED"))
    assert statuses(place) == ["KILLED"]


@pytest.mark.parametrize("error", ["OSError(28, 'no space')", "TypeError('hub_token: hush5678')"])
def test_what_is_wrong_with_an_import_is_told_masked(place, tmp_path, monkeypatch, error, capfd):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "mlflow.py").write_text(f"raise {error}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    journal = JournalProcess(place)
    with pytest.raises(TrackingError, match=f"MLflow cannot be used: {error[:5]}") as told:
        journal.begin("", {}, {}, "")
    journal.close()
    assert "hush5678" not in str(told.value) + "".join(capfd.readouterr())


def test_a_process_that_ends_by_itself_is_told_with_its_last_words(place, monkeypatch):
    program = "import os; print('hub_token: hush5678, no room', flush=True); os.abort()"
    monkeypatch.setattr(journal_process, "_PROGRAM", program)
    journal = JournalProcess(place)
    with pytest.raises(TrackingError, match=r"SIGABRT(?s:.*)\*\*\*.*no room") as told:
        journal.begin("", {}, {}, "")
    assert "hush5678" not in str(told.value)
    journal.close()


def test_a_process_that_does_not_answer_is_ended_and_started_again(place, monkeypatch, capsys):
    monkeypatch.setattr(journal_process, "_WORD_SECONDS", 0.1)
    journal = JournalProcess(place)
    journal.begin("", {}, {}, "")
    os.kill(journal._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(journal_process, "_HURRIED_SECONDS", 0.2)
    journal.hurry()
    with pytest.raises(TrackingError, match="did not answer"):
        journal.register(*[None] * 3)  # type: ignore[arg-type]
    assert "waiting for MLflow" in capsys.readouterr().out
    journal._limit = 60
    journal.end(Closing([], "KILLED"))
    assert statuses(place) == ["KILLED"]


def test_the_pages_are_known_although_the_end_could_not_be_written(place, monkeypatch):
    def ask(_self, what, *_args):
        if what == "end":
            raise TrackingError("no room")
        return "http://there/run", {}

    journal = JournalProcess(place)
    monkeypatch.setattr(JournalProcess, "_ask", ask)
    with pytest.raises(TrackingError, match="no room"):
        journal.end(Closing([], "FINISHED"))
    assert journal.run_url == "http://there/run"
    assert journal._process.poll() is not None


@pytest.mark.parametrize("begin_was", ["half", "done"])
def test_what_was_half_begun_is_ended_by_the_next(place, tmp_path, monkeypatch, begin_was):
    """The process is killed after it has made a run, before it could tell so."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_DIES_AFTER_A_RUN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("DIES_AFTER", "1" if begin_was == "half" else "2")
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    journal, train = JournalProcess(place), make_plan(target=str(tmp_path)).train
    journal.begin("", {}, {FLOW_RUN: "one-two"}, "")
    journal.fail_stage(journal.start_stage(train), "enough", "FAILED")
    journal.end(Closing([], "FAILED"))
    assert (tmp_path / "died").exists()
    found = Tracker(place.tracking_uri, "regrow").find_runs("attributes.run_name != ''")
    assert sorted(run.status for run in found) == ["FAILED", "FAILED", "KILLED"]


def test_one_that_cannot_be_started_again_is_told_each_time(place, monkeypatch):
    journal = JournalProcess(place)
    journal._process.kill()
    journal._process.wait()

    def refuse(*_args, **_options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(journal_process.subprocess, "Popen", refuse)
    for _ in range(2):
        with pytest.raises(TrackingError, match=r"was killed|ended"):
            journal.begin("", {}, {}, "")
    journal.close()


def test_the_pages_of_a_run_and_its_stages_are_answered():
    stages = [SimpleNamespace(key="a"), SimpleNamespace(key="b")]
    pages = {"a": "http://there/a"}
    journal = SimpleNamespace(
        run_url="http://there/run", stage_url=lambda stage: pages.get(stage.key)
    )
    assert journal_process._answer(journal, "pages", (stages,)) == ("http://there/run", pages)


def test_what_mlflow_refuses_is_raised_here(place):
    journal = JournalProcess(replace(place, tracking_uri="sqlite:////proc/nope/mlflow.db"))
    with pytest.raises(TrackingError, match=r"mlflow_tracking_uri .*proc/nope"):
        journal.begin("", {}, {}, "")
    journal.close()


def test_the_process_ends_when_nobody_asks_any_more(place):
    """A run whose process was killed cannot end it."""
    process = JournalProcess(place)
    process._connection.close()
    assert process._process.wait(60) == 0


def test_a_process_that_has_been_started_is_taken_by_its_own_run_only(place, monkeypatch):
    class Fake:
        def __init__(self, place: Place) -> None:
            self.place = place

        def close(self) -> None:
            closed.append(self)

    closed: list[Fake] = []
    monkeypatch.setattr(journal_process, "JournalProcess", Fake)
    start_journal(place)
    first = journal_process._started.get()
    assert journal_of(place) is first
    assert journal_of(place) is not first
    start_journal(place)
    second = journal_process._started.get()
    assert journal_of(replace(place, name="another")).place.name == "another"
    assert closed == [second]

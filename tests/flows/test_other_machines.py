"""Machines that wait for a run to train with them do not wait for ever."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from regrow.flows import run_page
from regrow.flows.other_machines import OtherMachines
from regrow.flows.run import FlowRun
from regrow.tasks.stage import Stage
from regrow.tasks.train import machines
from regrow.tasks.train import run as train

TRAIN, PREPARE = SimpleNamespace(name="train"), SimpleNamespace(name="prepare")
FOUND, AT_WORK = False, True
"""Whether the stage's own work had begun."""


@pytest.fixture
def sent(monkeypatch) -> list[str]:
    """Why the others were sent away, each time."""
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_NODE_RANK", "0")
    monkeypatch.setenv("PET_MASTER_ADDR", "127.0.0.1")
    found: list[str] = []
    monkeypatch.setattr(machines, "send_away", lambda nodes, say, why="": found.append(why))
    return found


def ended(*stages: tuple[Any, bool], error: BaseException | None = None) -> None:
    others = OtherMachines(print)
    for stage, begun in stages:
        others.ended(stage, begun)
    others.send_away(error)


def test_they_are_sent_away_where_training_was_found_done(sent):
    ended((PREPARE, AT_WORK), (TRAIN, FOUND))
    assert sent == [""]


def test_they_hear_why_a_run_failed_before_it_trained(sent):
    ended((PREPARE, AT_WORK), error=ValueError("no data\nhere"))
    assert sent == ["no data"]


def test_a_training_that_was_at_work_has_told_them_itself(sent):
    ended((TRAIN, AT_WORK))
    ended((TRAIN, AT_WORK), error=ValueError("diverged"))
    assert sent == []


def test_they_hear_of_a_training_that_failed_before_its_work_began(sent):
    ended((TRAIN, FOUND), error=ValueError("the store is away"))
    assert sent == ["the store is away"]


def test_a_failure_to_reach_them_is_a_warning(sent, monkeypatch, capsys):
    def fail(*_args: Any) -> None:
        raise OSError("the port is another's")

    monkeypatch.setattr(machines, "send_away", fail)
    ended((TRAIN, FOUND))
    assert "warning" in capsys.readouterr().out


def test_the_run_is_closed_before_they_are_told(monkeypatch):
    told: list[str] = []
    run = FlowRun.__new__(FlowRun)
    run._held = ExitStack()
    run._pauses = SimpleNamespace(stop=lambda: None)
    run._signals = SimpleNamespace(__exit__=lambda *_: None)
    run._recipe = SimpleNamespace(launcher="torchrun")
    run._session = SimpleNamespace(close=lambda _status: told.append("closed"))
    run._others = SimpleNamespace(send_away=lambda _error: told.append("sent away"))
    run._workplace = None
    monkeypatch.setattr(run_page, "show_summary", lambda *_: None)
    run.__exit__(None, None, None)
    assert told == ["closed", "sent away"]


def test_machines_that_came_hear_of_a_training_whose_input_cannot_be_read(monkeypatch, tmp_path):
    closed: list[str] = []
    met = SimpleNamespace(close=closed.append)
    monkeypatch.setattr(train, "nodes_here", lambda: SimpleNamespace(count=2))
    monkeypatch.setattr(train, "FirstMachine", lambda *_: met)
    stage = Stage("train", 1, None, "", {}, SimpleNamespace(ray=None))
    job = SimpleNamespace(
        stage=stage, placement=stage.placement, checkpoints="memory://", report=None,
        scratch=tmp_path, logs=tmp_path, inputs={}, spec=None, devices=None,
    )  # fmt: skip
    with pytest.raises(KeyError):
        train.run(job)
    assert closed == ["'prepare'"]


def test_a_run_that_is_told_to_stop_waits_for_nobody(sent):
    ended(error=KeyboardInterrupt())
    assert sent == []


def test_a_run_on_one_machine_tells_nobody(sent, monkeypatch):
    monkeypatch.delenv("PET_NNODES")
    ended((TRAIN, FOUND))
    assert sent == []


def test_another_machine_sends_nobody_away(sent, monkeypatch):
    monkeypatch.setenv("PET_NODE_RANK", "1")
    ended((TRAIN, FOUND))
    assert sent == []

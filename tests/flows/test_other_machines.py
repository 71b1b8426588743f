"""Machines that wait for a run to train with them do not wait for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from regrow.flows.other_machines import OtherMachines
from regrow.tasks.train import machines

TRAIN, PREPARE = SimpleNamespace(name="train"), SimpleNamespace(name="prepare")
FOUND, BUILT = SimpleNamespace(cached=True), SimpleNamespace(cached=False)


@pytest.fixture
def sent(monkeypatch) -> list[str]:
    """Why the others were sent away, each time."""
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_NODE_RANK", "0")
    monkeypatch.setenv("PET_MASTER_ADDR", "127.0.0.1")
    found: list[str] = []
    monkeypatch.setattr(machines, "send_away", lambda nodes, say, why="": found.append(why))
    return found


def ended(*stages: tuple[Any, Any], error: BaseException | None = None) -> None:
    others = OtherMachines(print)
    for stage, outcome in stages:
        others.ended(stage, outcome)
    others.send_away(error)


def test_they_are_sent_away_where_training_was_found_done(sent):
    ended((PREPARE, BUILT), (TRAIN, FOUND))
    assert sent == [""]


def test_they_hear_why_a_run_failed_before_it_trained(sent):
    ended((PREPARE, None), error=ValueError("no data\nhere"))
    assert sent == ["no data"]


def test_a_training_that_ran_has_told_them_itself(sent):
    ended((TRAIN, BUILT))
    ended((TRAIN, None), error=ValueError("diverged"))
    assert sent == []


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

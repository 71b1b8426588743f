"""A Prefect server that is away while GPUs are counted is named, and asked again before that."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest

from regrow.flows import gpu_slots
from regrow.tasks.stage import Stage, StageError

TRAIN = Stage("train", 1, {}, "none:none", placement=SimpleNamespace(num_processes=2))


@pytest.fixture(autouse=True)
def away(monkeypatch):
    """No server is there, and nobody waits long for it."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.delenv("REGROW_PRIVATE_PREFECT", raising=False)
    monkeypatch.setattr(gpu_slots, "_PAUSES", (0.0, 0.0))


def refuse(*_args, **_options):
    raise httpx.ConnectError("All connection attempts failed")


def test_a_server_that_stays_away_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu_slots, "_limited", refuse)
    with (
        pytest.raises(StageError, match=r"127\.0\.0\.1:9/api cannot be asked.*ConnectError"),
        gpu_slots.gpus_of(TRAIN),
    ):
        raise AssertionError("nobody gave it GPUs")
    assert capsys.readouterr().out.count("asking again") == 2


def test_a_server_that_comes_back_gives_the_slots(monkeypatch):
    answers = [refuse, lambda _wanted: True]
    monkeypatch.setattr(gpu_slots, "_limited", lambda wanted: answers.pop(0)(wanted))
    held = []

    @contextmanager
    def concurrency(name, **options):
        held.append((name, options["occupy"]))
        yield

    monkeypatch.setattr(gpu_slots, "concurrency", concurrency)
    with gpu_slots.gpus_of(TRAIN):
        assert held == [(gpu_slots.LIMIT, 2)]


def test_slots_that_cannot_be_given_back_do_not_cost_the_stage(monkeypatch, capsys):
    @contextmanager
    def concurrency(*_args, **_options):
        yield
        refuse()

    monkeypatch.setattr(gpu_slots, "_limited", lambda _wanted: True)
    monkeypatch.setattr(gpu_slots, "concurrency", concurrency)
    with gpu_slots.gpus_of(TRAIN):
        pass
    assert "warning: GPUs were not given back" in capsys.readouterr().out


def test_an_error_of_the_stage_itself_is_passed_on(monkeypatch):
    @contextmanager
    def concurrency(*_args, **_options):
        yield

    monkeypatch.setattr(gpu_slots, "_limited", lambda _wanted: True)
    monkeypatch.setattr(gpu_slots, "concurrency", concurrency)
    with pytest.raises(httpx.ConnectError, match="the hub"), gpu_slots.gpus_of(TRAIN):
        raise httpx.ConnectError("the hub")

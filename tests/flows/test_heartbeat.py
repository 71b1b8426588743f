"""A run that the command line started tells the user's server that it lives, and ends at once."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from prefect.settings import get_current_settings

from regrow.flows import heartbeat
from regrow.flows.heartbeat import BEAT, beating, ours_instead


@pytest.fixture
def beats(monkeypatch) -> list[dict]:
    """What the server of a flow run hears."""
    heard: list[dict] = []

    def emit(event, resource, related):
        heard.append({"event": event, "resource": resource, "related": related})

    run = SimpleNamespace(id="1-2", name="mine", flow_id="3-4")
    context = SimpleNamespace(flow_run=run, flow=SimpleNamespace(name="finetune"))
    monkeypatch.setattr(heartbeat, "emit_event", emit)
    monkeypatch.setattr(heartbeat.FlowRunContext, "get", lambda: context)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.delenv("REGROW_PRIVATE_PREFECT", raising=False)
    return heard


def test_prefects_own_heartbeat_is_off_inside_only():
    assert get_current_settings().flows.heartbeat_frequency is not None
    with ours_instead():
        assert get_current_settings().flows.heartbeat_frequency is None
    assert get_current_settings().flows.heartbeat_frequency is not None


def test_heart_beats_as_prefects_would_until_the_run_is_over(beats):
    with ours_instead():
        heartbeat._every.set(0.01)
        with beating():
            while len(beats) < 3:
                time.sleep(0.01)
        heard = len(beats)
        time.sleep(0.05)
    assert len(beats) == heard
    assert beats[0]["event"] == BEAT == "prefect.flow-run.heartbeat"
    assert beats[0]["resource"]["prefect.resource.id"] == "prefect.flow-run.1-2"
    # By these two the automation of `regrow deploy` knows whose it is.
    assert beats[0]["related"][0].role == "flow"
    assert beats[0]["related"][0].name == "finetune"


def test_a_heartbeat_that_fails_does_not_end_the_next(beats, monkeypatch, caplog):
    tries: list[int] = []

    def emit(*_args, **_options):
        tries.append(1)
        raise ValueError("too large")

    monkeypatch.setattr(heartbeat, "emit_event", emit)
    with ours_instead():
        heartbeat._every.set(0.01)
        with beating():
            while len(tries) < 2:
                time.sleep(0.01)
    assert "too large" in caplog.text


def test_the_end_of_a_run_does_not_wait_for_its_next_heartbeat(beats):
    with ours_instead():
        begin = time.monotonic()
        with beating():
            pass
        assert time.monotonic() - begin < 1  # they are 180 s apart, or what the user says
    assert len(beats) == 1


def test_a_worker_has_prefects_heartbeat_and_a_private_server_none(beats, monkeypatch):
    with beating():
        pass
    monkeypatch.setenv("REGROW_PRIVATE_PREFECT", "1")
    with ours_instead(), beating():
        pass
    assert beats == []

"""A look at source data starts a run when the content has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from regrow.flows import watch


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[str]:
    """Deployments that were started; homes and stores are below `tmp_path`."""
    found: list[str] = []
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / "pod-1"))
    monkeypatch.setattr(watch, "run_deployment", lambda name, **_: found.append(name))
    monkeypatch.setattr(watch, "emit_event", lambda *_, **__: None)
    return found


def look(url: str, store: Path, deployment: str = "d1") -> None:
    """What the deployment does each minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.deployment, "id", deployment, raising=False)
        patch.setattr(watch.flow_run, "id", "f1", raising=False)
        watch.watch_source.fn(url, "tiny", str(store))


def test_first_look_remembers_and_a_change_starts_a_run(started, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("one\n")
    for _ in range(2):
        look(str(data), tmp_path / "store")
        assert started == []
    data.write_text("one\ntwo\n")
    look(str(data), tmp_path / "store")
    look(str(data), tmp_path / "store")
    assert started == ["finetune/tiny"]


def test_another_address_or_another_watch_begins_anew(started, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    look(str(tmp_path / "a"), tmp_path / "store")
    look(str(tmp_path / "b"), tmp_path / "store")
    look(str(tmp_path / "a"), tmp_path / "store", "d2")
    assert started == []

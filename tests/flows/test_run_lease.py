"""What a run has found in the store stays there until the run ends, whatever it works on."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta

import pytest

from regrow.infra.artifacts import ArtifactStore
from regrow.infra.collection import Collection
from regrow.tasks.build import stage_key
from tests.flows.made_pipeline import make_plan, run_made


@pytest.fixture
def home(tmp_path, monkeypatch):
    # `unneeded` waits for a heartbeat of each holder: a third of this.
    monkeypatch.setenv("REGROW_LEASE_SECONDS", "3")
    return tmp_path / "home"


def test_gc_leaves_what_a_running_run_has_found(home, tmp_path):
    plan, uri = make_plan(target=str(tmp_path)), f"sqlite:///{tmp_path}/mlflow.db"
    run_made(plan, home, uri)
    artifacts = ArtifactStore.open_url(str(home / "store"), home / "cache")
    artifacts.remove(stage_key(plan.baseline))  # so that there is something to work on
    could_go: list[set[str]] = []

    def watch(stage):
        if stage.title == "baseline":
            collection = Collection(artifacts, timedelta(0), 3)
            could_go.append({holding.key for holding in collection.unneeded()})
        return nullcontext()

    session = run_made(plan, home, uri, watch=watch)
    assert [stage for stage in plan.stages if session.has_begun(stage)] == [plan.baseline]
    kept = {stage_key(stage) for stage in plan.stages}
    assert could_go
    assert could_go[0] & kept == set()
    assert artifacts.store.sizes("leases/runs") == {}
    assert {h.key for h in Collection(artifacts, timedelta(0), 3).unneeded()} >= kept

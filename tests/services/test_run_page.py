"""A flow run's page on a real Prefect server shows the plan, how far stages are, and a summary."""

# No `from __future__ import annotations` here: Prefect evaluates annotations.
from dataclasses import replace
from pathlib import Path

import pytest
from prefect import flow
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings

from regrow.flows import run_page
from regrow.flows.workplace import Workplace
from regrow.infra.settings import load_settings
from tests.flows.made_pipeline import make_plan, run_made
from tests.services.whole_platform import Platform

pytestmark = pytest.mark.services


def test_plan_progress_and_summary_stand_on_the_runs_page(
    platform: Platform, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(run_page, "_LONG_SECONDS", 0.0)
    plan = make_plan("shown", 1e-3)
    place = Workplace(replace(load_settings(), home=tmp_path, store_url=None))
    ran: list[str] = []

    @flow
    def run() -> None:
        ran.append(flow_run.id or "")
        run_page.show_plan(plan, place)
        session = run_made(plan, tmp_path, platform.mlflow, "pages", run_page.progress_bar)
        run_page.show_summary(session, place, "FINISHED")

    with temporary_settings({PREFECT_API_URL: platform.env["PREFECT_API_URL"]}):
        run()
    asked = {"artifacts": {"flow_run_id": {"any_": ran}}}
    found = {each["key"]: each for each in platform.post("artifacts/filter", asked)}
    text = found["shown-plan"]["data"]
    assert all(stage.title in text and stage.key[:12] in text for stage in plan.stages)
    assert "never run with this recipe" in text
    bar = found["train-progress"]
    assert (bar["type"], bar["data"]) == ("progress", 100.0)
    assert "10 of 10 steps" in bar["description"]
    summary = found["shown-summary"]["data"]
    assert f"({platform.mlflow}/#/experiments/" in summary, "a link to the run in MLflow"
    assert str(tmp_path / "store") in summary
    assert "reports/shown/" in summary, "the report, kept in the store"
    assert "| exact" in summary, "scores before and after"
    assert "hush" not in str(found)

"""In MLflow's own pages, by clicking only: from a model back to its data, and from data to models.

The server is MLflow on PostgreSQL and the browser Chromium; the runs are written by the real
session and journal, for stages whose work is not done (tests/flows/made_pipeline.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.made_pipeline import DATA, ROWS, TOKENS, make_plan, run_made
from tests.services.browser import Browser, chromium
from tests.services.servers import ServerMissing
from tests.services.whole_platform import Platform

# Chromium beside other tests on two cores misses what it waits for now and then.
pytestmark = [pytest.mark.services, pytest.mark.extended]

PICTURES = os.environ.get("REGROW_PICTURES")
"""Where to keep pictures of the pages, if anywhere."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        with chromium(tmp_path_factory.mktemp("chromium")) as window:
            yield window
    except ServerMissing as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def mlflow(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The server's address, after two runs on one dataset, the second of which found it made."""
    home = tmp_path_factory.mktemp("made")
    for name, rate in (("smart-home", 1e-3), ("smart-home-2", 2e-3)):
        run_made(make_plan(name, rate), home, platform.mlflow, "browser")
    return platform.mlflow


def keep(browser: Browser, name: str) -> None:
    if PICTURES:
        browser.unfold()
        browser.close_assistant()
        browser.picture(Path(PICTURES) / f"{name}.png")


def test_version_leads_to_evaluation_merge_training_data_sources_and_recipe(
    browser: Browser, mlflow: str
):
    plan = make_plan("smart-home", 1e-3)
    browser.open(f"{mlflow}/#/models?workflowType=machine_learning")
    browser.await_text("MLflow Assistant")
    browser.close_dialogs()
    browser.click_link("smart-home-model")
    browser.click_link("Version 1")
    browser.await_text("Evaluated by", "exact 50 %")
    keep(browser, "lineage-version")

    browser.click_link("evaluate", "/runs/")
    browser.await_text("Made from", plan.evaluate.key)
    browser.click_link("merge", "/runs/")
    browser.await_text("Made from", plan.model.key)
    browser.click_link("train", "/runs/")
    browser.await_text("Made from", plan.train.key)
    keep(browser, "lineage-train")

    # The dataset, in MLflow's own drawer.
    browser.click("//*[starts-with(normalize-space(text()), 'smart-home-prepared')]")
    browser.await_text("rows:", f"{ROWS}", "tokens:", f"{TOKENS}")
    keep(browser, "lineage-dataset")
    browser.close_dialogs()

    browser.click_link("prepare", "/runs/")
    page = browser.await_text("smart_home.jsonl", DATA[:12], "tokenizer", plan.prepare.key)
    assert "hush" not in page
    browser.click_link("recipe")
    browser.await_text("base_model", "SmolLM2-135M")
    assert "recipe.yaml" in browser.address


def test_data_leads_to_all_models_trained_on_it(browser: Browser, mlflow: str):
    browser.open(f"{mlflow}/#/models/smart-home-model/versions/1?workflowType=machine_learning")
    browser.click_link("prepare", "/runs/")
    browser.await_text("Used by", "train of smart-home", "train of smart-home-2")
    keep(browser, "lineage-data")
    home = browser.address
    for name in ("smart-home", "smart-home-2"):
        browser.open(home)
        browser.click_link(f"{name}-trained", "/models/")
        browser.await_text(make_plan(name, 2e-3 if name.endswith("2") else 1e-3).train.key)
    browser.click_link("merge of smart-home-2")
    browser.await_text("smart-home-2-merged")

    # MLflow's own table of the runs that logged this dataset.
    browser.open(home)
    browser.click_link("all runs on this data")
    browser.await_text("smart-home", "smart-home-2", "matching runs")


def test_cached_stage_leads_to_the_run_that_built_it(browser: Browser, mlflow: str):
    browser.open(f"{mlflow}/#/models?workflowType=machine_learning")
    browser.click_link("smart-home-2-model")
    browser.click_link("Version 1")
    browser.click_link("smart-home-2", "/runs/")
    browser.click_link("prepare", "/runs/")
    browser.await_text("found in the store")
    here = browser.address
    browser.click_link("prepare of smart-home")
    browser.await_text("Used by", "train of smart-home-2")
    assert browser.address != here


def test_report_and_lineage_are_shown_in_place(browser: Browser, mlflow: str):
    browser.open(f"{mlflow}/#/models/smart-home-model/versions/1?workflowType=machine_learning")
    browser.click_link("report")
    browser.driver.switch_to.frame(browser.element("//iframe"))
    browser.await_text("Before and after", "Plan and stages", "found in the store", "Lineage")
    browser.driver.switch_to.default_content()
    keep(browser, "report")

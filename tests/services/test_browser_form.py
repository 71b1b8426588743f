"""A recipe's form on Prefect's own page: a field is filled, and the run starts with that value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from regrow.flows.workplace import Workplace
from regrow.infra.settings import load_settings
from tests.flows.conftest import Place
from tests.services.browser import Browser, chromium
from tests.services.servers import ServerMissing
from tests.services.whole_platform import Platform, Worker

pytestmark = pytest.mark.services

PICTURES = os.environ.get("REGROW_PICTURES")
"""Where to keep pictures of the pages, if anywhere."""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    try:
        with chromium(tmp_path / "chromium") as window:
            yield window
    except ServerMissing as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def field(title: str) -> str:
    """Where the form has the input of that title."""
    label = f"//span[@class='schema-form-property__label'][normalize-space()='{title}']"
    return f"{label}/following::input[1]"


def test_run_starts_with_what_was_written_into_the_form(
    place: Place, platform: Platform, browser: Browser, tmp_path: Path
):
    here = Place(place.root, place.recipe, place.env | platform.env)
    deployed = here.regrow("deploy", str(here.recipe), "--pool", "form")
    assert deployed.returncode == 0, deployed.stdout
    deployment = platform.deployment("tiny")["id"]

    browser.open(f"{platform.prefect}/deployments/deployment/{deployment}/run")
    browser.await_text("Parameters", "Highest learning rate")  # the recipe's own words
    browser.fill(field("Max Steps (Optional)"), "3")
    browser.fill(field("Learning Rate"), "0.004")
    if PICTURES:
        browser.picture(Path(PICTURES) / "prefect-form.png")
    browser.click("//button[normalize-space()='Submit']")
    browser.await_text("Scheduled")

    (run,) = platform.runs("tiny")
    given = run["parameters"]["recipe"]
    assert (given["max_steps"], given["learning_rate"]) == (3, 0.004)
    with Worker(tmp_path / "worker", here.env, "form") as worker:
        worker.await_line("[train] done")
    store = Workplace(load_settings(), str(here.root / "home" / "store")).artifacts
    (trained,) = [record for record in store.records("stages") if record.stage == "train"]
    assert trained.result["steps"] == 3
    assert trained.spec["learning_rate"] == 0.004

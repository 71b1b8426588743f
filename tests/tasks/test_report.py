"""A run's report is whole, well-formed, and loads nothing from anywhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from regrow.tasks import report
from tests.flows.made_pipeline import ANSWER, make_plan, run_made

_EMPTY = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page: its text, and the tags that are still open at its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(session, its report's text)."""
    folder: Path = tmp_path_factory.mktemp("report")
    session = run_made(make_plan("smart-home"), folder, f"sqlite:///{folder}/mlflow.db")
    assert session.report_url is not None
    return session, Path(session.report_url).read_text()


def test_page_is_well_formed_and_loads_nothing(made):
    page = Page(made[1])
    assert page.open == []
    names = {name for name, _ in page.attributes}
    assert names.isdisjoint({"src", "href", "srcset", "onload", "onclick", "action", "data"})
    assert set(page.tags).isdisjoint({"script", "link", "iframe", "img", "object", "embed", "base"})
    assert "@import" not in made[1]
    assert "url(" not in made[1]
    assert ("charset", "utf-8") in page.attributes


def test_page_tells_recipe_stages_figures_answers_and_lineage(made):
    session, text = made
    page = Page(text)
    for stage in session.plan.stages:
        assert stage.title in page.text
        assert stage.key[:12] in page.text
    for words in ("base_model: SmolLM2-135M", "loss 1.250, exact 50 %", "finished"):
        assert words in page.text, words
    assert "2.5000 1.2500" in page.text  # before and after
    assert ANSWER in page.text  # shown as it is, not as markup
    assert page.tags["svg"] == 4  # loss, lengths, fill, lineage
    assert page.tags["polyline"] == 2


def test_no_secret_is_in_the_page(made):
    assert "hush" not in made[1]
    assert "***" in made[1]


def test_a_failed_run_says_how_far_it_came(made):
    session, _ = made
    facts = report.RunFacts(
        session.plan, session.outcomes[:2], "FAILED", "a: 1", "2026-11-22T05:00:00+00:00", {}
    )
    page = Page(report.page(facts, lambda _key: None))
    assert "failed 2026-11-22 05:00 UTC" in page.text
    assert page.text.count("not reached") == 4
    nothing = report.RunFacts(session.plan, [], "KILLED", "a: 1", "2026-11-22T05:00:00", {})
    assert Page(report.page(nothing, lambda _key: None)).text.count("not reached") == 6

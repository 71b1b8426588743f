"""The flow run's page in Prefect: the plan, progress of long stages, a summary with links."""

# No `from __future__ import annotations` here: it breaks Prefect flows that are served.
import contextvars
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from httpx import HTTPError
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException

from regrow.flows.descriptions import link, table
from regrow.flows.progress import Listener, duration, say
from regrow.flows.session import Session
from regrow.flows.show import why_it_runs
from regrow.flows.workplace import Workplace
from regrow.infra.secrets import mask_secrets
from regrow.tasks.headline import headline
from regrow.tasks.plan import Plan
from regrow.tasks.scores import SCORES
from regrow.tasks.stage import Stage

_LONG_SECONDS = 3.0  # a stage that is done sooner needs no bar
_EVERY_SECONDS = 5.0  # between two updates of a bar: what a person watches, and cheap for a server


def show_plan(plan: Plan, workplace: Workplace) -> None:
    """Put the plan on the page: per stage its key, whether it is there, and if not, why."""
    states: dict[str, str] = {}
    rows = []
    for stage in plan.stages:
        states[stage.key] = state = workplace.state(stage)
        why = "" if state == "cached" else why_it_runs(workplace, plan, stage, states)
        rows.append([stage.title, f"`{stage.key[:12]}`", state.partition(":")[0], why])
    text = table(["stage", "key", "state", "why"], rows)
    place = f"Store `{workplace.store_url}`"
    _keep(f"{plan.name}-plan", f"{text}\n\n{place}", "what this run does, and why")


def show_summary(session: Session, workplace: Workplace, status: str) -> None:
    """Put on the page what came of it, with links to MLflow where a server shows it."""
    rows = []
    for outcome in session.outcomes:
        stage, result = outcome.stage, outcome.record.result
        page = session.stage_url(stage)
        rows.append(
            [
                link(stage.title, page) if page else stage.title,
                "Cached" if outcome.cached else "built",
                duration(outcome.seconds),
                f"`{stage.key[:12]}`",
                headline(stage.name, result),
            ]
        )
    parts = [
        f"**{status.lower()}**",
        table(["stage", "state", "time", "key", "result"], rows) if rows else "",
        _scores(session),
        "\n".join(f"- {line}" for line in _places(session, workplace)),
    ]
    text = "\n\n".join(part for part in parts if part)
    _keep(f"{session.plan.name}-summary", text, "what came of this run, and where it is")


def _places(session: Session, workplace: Workplace) -> Iterator[str]:
    page = session.run_url
    yield f"MLflow: {link('the run', page)}" if page else "MLflow: `regrow ui` shows it"
    for outcome in session.outcomes:
        if outcome.stage.name == "publish":
            yield f"model: `{outcome.record.result['target']}`"
    if session.report_url:
        yield f"report: `{session.report_url}`"
    yield f"store: `{workplace.store_url}`"


def _scores(session: Session) -> str:
    results = [o.record.result for o in session.outcomes if o.stage.title == "evaluate"]
    comparison = (results[-1].get("comparison") if results else None) or {}
    before, after = comparison.get("before", {}), comparison.get("after", {})
    rows = [
        [score.title, score.show(before[score.name]), score.show(after[score.name])]
        for score in SCORES
        if score.name in before and score.name in after
    ]
    return table(["on held-out data", "before", "after"], rows) if rows else ""


def _keep(key: str, markdown: str, description: str) -> None:
    _told(create_markdown_artifact, mask_secrets(markdown), _slug(key), description)


def _slug(text: str) -> str:
    """The form that Prefect asks of an artifact's key: lower-case letters, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


def _told(write: Callable[..., Any], *args: Any) -> Any:
    """What `write` returns; a page that cannot be written costs the run nothing but a line."""
    try:
        return write(*args)
    except (HTTPError, PrefectException) as error:
        say(f"warning: Prefect's page does not show all of this run: {mask_secrets(str(error))}")
        return None


@contextmanager
def progress_bar(stage: Stage) -> Iterator[Listener]:
    """Gives what hears of a stage's progress and draws it on its task's page."""
    bar = _Bar(stage)
    try:
        yield bar.hear
    finally:
        bar.close()


class _Bar:
    """Writes in a thread of its own, one write at a time: a slow server slows no stage."""

    def __init__(self, stage: Stage) -> None:
        self._key = _slug(f"{stage.title}-progress")
        self._context = contextvars.copy_context()  # Prefect finds the task run in it
        self._last = time.monotonic()
        self._writer = ThreadPoolExecutor(1, "progress")
        self._pending: Future[None] | None = None
        self._id: Any = None
        self._broken = False
        self._latest = (0.0, "")

    def hear(self, done: float, total: float | None, unit: str, note: str) -> None:
        """See `Reporter.progress`."""
        if not total:
            return
        share = min(100.0, 100.0 * done / total)
        self._latest = (share, f"{done:,.0f} of {total:,.0f} {unit} {note}".strip())
        now = time.monotonic()
        due = _EVERY_SECONDS if self._id else _LONG_SECONDS
        busy = self._pending is not None and not self._pending.done()
        if self._broken or busy or now - self._last < due:
            return
        self._last = now
        self._pending = self._writer.submit(self._context.run, self._write, *self._latest)

    def _write(self, share: float, text: str) -> None:
        text = mask_secrets(text)
        if self._id is None:
            self._id = _told(create_progress_artifact, share, self._key, text)
            self._broken = self._id is None
        else:
            self._broken = _told(update_progress_artifact, self._id, share, text) is None

    def close(self) -> None:
        """Let a bar that was drawn show how far the stage came."""
        if self._pending is not None and not self._broken:
            self._writer.submit(self._context.run, self._write, *self._latest)
        self._writer.shutdown(wait=True)

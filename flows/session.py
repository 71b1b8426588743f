"""One run of a plan: the store, MLflow and the terminal around each stage that is built."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from regrow.flows.journal import FLOW_RUN, Closing, Journal
from regrow.flows.journal_process import JournalProcess
from regrow.flows.progress import LineReporter, Listener, duration, say
from regrow.flows.workplace import Workplace
from regrow.infra.artifacts import ArtifactDamaged
from regrow.infra.device_files import Devices
from regrow.infra.secrets import mask_secrets
from regrow.infra.store import StoreError
from regrow.infra.tracking import Tracker
from regrow.tasks import report
from regrow.tasks.build import Outcome, Slots
from regrow.tasks.headline import headline
from regrow.tasks.plan import Plan
from regrow.tasks.stage import Stage

Watch = Callable[[Stage], AbstractContextManager[Listener | None]]
"""What else hears of a stage's progress, while the stage is at work."""


def _no_watch(_stage: Stage) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Origin:
    """Where a run comes from: what its records and pages call it."""

    name: str
    recipe_text: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    prefect_page: str | None = None
    """Address of the flow run's page, where a server shows it."""


class Session:
    """Runs the stages of one plan and tells the terminal and MLflow about each.

    Args:
        plan: what to run.
        workplace: store, home and builder.
        tracker: MLflow, or None when the recipe tracks nowhere.
        origin: the run's name and recipe.
        emit: gets each line for people.
        watch: gives what else hears of a stage's progress.
        journal: writes into MLflow; default: one in this process.
    """

    def __init__(
        self,
        plan: Plan,
        workplace: Workplace,
        tracker: Tracker,
        origin: Origin,
        emit: Callable[[str], None] = say,
        watch: Watch = _no_watch,
        journal: JournalProcess | None = None,
    ) -> None:
        self.plan, self._workplace, self._tracker, self._emit = plan, workplace, tracker, emit
        self._origin, self._watch = origin, watch
        self.report_url: str | None = None
        """Where the run's report is; None before `close`, or when it could not be written."""
        notes = {"recipe": origin.recipe_text, "recipe_name": origin.name}
        self._builder = workplace.builder.noting(notes)
        self._journal = journal or Journal(tracker, workplace.artifacts, origin.name)
        self.prefect_page = origin.prefect_page
        self.outcomes: list[Outcome] = []
        # MLflow's answers take tens of milliseconds each; one thread keeps their order and lets
        # the stages go on meanwhile.
        self._writer = ThreadPoolExecutor(1, "journal")
        self._pending: list[Future[None]] = []
        self._begun: set[str] = set()
        self._why_failed = ""
        # Before the first look into the store: what a run has found must stay until it ends.
        self._in_use = self._builder.announce("runs", plan.stages, emit)
        page = origin.prefect_page or ""
        self._note(self._journal.begin, origin.recipe_text, origin.params, origin.tags, page)

    def run(self, stage: Stage, slots: Slots = lambda _stage: nullcontext()) -> Outcome:
        """Build a stage or find it in the store.

        Args:
            slots: what a stage must hold while it is built; see `Builder.build`.

        Raises:
            one of `EXPECTED`, which say what is wrong.
        """
        held = ExitStack()
        report = LineReporter(stage.title, self._emit, held.enter_context(self._watch(stage)))
        started: list[str] = []

        def tracking(devices: Devices | None) -> dict[str, str]:
            words = devices.words if devices else ""
            report.log(f"starts (key {stage.key[:12]}){f' on GPU {words}' if words else ''}")
            begin = self._writer.submit(self._journal.start_stage, stage, words)
            started.append(begin.result())
            self._begun.add(stage.key)
            return {"uri": self._tracker.uri, "run_id": started[-1]}

        try:
            with held:
                outcome = self._builder.build(stage, report, tracking, slots)
        except BaseException as error:
            for run_id in started:
                why = str(error) or type(error).__name__
                status = "FAILED" if isinstance(error, Exception) else "KILLED"
                self._note(self._journal.fail_stage, run_id, why, status)
            self._why_failed = str(error)
            raise
        self.outcomes.append(outcome)
        self._workplace.remember(self.plan.name, stage)
        self._note(self._journal.finish_stage, outcome, started[-1] if started else None)
        done = "found in the store" if outcome.cached else f"done in {duration(outcome.seconds)}"
        report.log(f"{done}: {headline(stage.name, outcome.record.result)}")
        return outcome

    def has_begun(self, stage: Stage) -> bool:
        """Whether the stage's own work has begun in this run, however it ended."""
        return stage.key in self._begun

    def close(self, status: str) -> None:
        """Write what is left into MLflow and end the run there.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".
        """
        try:
            self._tell_all(status)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        try:
            self._in_use.forget()
        except (StoreError, OSError) as error:
            self._emit(f"warning: for a while `gc` takes this run for one at work: {error}")

    def _tell_all(self, status: str) -> None:
        begin = time.monotonic()
        if status == "FINISHED" and self.plan.register_as and self.plan.publishes(self.outcomes):
            self._note(
                self._journal.register,
                self.outcomes[-1],
                self.plan.register_as,
                self.plan.model,
            )
        page = self._write_report(status)
        self._note(self._journal.end, Closing(list(self.outcomes), status, page))
        self._wait_for_mlflow()
        errors = {str(error) for future in self._pending if (error := future.exception())}
        for error in errors - {self._why_failed}:  # that is told already
            # The artifacts are complete whatever MLflow says; the user must know what is missing.
            self._emit(f"warning: MLflow does not show all of this run: {error}")
        if (seconds := time.monotonic() - begin) > 5:
            self._emit(f"(writing to MLflow took {duration(seconds)})")

    def _wait_for_mlflow(self) -> None:
        """Return when all is written; told to stop now, the run still waits, but not for long."""
        try:
            self._writer.shutdown(wait=True)
        except BaseException:
            self._journal.hurry()
            wait(self._pending)  # Python 3.11 takes the thread's interrupted join for its end
            raise

    def _write_report(self, status: str) -> str:
        """The run's report, kept in the store too: what a machine holds can be lost with it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        places = {"store": self._workplace.store_url, "MLflow": self._tracker.uri}
        if self.prefect_page:
            places["Prefect"] = self.prefect_page
        facts = report.RunFacts(
            self.plan, self.outcomes, status, self._origin.recipe_text, now, places
        )
        flow_run = self._origin.tags.get(FLOW_RUN, "")[:8]
        moment = now[:19].replace(":", "")
        name = f"reports/{self.plan.name}/{moment}-{flow_run or 'run'}.html"
        store, page = self._workplace.artifacts.store, ""
        try:
            page = report.page(facts, self._workplace.artifacts.lookup)
            store.write_bytes(name, page.encode())
        except (StoreError, OSError, ArtifactDamaged) as error:
            self._emit(f"warning: the run's report was not kept in the store: {error}")
        else:
            self.report_url = mask_secrets(store.url_of(name))
        return page

    @property
    def run_url(self) -> str | None:
        """The run's page in MLflow, where a server shows it."""
        return self._journal.run_url

    def stage_url(self, stage: Stage) -> str | None:
        """The page of a finished stage in MLflow, where a server shows it."""
        return self._journal.stage_url(stage)

    def _note(self, write: Callable[..., Any], *args: Any) -> None:
        self._pending.append(self._writer.submit(write, *args))

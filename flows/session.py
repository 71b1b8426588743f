"""One run of a plan: the store, MLflow and the terminal around each stage that is built."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from regrow.flows.journal import Journal
from regrow.flows.progress import LineReporter, duration, say
from regrow.flows.workplace import Workplace
from regrow.infra.tracking import Tracker
from regrow.tasks.build import Outcome
from regrow.tasks.headline import headline
from regrow.tasks.plan import Plan
from regrow.tasks.stage import Stage

Slots = Callable[[Stage], AbstractContextManager[Any]]
"""What a stage must hold while it is built, such as GPUs."""


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
    """

    def __init__(
        self,
        plan: Plan,
        workplace: Workplace,
        tracker: Tracker,
        origin: Origin,
        emit: Callable[[str], None] = say,
    ) -> None:
        self.plan, self._workplace, self._tracker, self._emit = plan, workplace, tracker, emit
        notes = {"recipe": origin.recipe_text, "recipe_name": origin.name}
        self._builder = workplace.builder.noting(notes)
        self._journal = Journal(tracker, workplace.artifacts, origin.name)
        self.prefect_page = origin.prefect_page
        self.outcomes: list[Outcome] = []
        # MLflow's answers take tens of milliseconds each; one thread keeps their order and lets
        # the stages go on meanwhile.
        self._writer = ThreadPoolExecutor(1, "journal")
        self._pending: list[Future[None]] = []
        self._note(self._journal.begin, origin.recipe_text, origin.params, origin.tags)

    def run(self, stage: Stage, slots: Slots = nullcontext) -> Outcome:
        """Build a stage or find it in the store.

        Args:
            slots: entered before the stage's own work begins and left after it; not entered when
                there is nothing to build.

        Raises:
            one of `EXPECTED`, which say what is wrong.
        """
        report = LineReporter(stage.title, self._emit)
        started: list[str] = []

        held = ExitStack()

        def tracking() -> dict[str, str]:
            held.enter_context(slots(stage))
            report.log(f"starts (key {stage.key[:12]})")
            started.append(self._writer.submit(self._journal.start_stage, stage).result())
            return {"uri": self._tracker.uri, "run_id": started[-1]}

        try:
            with held:
                outcome = self._builder.build(stage, report, tracking)
        except BaseException as error:
            for run_id in started:
                why = str(error) or type(error).__name__
                status = "FAILED" if isinstance(error, Exception) else "KILLED"
                self._note(self._journal.fail_stage, run_id, why, status)
            raise
        self.outcomes.append(outcome)
        self._workplace.remember(self.plan.name, stage)
        self._note(self._journal.finish_stage, outcome, started[-1] if started else None)
        done = "found in the store" if outcome.cached else f"done in {duration(outcome.seconds)}"
        report.log(f"{done}: {headline(stage.name, outcome.record.result)}")
        return outcome

    def close(self, status: str) -> None:
        """Write what is left into MLflow and end the run there.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".
        """
        begin = time.monotonic()
        final = self.outcomes[-1].record if self.outcomes else None
        if status == "FINISHED" and self.plan.register_as and self.plan.publishes(self.outcomes):
            self._note(
                self._journal.register,
                self.outcomes[-1],
                self.plan.register_as,
                self.plan.model,
            )
        self._note(self._journal.end, list(self.outcomes), status, final)
        self._writer.shutdown(wait=True)
        errors = {str(error) for future in self._pending if (error := future.exception())}
        for error in errors:
            # The artifacts are complete whatever MLflow says; the user must know what is missing.
            self._emit(f"warning: MLflow does not show all of this run: {error}")
        if (seconds := time.monotonic() - begin) > 5:
            self._emit(f"(writing to MLflow took {duration(seconds)})")

    @property
    def run_url(self) -> str | None:
        """The run's page in MLflow, where a server shows it."""
        parent = self._journal.parent_run_id
        return self._tracker.run_url(parent) if parent else None

    def _note(self, write: Callable[..., Any], *args: Any) -> None:
        self._pending.append(self._writer.submit(write, *args))

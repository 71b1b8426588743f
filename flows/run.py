"""A flow run: plan, session and stage tasks, opened at its start and closed whatever happens."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import yaml
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from regrow.configs.load import parse_recipe
from regrow.configs.recipe import Recipe
from regrow.flows import run_page
from regrow.flows.heartbeat import beating
from regrow.flows.interruption import remembered
from regrow.flows.journal import FLOW_RUN
from regrow.flows.journal_process import journal_of
from regrow.flows.other_machines import OtherMachines
from regrow.flows.progress import say
from regrow.flows.session import Origin, Session
from regrow.flows.stage_task import StageFailed, StagePreempted, StageRunner
from regrow.flows.stopping import PauseWatch, preempted, state_after_signal
from regrow.flows.workplace import Workplace
from regrow.infra.secrets import mask_texts, without_secrets
from regrow.infra.settings import load_settings, quiet_environment
from regrow.tasks.build import Outcome
from regrow.tasks.plan import Plan, make_plan
from regrow.tasks.stage import Stage


class FlowRun:
    """`with FlowRun(recipe, name) as run: run(run.plan.prepare)`, then `return run.state`.

    A stage that fails for a reason of the user's ends the block, and so does a stop in good order;
    `state` then says so.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        # A recipe from a form has not been through the rules; one from a file passes them again.
        self._recipe, self._name = parse_recipe(recipe.given()).recipe, name
        self.state: State[Any] = Completed()
        """How the flow run ended, for the flow to return."""

    def __enter__(self) -> FlowRun:
        try:
            with ExitStack() as held:
                held.enter_context(beating())
                self._open(held)
                self._held = held.pop_all()
            return self
        except Exception as error:
            if (told := without_secrets(error)) is not error:
                raise told from None  # Prefect keeps the message of what ends a run
            raise

    def _open(self, held: ExitStack) -> None:
        quiet_environment()  # a worker starts this flow without any command of ours
        workplace = Workplace(load_settings(), self._recipe.store)
        workplace.artifacts.store.check_writable()
        self.plan: Plan = make_plan(self._recipe, self._name, workplace.memo)
        self._journal = journal_of(workplace.journal_place(self._recipe, self._name))
        held.callback(self._journal.close)  # a worker's process lasts longer than its runs
        run_page.show_plan(self.plan, workplace)
        self._workplace = workplace
        tracker, origin = workplace.tracker(self._recipe), self._origin()
        self._session = Session(
            self.plan, workplace, tracker, origin, say, run_page.progress_bar, self._journal
        )
        self._run_stage = StageRunner(self._session)
        self._others = OtherMachines(say)
        self._pauses = PauseWatch()
        self._signals = remembered()
        self._signals.__enter__()

    def __call__(self, stage: Stage) -> Outcome:
        """Build a stage, as a Prefect task."""
        try:
            return self._run_stage(stage)
        finally:
            self._others.ended(stage, self._session.has_begun(stage))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        with self._held:
            return self._closed(error)

    def _closed(self, error: BaseException | None) -> bool:
        """End what `_open` began; whether `state` says how the run ended."""
        self._pauses.stop()
        self._signals.__exit__(None, None, None)
        status = _mlflow_status(error)
        if status == "KILLED":
            self._journal.hurry()
        try:
            self._session.close(status)
            run_page.show_summary(self._session, self._workplace, status)
        finally:
            if self._recipe.launcher == "torchrun":
                self._others.send_away(error)
        state = self._state_after(error)
        if state is not None:
            self.state = state
        elif isinstance(error, Exception) and (told := without_secrets(error)) is not error:
            raise told from None  # Prefect keeps the message of what ends a run
        return state is not None

    def _state_after(self, error: BaseException | None) -> State[Any] | None:
        """How the flow run ends; None: as Prefect says of `error`."""
        if error is None:
            return Completed(message="all stages are complete", data=self._session)
        if isinstance(error, StagePreempted):
            return preempted(str(error))
        if isinstance(error, StageFailed):
            return Failed(message=str(error), data=error)
        return state_after_signal() if isinstance(error, TerminationSignal) else None

    def _origin(self) -> Origin:
        given = mask_texts(self._recipe.given())
        text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
        tags = {FLOW_RUN: flow_run.id or ""}
        # Without a server of the user's, Prefect's page ends with the run.
        page = flow_run.ui_url if load_settings().prefect_api_url else None
        return Origin(self._name, text, given, tags, page)


def _mlflow_status(error: BaseException | None) -> str:
    if error is None:
        return "FINISHED"
    failed = isinstance(error, Exception) and not isinstance(error, StagePreempted)
    return "FAILED" if failed else "KILLED"

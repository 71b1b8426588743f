"""A flow run: plan, session and stage tasks, opened at its start and closed whatever happens."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import yaml
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from regrow.configs.load import parse_recipe
from regrow.configs.recipe import Recipe
from regrow.flows.progress import say
from regrow.flows.session import Origin, Session
from regrow.flows.stage_task import StageFailed, StageRunner
from regrow.flows.workplace import Workplace
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import load_settings
from regrow.infra.tracking import Tracker
from regrow.tasks.build import Outcome
from regrow.tasks.plan import Plan, make_plan
from regrow.tasks.stage import Stage


class FlowRun:
    """`with FlowRun(recipe, name) as run: run(run.plan.prepare)`, then `return run.state`.

    A stage that fails for a reason of the user's ends the block; `state` then says so.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        # A recipe from a form has not been through the rules; one from a file passes them again.
        self._recipe, self._name = parse_recipe(recipe.given()).recipe, name
        self.state: State[Any] = Completed()
        """How the flow run ended, for the flow to return."""

    def __enter__(self) -> FlowRun:
        workplace = Workplace(load_settings(), self._recipe.store)
        workplace.artifacts.store.check_writable()
        self.plan: Plan = make_plan(self._recipe, self._name, workplace.memo)
        uri = self._recipe.mlflow_tracking_uri or workplace.tracking_uri
        experiment = self._recipe.mlflow_experiment_name or "regrow"
        self._session = Session(self.plan, workplace, Tracker(uri, experiment), self._origin(), say)
        self._run_stage = StageRunner(self._session)
        return self

    def __call__(self, stage: Stage) -> Outcome:
        """Build a stage, as a Prefect task."""
        return self._run_stage(stage)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            self._session.close("FINISHED")
            self.state = Completed(message="all stages are complete", data=self._session)
        elif isinstance(error, StageFailed):
            self._session.close("FAILED")
            self.state = Failed(message=str(error), data=error)
        else:
            self._session.close("FAILED" if isinstance(error, Exception) else "KILLED")
        return isinstance(error, StageFailed)

    def _origin(self) -> Origin:
        given = self._recipe.given()
        text = mask_secrets(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
        tags = {"prefect.flow_run_id": flow_run.id or ""}
        # Without a server of the user's, Prefect's page ends with the run.
        page = flow_run.ui_url if load_settings().prefect_api_url else None
        return Origin(self._name, text, yaml.safe_load(text), tags, page)

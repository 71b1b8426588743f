"""A stage as a Prefect task: `Cached` when found in the store, its real error when failed."""

# No `from __future__ import annotations` here: Prefect evaluates annotations.
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed
from prefect.utilities.annotations import quote

from regrow.flows.gpu_slots import gpus_of
from regrow.flows.interruption import look
from regrow.flows.session import Session
from regrow.flows.stopping import PREEMPTED
from regrow.infra.secrets import mask_secrets, without_secrets
from regrow.tasks.build import EXPECTED, Outcome
from regrow.tasks.stage import Stage
from regrow.tasks.train.attempts import Preempted


class StageFailed(RuntimeError):  # noqa: N818 (the name says what is the matter)
    """A stage ended with an expected failure; the message is that of the cause."""


class StagePreempted(StageFailed):
    """A stage stopped in good order before its end; the next run goes on from there."""


@task(cache_policy=NO_CACHE, persist_result=False)
def _run_stage(session: Any, stage: Any) -> Any:
    try:
        outcome = session.run(stage, gpus_of)
    except Preempted as error:
        why = StagePreempted(f"{stage.title}: {error}")
        return Failed(name=PREEMPTED, message=str(error), data=why)
    except EXPECTED as error:
        # A state, not a raise: Prefect would print the traceback of an error that explains itself.
        why = mask_secrets(str(error))
        return Failed(message=why, data=StageFailed(f"{stage.title}: {why}"))
    except Exception as error:
        told = without_secrets(error)
        if told is not error:
            raise told from None
        raise
    name = "Cached" if outcome.cached else "Completed"
    return Completed(name=name, message=f"key {stage.key[:12]}", data=outcome)


class StageRunner:
    """Calls stages as tasks of the flow that it is made in, with the edges that Prefect draws."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._states: dict[str, Any] = {}

    def __call__(self, stage: Stage) -> Outcome:
        """The stage's outcome. Raises StageFailed, or what a bug of ours raised."""
        look()  # a signal that came between two stages, or before the first
        # `quote` keeps Prefect from looking for futures inside our objects.
        state = _run_stage.with_options(task_run_name=stage.title)(
            quote(self._session),
            quote(stage),
            wait_for=[self._states[s.key] for s in stage.inputs.values() if s.key in self._states],
            return_state=True,
        )
        # For the edge alone: Prefect would look for futures in all that the outcome holds.
        self._states[stage.key] = state.model_copy(update={"data": stage.key})
        return state.result()

"""What a Prefect server does by itself for our runs: it notices dead ones and starts them again."""

# No `from __future__ import annotations`: as in every module that Prefect's classes are made in.
from datetime import timedelta
from typing import Any

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

from regrow.flows.stopping import PREEMPTED

DEAD = "regrow: a run without heartbeat has crashed"
"""Name of an automation. Prefect has none by itself, and refuses to retry a run that it believes
alive (platform.md B3)."""
AGAIN = "regrow: a crashed run of a deployment is started again"
"""Name of an automation."""

FLOWS = ("finetune", "stages", "watch-data")
"""The flows that are ours: others' on the same server may beat more slowly."""

# More than two heartbeats of 30 s, the shortest that Prefect allows (platform.md B3).
_SILENCE = timedelta(seconds=70)
# A worker tells of a dead process twice, some seconds apart; were the run started again in between,
# the second word would count it as crashed once more. Prefect's shortest is 10 s.
_SETTLED = timedelta(seconds=15)
# A run that finds its machine too small crashes each time; a person should then look at it.
_MOST_STARTS = 10

_RUN = "prefect.flow-run"
_BEAT = f"{_RUN}.heartbeat"
# A state that ends the process, or one that waits for a next process. "Running" is not among them:
# it comes at the time of the first heartbeat, and a run may die before the second.
_SILENT = ("Completed", "Failed", "Cancelled", "Crashed", "Cancelling", "Paused", "Suspended")
_SILENT += ("AwaitingRetry", "Scheduled", "Late", PREEMPTED)


def ensure_automations() -> list[str]:
    """Install both, or renew them; lines that say so."""
    _replace(DEAD, _dead(), _becomes(StateType.CRASHED, None, "no heartbeat"))
    again = _becomes(StateType.SCHEDULED, "AwaitingRetry", "started again after a crash")
    _replace(AGAIN, _crashed(), again)
    return [
        f"a run that is silent for {_SILENCE.total_seconds():g} s is marked as crashed",
        f"a crashed run is started again where it stopped, {_MOST_STARTS - 1} times at most",
    ]


def _becomes(state: StateType, name: str | None, message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=state, name=name, message=message, force=False)


def _replace(name: str, trigger: EventTrigger, action: ActionTypes) -> None:
    wanted = Automation(name=name, trigger=trigger, actions=[action])
    try:
        found: Any = Automation.read(name=name)
    except ValueError:  # Prefect's word for "there is none of that name"
        wanted.create()
    else:
        wanted.id = found.id
        wanted.update()


def _ours(**more: Any) -> dict[str, Any]:
    flow = {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}
    match = {"prefect.resource.id": f"{_RUN}.*"} | more
    return {"match": match, "match_related": flow, "for_each": {"prefect.resource.id"}}


def _dead() -> EventTrigger:
    return EventTrigger(
        after={_BEAT},
        expect={_BEAT, *(f"{_RUN}.{state}" for state in _SILENT)},
        posture=Posture.Proactive,
        threshold=1,
        within=_SILENCE,
        **_ours(),
    )


def _crashed() -> EventTrigger:
    starts = [str(count) for count in range(1, _MOST_STARTS)]
    changed = ("AwaitingRetry", "Scheduled", "Pending", "Running", "Cancelled", "Completed")
    return EventTrigger(
        after={f"{_RUN}.Crashed"},
        expect={f"{_RUN}.{state}" for state in changed},
        posture=Posture.Proactive,
        threshold=1,
        within=_SETTLED,
        **_ours(**{"prefect.run-count": starts}),
    )

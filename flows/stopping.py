"""What becomes of a run that is told to stop: cancelled, paused, or preempted and gone on with."""

# No `from __future__ import annotations`: as in every module that flows are made of.
import os
import signal
import threading
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause
from prefect.runtime import deployment, flow_run
from prefect.states import Crashed, Scheduled

PREEMPTED = "Preempted"
"""Name of the state."""

# As often as Prefect's own watch, which stops a run between two stages only.
_LOOK_SECONDS = 10.0


def preempted(message: str) -> State[Any]:
    """The state of a run that stopped in good order before its end, and has no deployment: no
    worker would ever go on with it, so it is CRASHED, which is final and can be retried.

    Raises:
        Pause: for a run of a deployment, which is SCHEDULED by then. Of Prefect's types only this
            one is taken up by workers, by themselves and on whatever machine. (PAUSED would wait
            for a person; CRASHED raises alarms.) The flow cannot return it: a process that ends
            so fails with `UnfinishedRun`, and its worker sees a crash. `Pause` is how Prefect
            itself ends the process of a run that another goes on with.
    """
    if deployment.id is None:
        return Crashed(name=PREEMPTED, message=message)
    state = Scheduled(name=PREEMPTED, message=message)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, state)
    raise Pause(state=state)


def state_after_signal() -> State[Any] | None:
    """How a run ends whose process got SIGTERM; None where Prefect says it (a cancelled run).

    Raises:
        Pause: when a pause was asked for (the run stays paused, and resumes from Prefect's page),
            and as `preempted` does.
    """
    if deployment.id is None:
        return None
    state = _state_on_server()
    if state is not None and state.is_paused():
        raise Pause(state=state)
    if state is not None and state.is_running():
        return preempted("its process was told to stop, and has saved what it could")
    return None


def _state_on_server() -> State[Any] | None:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run.id).state


class PauseWatch:
    """From now on, a pause asked for on Prefect's page stops the stage that runs, with SIGTERM.

    Prefect stops a paused run between two tasks; ours may take days. Only runs of a deployment can
    be paused so: somebody must start them again.
    """

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pauses", daemon=True)
        self._run_id = flow_run.id
        if deployment.id is not None:
            self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        with get_client(sync_client=True) as client:
            while not self._done.wait(_LOOK_SECONDS):
                try:
                    state = client.read_flow_run(self._run_id).state
                except httpx.HTTPError:
                    continue  # a server that is away for a while must not end the training
                if state is not None and state.is_paused() and not self._done.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

"""A run that stopped in good order waits for a worker where one will come, and ends elsewhere."""

from __future__ import annotations

import pytest

from regrow.flows.automations import FLOWS
from regrow.flows.finetune import finetune, stages_upto
from regrow.flows.run import _mlflow_status
from regrow.flows.stage_task import StageFailed, StagePreempted
from regrow.flows.stopping import PREEMPTED, preempted, state_after_signal
from regrow.flows.watch import watch_source


def test_preempted_run_of_a_person_has_ended_and_can_be_retried():
    state = preempted("after step 3")
    assert (state.name, state.is_crashed(), state.is_final()) == (PREEMPTED, True, True)


def test_signal_ends_a_persons_run_as_prefect_says():
    assert state_after_signal() is None


def test_automations_look_at_our_flows_only():
    assert set(FLOWS) == {flow.name for flow in (finetune, stages_upto, watch_source)}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (StageFailed("x"), "FAILED"),
        (StagePreempted("x"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_mlflow_hears_how_a_run_ended(error, status):
    assert _mlflow_status(error) == status

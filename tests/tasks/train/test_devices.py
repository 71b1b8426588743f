"""What a recipe asks of the GPUs is checked against what they are, before anything is loaded."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from regrow.tasks.stage import StageError
from regrow.tasks.train.devices import DeviceFacts, check_devices
from regrow.tasks.train.spec import TrainPlacement, TrainSpec

SPEC = TrainSpec("digest", "bfloat16", 1, 1.0, 1e-4)
TWO = TrainPlacement("/models/m", num_processes=2)
OLD, NEW = (DeviceFacts(2, name, its) for name, its in (("T4", (7, 5)), ("H100", (9, 0))))


def test_more_processes_than_gpus_are_refused_with_both_numbers():
    with pytest.raises(StageError, match="2 processes need as many GPUs, and this machine has 1"):
        check_devices(SPEC, TWO, dataclasses.replace(NEW, count=1))


@pytest.mark.parametrize("facts", [NEW, None])
def test_what_fits_is_not_spoken_of(caplog, facts):
    with caplog.at_level(logging.INFO):
        check_devices(SPEC, TWO, facts)
    assert not caplog.text


def test_slow_bfloat16_is_said(caplog):
    check_devices(SPEC, TWO, OLD)
    assert "T4 computes bfloat16 slowly" in caplog.text


def test_on_the_cpu_gpus_do_not_matter(caplog):
    check_devices(SPEC, dataclasses.replace(TWO, device="cpu", num_processes=9), OLD)
    assert not caplog.text

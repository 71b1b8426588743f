"""The learning rate follows the curve that the recipe names, and goes on with it after a resume."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from regrow.tasks.stage import StageError
from regrow.tasks.train.learning_rate import make_scheduler
from regrow.tasks.train.spec import Restarts, TrainSpec

TOTAL, WARMUP = 20, 4


def spec(name, restarts=None, **kwargs):
    schedule = {"lr_scheduler": name, "lr_scheduler_kwargs": kwargs, "restarts": restarts}
    return TrainSpec("0" * 64, "float32", 4, 1, 1.0, **schedule)


def optimizer(rates=(1.0,)):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def rates(chosen, rate=(1.0,)):
    """The rate of each step, of the first group."""
    steps = optimizer(rate)
    scheduler = make_scheduler(steps, chosen, WARMUP, TOTAL)
    found = []
    for _ in range(TOTAL):
        found.append(steps.param_groups[0]["lr"])
        steps.step()
        scheduler.step()
    return found


def test_rex_stays_high_and_ends_at_its_lowest():
    found = rates(spec("rex", min_lr_rate=0.1))
    assert found[:5] == [0, 0.25, 0.5, 0.75, 1.0]
    left = (TOTAL - 12) / (TOTAL - WARMUP)
    assert found[12] == pytest.approx(0.1 + 0.9 * left / (0.1 + 0.9 * left))
    assert all(a > b for a, b in itertools.pairwise(found[4:]))
    assert found[-1] > 0.1


def test_a_cosine_can_end_early_and_warm_up_by_squares():
    found = rates(spec("cosine_until", min_lr_rate=0.2, until=0.6, quadratic=True))
    assert found[:5] == [0, 1 / 16, 1 / 4, 9 / 16, 1.0]
    half = 0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2
    assert found[8] == pytest.approx(half)
    assert found[12:] == pytest.approx([0.2] * 8)


def test_one_cycle_rises_to_the_rate_of_each_group_and_falls_far_below():
    steps = optimizer((1.0, 0.5))
    scheduler = make_scheduler(steps, spec("one_cycle", div_factor=10.0), WARMUP, TOTAL)
    seen = []
    for _ in range(TOTAL):
        seen.append([group["lr"] for group in steps.param_groups])
        steps.step()
        scheduler.step()
    assert seen[0] == pytest.approx([0.1, 0.05])
    assert max(a for a, _ in seen) == pytest.approx(1.0, abs=0.05)
    assert all(a == pytest.approx(2 * b) for a, b in seen)
    assert seen[-1][0] < 0.05


def test_restarts_fall_to_a_thousandth_and_rise_again():
    found = rates(spec("constant", Restarts(steps=6, warmup=2, anneal=2)))
    cycle = [1.0, 1.0, 1.0, 1.0, 0.5005, 0.001]
    assert found[:6] == pytest.approx(cycle)
    assert found[6:12] == pytest.approx([0.001, 0.5005, 1.0, 1.0, 0.5005, 0.001])


@pytest.mark.parametrize(
    ("name", "kwargs"), [("rex", {"power": 2}), ("cosine_with_min_lr", {}), ("one_cycle", {"x": 1})]
)
def test_arguments_it_does_not_take_are_named(name, kwargs):
    with pytest.raises(StageError, match=f"lr_scheduler_kwargs: {name}"):
        make_scheduler(optimizer(), spec(name, **kwargs), WARMUP, TOTAL)

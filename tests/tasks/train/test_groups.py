"""Groups of an optimizer are found again in a checkpoint, whoever had cut them otherwise."""

from __future__ import annotations

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from regrow.tasks.stage import StageError
from regrow.tasks.train.groups import for_groups, match_groups


def group(*names, decay=0.1):
    return {"names": list(names), "weight_decay": decay}


WHOLE = [group("a", "b"), group("norm", decay=0.0)]
CUT = [group("b"), group("a"), group("norm", decay=0.0)]
UNNAMED = [group(), group(decay=0.0)]


@pytest.mark.parametrize(
    ("here", "saved", "matched"),
    [
        (WHOLE, WHOLE, [0, 1]),
        (CUT, WHOLE, [0, 0, 1]),
        (WHOLE, CUT, [0, 2]),
        (CUT, UNNAMED, [0, 0, 1]),
        (UNNAMED, CUT, [0, 2]),
        (UNNAMED, WHOLE, [0, 1]),
        (WHOLE, WHOLE[::-1], [1, 0]),
        # No decay at all: groups that are alike hold one thing each.
        ([group("a"), group("norm")], [group("norm"), group("a")], [1, 0]),
    ],
)
def test_each_group_goes_on_from_the_one_that_held_its_parameters(here, saved, matched):
    assert match_groups(here, saved) == matched


def test_a_group_of_other_parameters_is_a_fault():
    with pytest.raises(StageError, match="no such group"):
        match_groups([group("c")], WHOLE)


def test_groups_of_other_rates_are_not_taken_for_one_another():
    saved = [group() | {"initial_lr": rate} for rate in (1e-3, 1e-4)]
    here = [group(name) | {"initial_lr": 1e-4} for name in "abc"]
    with pytest.raises(StageError, match="which is which"):
        match_groups(here, saved)
    assert match_groups(here, [saved[0], saved[0]]) == [0, 0, 0]


@pytest.mark.parametrize("matched", [[0, 0, 1], [1], [0, 1]])
def test_a_schedule_goes_on_with_as_many_groups_as_there_are(matched):
    def scheduler(groups):
        weights = [{"params": [torch.zeros(1)], "lr": 10.0**-group} for group in groups]
        optimizer = AdamW(weights)
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    optimizer, before = scheduler([0, 1])
    for _ in range(3):
        optimizer.step()
        before.step()
    other, after = scheduler([9] * len(matched))
    after.load_state_dict(for_groups(before.state_dict(), matched, 2))
    for _ in range(2):
        optimizer.step()
        before.step()
        other.step()
        after.step()
    rates = before.get_last_lr()
    assert after.get_last_lr() == [rates[number] for number in matched]

"""Chosen parameters train, the rest is frozen; a pattern that means nothing is a fault."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regrow.tasks.modeling.freezing import train_only
from regrow.tasks.stage import StageError


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    net.register_module("tied", nn.Linear(3, 4))
    net.tied.weight = net[0].weight
    return net


def test_what_no_pattern_matches_is_frozen_and_small():
    net = model()
    assert train_only(net, [r"1\."], torch.bfloat16) == frozenset()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"1.weight", "1.bias"}
    assert net[0].weight.dtype == torch.bfloat16
    assert net[1].weight.dtype == torch.float32


def test_rows_are_chosen_by_gradients_and_ranges_add_up():
    net = model()
    partly = train_only(net, ["1.weight[0:2]", "1.weight[4:5]", "1.bias"], torch.float32)
    assert partly == {"1.weight"}
    net[1](torch.ones(2, 4)).sum().backward()
    assert net[1].weight.grad.abs().sum(1).bool().tolist() == [True, True, False, False, True]
    assert net[1].bias.grad.bool().all()


def test_a_whole_match_beats_a_range_and_a_tied_name_will_do():
    net = model()
    assert train_only(net, ["0.weight[0:1]", "tied.weight"], torch.float32) == frozenset()
    assert net[0].weight.requires_grad


@pytest.mark.parametrize(
    ("pattern", "message"), [("nothing", "matches no parameter"), ("1.weight[0:9]", "that has 5")]
)
def test_what_means_nothing_is_refused(pattern, message):
    with pytest.raises(StageError, match=message):
        train_only(model(), [pattern], torch.float32)

"""Rounding trained weights to bfloat16 keeps, over many weights, what training changed."""

from __future__ import annotations

import torch
from torch import nn

from regrow.tasks.modeling.rounding import round_stochastically, round_weights


def test_small_changes_survive_on_average_where_rounding_to_nearest_loses_them_all():
    old = torch.full((1000, 1000), 0.1).bfloat16().float()
    step = 2.0**-11  # between bfloat16 numbers from 1/16 to 1/8
    for share in (0.05, 0.3):
        new = old + share * step
        assert torch.equal(new.bfloat16().float(), old)
        change = (round_stochastically(new, "w").double() - old).mean() / step
        # a million draws: the mean's standard deviation is below 0.0005
        assert abs(change - share) < 0.002
        negative = (round_stochastically(-new, "w").double() + old).mean() / step
        assert abs(negative + share) < 0.002


def test_each_weight_goes_to_one_of_its_two_neighbours():
    torch.manual_seed(0)
    weight = torch.randn(10_000) * torch.logspace(-20, 10, 10_000)
    rounded = round_stochastically(weight, "w").float()
    assert ((rounded - weight).abs() < weight.abs() * 2.0**-7).all()


def test_what_bfloat16_holds_is_not_changed():
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(1001), torch.zeros(3)]).bfloat16()
    assert torch.equal(round_stochastically(weight.float(), "w"), weight)


def test_bits_follow_from_the_name_alone():
    weight = (torch.arange(77) / 97).reshape(7, 11)
    first = round_stochastically(weight, "a")
    torch.randn(5)
    assert torch.equal(round_stochastically(weight, "a"), first)
    assert not torch.equal(round_stochastically(weight, "b"), first)
    # Golden: the stream of random numbers decides the stored bytes.
    assert first.view(torch.int16).sum(dtype=torch.int64).item() == GOLDEN


GOLDEN = 1217978


def test_a_model_keeps_tied_weights_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    round_weights(model, torch.bfloat16)
    assert model[1].weight is model[0].weight
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())

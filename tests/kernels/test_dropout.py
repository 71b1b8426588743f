"""Seeded dropout is a function of its seed, drops the asked share and keeps the mean."""

import pytest
import torch

from regrow.kernels.dropout import draw_seed, seeded_dropout


def test_same_seed_same_mask_other_seed_another(device):
    x = torch.ones(64, 1500, device=device)
    once = seeded_dropout(x, 0.3, 7)
    assert torch.equal(once, seeded_dropout(x, 0.3, 7))
    assert not torch.equal(once, seeded_dropout(x, 0.3, 8))
    assert torch.equal(seeded_dropout(3 * x, 0.3, 7), 3 * once)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_drops_the_asked_share_everywhere(device, p):
    rows, columns = 200, 1100
    dropped = seeded_dropout(torch.ones(rows, columns, device=device), p, 3) == 0
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped.float().mean() - p) < 5 * sigma / (rows * columns) ** 0.5
    assert (dropped.float().mean(0) - p).abs().max() < 6 * sigma / rows**0.5
    assert (dropped.float().mean(1) - p).abs().max() < 6 * sigma / columns**0.5


def test_what_stays_is_scaled(device):
    kept = seeded_dropout(torch.ones(30, 70, device=device), 0.2, 1)
    torch.testing.assert_close(kept[kept != 0], torch.full_like(kept[kept != 0], 1.25))


def test_seed_follows_the_generator_that_checkpointing_restores():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = draw_seed()
    torch.set_rng_state(state)
    assert draw_seed() == first
    assert draw_seed() != first

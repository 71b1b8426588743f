"""AdamW in one pass moves weights as PyTorch's does, and reads and writes its checkpoints."""

import copy

import pytest
import torch

from regrow.tasks.modeling.rounded_weights import RoundedWeights
from regrow.tasks.train.state import TorchEngine
from regrow.tasks.train.trainers.fused_adamw import FusedAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def models():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return model, copy.deepcopy(model)


def backward(model, number):
    torch.manual_seed(number)
    (model(torch.randn(4, 6)).square().sum() * 9).backward()


def step(model, optimizer, number, micro=1, most=0.0):
    for part in range(micro):
        backward(model, 10 * number + part)
    if most:
        torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("micro", [1, 2])
def test_follows_pytorch_with_clipping(micro):
    ours, right = models()
    fused = FusedAdamW(ours.parameters(), max_grad_norm=0.5, rounded=RoundedWeights(), **SETTINGS)
    plain = torch.optim.AdamW(right.parameters(), **SETTINGS)
    for number in range(4):
        step(ours, fused, number, micro)
        step(right, plain, number, micro, most=0.5)
    for p, expected in zip(ours.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_the_trainers_clipping_finds_nothing_to_do():
    ours, right = models()
    fused = FusedAdamW(ours.parameters(), max_grad_norm=1.0, rounded=RoundedWeights(), **SETTINGS)
    backward(ours, 0)
    backward(right, 0)
    assert torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0) == 0
    expected = torch.nn.utils.clip_grad_norm_(right.parameters(), 1.0)
    fused.step()
    torch.testing.assert_close(fused.norm, expected)


@pytest.mark.parametrize("before", ["ours", "torch"])
def test_a_checkpoint_of_one_is_read_by_the_other(before):
    ours, right = models()

    def made(model, ours):
        if ours:
            return FusedAdamW(
                model.parameters(), max_grad_norm=0.0, rounded=RoundedWeights(), **SETTINGS
            )
        return torch.optim.AdamW(model.parameters(), fused=True, **SETTINGS)

    one, whole = made(ours, before == "ours"), torch.optim.AdamW(right.parameters(), **SETTINGS)
    for number in range(2):
        step(ours, one, number)
    resumed, _ = models()
    resumed.load_state_dict(ours.state_dict())
    other = made(resumed, before != "ours")
    other.load_state_dict(one.state_dict())
    step(resumed, other, 2)
    for number in range(3):
        step(right, whole, number)
    for p, expected in zip(resumed.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_how_it_is_computed_is_not_taken_from_a_checkpoint():
    ours, right = models()
    one = FusedAdamW(ours.parameters(), max_grad_norm=0.0, rounded=RoundedWeights(), **SETTINGS)
    step(ours, one, 0)
    state = TorchEngine(ours, one).capture()
    other = torch.optim.AdamW(right.parameters(), fused=True, **SETTINGS)
    TorchEngine(right, other).restore(Saved(state))
    assert other.param_groups[0]["fused"] is True
    step(ours, one, 1)
    step(right, other, 1)
    for p, expected in zip(right.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


class Saved:
    """A state as if read from files."""

    def __init__(self, state):
        self.values, self._tensors = state.values, state.tensors

    def shapes(self):
        return {name: (tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def load(self, targets):
        for name, target in targets.items():
            target.copy_(self._tensors[name])


def test_the_rounded_copies_follow_the_weights():
    ours, _ = models()
    rounded = RoundedWeights()
    fused = FusedAdamW(ours.parameters(), max_grad_norm=1.0, rounded=rounded, **SETTINGS)
    weight = ours[0].weight
    low = rounded.of(weight, torch.bfloat16)
    before = low.clone()
    step(ours, fused, 0)
    rounded.expire()
    assert rounded.of(weight, torch.bfloat16) is low
    assert torch.equal(low, weight.bfloat16())
    assert not torch.equal(low, before)

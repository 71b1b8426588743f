"""Training from random weights, and with products in 8-bit floats: trained, resumed, saved."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from regrow.tasks.modeling.float8 import multiply_in_float8
from regrow.tasks.modeling.load import load_model, random_model
from regrow.tasks.stage import StageError
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.worker import train

WHOLE = {"adapter": None, "learning_rate": 1e-3, "max_steps": 4}


class KilledError(Exception):
    """Stands for a process that ends."""


class KillAfterThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KilledError


@pytest.mark.parametrize("key", ["reinit_weights", "fp8"])
def test_it_trains_and_resumes_exactly(make_job, key):
    if key == "fp8":
        pytest.importorskip("torchao")
    whole = make_job("whole", WHOLE | {key: True})
    train(whole)
    job = make_job("killed", WHOLE | {key: True}, {"saving": Cadence(steps=2)}, key="k")
    with pytest.raises(KilledError):
        train(job, [KillAfterThree()])
    train(job)
    ours, theirs = (load_file(j.out / "model.safetensors") for j in (job, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain = make_job("plain", WHOLE)
    train(plain)
    other = load_file(plain.out / "model.safetensors")
    assert other.keys() == theirs.keys()
    assert any(not torch.equal(other[name], theirs[name]) for name in other)
    assert AutoModelForCausalLM.from_pretrained(whole.out).config.model_type == "llama"


def test_random_weights_are_those_of_the_seed_and_of_nothing_else(model_dir):
    torch.manual_seed(5)
    first, second, other = (random_model(model_dir, seed).state_dict() for seed in (1, 1, 2))
    stored = load_model(model_dir, dtype="float32").state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        if weight.dim() > 1:
            assert not torch.equal(weight, other[name])
            assert not torch.equal(weight, stored[name])


def test_products_are_rounded_and_weights_are_not(model_dir):
    pytest.importorskip("torchao")
    plain, small = (load_model(model_dir, dtype="float32") for _ in range(2))
    assert multiply_in_float8(small, "cpu") == 14  # seven in each of two layers
    assert type(small.lm_head) is torch.nn.Linear
    for name, weight in plain.named_parameters():
        assert torch.equal(small.get_parameter(name), weight)
    x = torch.randn(16, 32)
    layers = [m.model.layers[0].self_attn.q_proj for m in (plain, small)]
    exact, rounded = (layer(x) for layer in layers)
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 0.005 < error < 0.08  # e4m3 keeps 3 bits behind the point
    rounded.sum().backward()
    assert layers[1].weight.grad is not None


def test_a_model_of_odd_sizes_says_so():
    pytest.importorskip("torchao")
    with pytest.raises(StageError, match="fp8: the model has no linear layers"):
        multiply_in_float8(torch.nn.Sequential(torch.nn.Linear(3, 5)), "cpu")

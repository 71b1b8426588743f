"""Training from random weights, and with products in 8-bit floats: trained, resumed, saved."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from regrow.tasks.modeling.float8 import freeze_in_float8, multiply_in_float8
from regrow.tasks.modeling.fused import fused_linear
from regrow.tasks.modeling.load import load_model, random_model
from regrow.tasks.modeling.projections import why_not
from regrow.tasks.stage import StageError
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.worker import train
from tests.tasks.train.killed import KillAt, Killed

WHOLE = {"adapter": None, "learning_rate": 1e-3, "max_steps": 4}


def test_an_adapter_learns_through_a_base_in_float8(make_job):
    """Nearly the same: the frozen layers are rounded, the adapter is not. (AdamW's steps hide what
    gradients are; these are looked at below.)"""
    found = []
    for fp8 in (False, True):
        job = make_job(
            f"fp8-{fp8}", {"fp8": fp8, "max_steps": 2}, {"kernels": ("attention", "mlp")}
        )
        train(job)
        found.append(load_file(job.out / "adapter_model.safetensors"))
    plain, rounded = found
    assert plain.keys() == rounded.keys()
    apart = max((plain[name] - rounded[name]).abs().max() for name in plain)
    assert 0 < apart < 0.1 * max(value.abs().max() for value in plain.values())


def test_an_adapter_over_float8_resumes_exactly(make_job):
    found = []
    for name, hooks in (("whole", []), ("killed", [KillAt(3)])):
        job = make_job(name, {"fp8": True, "max_steps": 4}, {"saving": Cadence(steps=2)}, key=name)
        if hooks:
            with pytest.raises(Killed):
                train(job, hooks)
        train(job)
        found.append(load_file(job.out / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("key", ["reinit_weights", "fp8"])
def test_it_trains_and_resumes_exactly(make_job, key):
    if key == "fp8":
        pytest.importorskip("torchao")
    whole = make_job("whole", WHOLE | {key: True})
    train(whole)
    job = make_job("killed", WHOLE | {key: True}, {"saving": Cadence(steps=2)}, key="k")
    with pytest.raises(Killed):
        train(job, [KillAt(3)])
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


def adapted(model_dir):
    """(the model with an adapter that does something, the same over a base in 8 bits)."""
    models = []
    for _ in range(2):
        targets = ["q_proj", "down_proj", "lm_head"]  # the head stays as it is
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(3)
        models.append(get_peft_model(load_model(model_dir, dtype="float32"), config))
    assert freeze_in_float8(models[1], "cpu") == 4  # two in each of two layers
    return models


def q_proj(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def is_rounded(found, exact):
    error = ((found - exact).norm() / exact.norm()).item()
    return 0.002 < error < 0.08


def test_frozen_layers_under_an_adapter_multiply_in_8_bits(model_dir):
    plain, small = adapted(model_dir)
    assert plain.state_dict().keys() == small.state_dict().keys()
    layers = [q_proj(model) for model in (plain, small)]
    assert why_not(layers[1]) == ""
    x, upstream = torch.randn(16, 32), torch.randn(16, 32)
    found = []
    for layer, way in ((layers[0], "peft"), (layers[1], "peft"), (layers[1], "fused")):
        inputs = [x.clone().requires_grad_(), layer.lora_A["default"].weight]
        y = layer(inputs[0]) if way == "peft" else fused_linear(inputs[0], layer)[0]
        found.append([y, *torch.autograd.grad(y, inputs, upstream)])
    for exact, rounded, fused in list(zip(*found, strict=True))[:2]:  # y and dx
        assert is_rounded(rounded, exact)
        torch.testing.assert_close(fused, rounded)
    torch.testing.assert_close(found[2][2], found[0][2])  # dA: nothing of it is rounded


def test_8_bits_are_those_of_the_weight_as_it_is_now(model_dir):
    plain, small = adapted(model_dir)
    x = torch.randn(16, 32)
    due, first = q_proj(plain)(x), q_proj(small)(x)
    small.merge_adapter()
    assert is_rounded(q_proj(small)(x), due)
    small.unmerge_adapter()
    torch.testing.assert_close(q_proj(small)(x), first, atol=1e-2, rtol=1e-2)
    base = q_proj(small).base_layer
    assert base.in_8_bits() is base.in_8_bits()
    before = base(x)
    with torch.no_grad():
        base.weight.mul_(2)
    torch.testing.assert_close(base(x), 2 * before)
    base.weight.data = base.weight.data / 2
    torch.testing.assert_close(base(x), before)
    model = small.merge_and_unload()
    assert is_rounded(model.model.layers[0].self_attn.q_proj(x), due)


def test_a_model_without_layers_for_float8_says_so():
    for swap in (freeze_in_float8, multiply_in_float8):
        if swap is multiply_in_float8:
            pytest.importorskip("torchao")
        with pytest.raises(StageError, match="fp8: the model has no linear layers"):
            swap(torch.nn.Sequential(torch.nn.Linear(3, 5)), "cpu")

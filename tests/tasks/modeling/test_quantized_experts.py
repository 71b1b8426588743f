"""Stacks of experts in 4 and 8 bits: bitsandbytes' numbers, adapted, trained and merged."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from regrow.tasks.modeling import fused_experts
from regrow.tasks.modeling.adapter import add_adapter, load_adapter
from regrow.tasks.modeling.load import load_model
from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.modeling.quantized_experts import Codes, QuantizedStack, quantized_stacks

from .models import SIZES, packed_batch

pytest.importorskip("bitsandbytes")

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
BITS = [
    pytest.param(Quantization(4, NF4, experts=True), id="nf4"),
    pytest.param(Quantization(8, experts=True), id="int8"),
]
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES | {"hidden_size": 64}, num_local_experts=4)
    config.sliding_window = None
    MixtralForCausalLM(config).save_pretrained(out)
    return out


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("shape", [(4, 48, 64), (3, 5, 14)])
def test_one_expert_has_the_numbers_of_the_whole(quantization, shape):
    weights = torch.randn(shape, dtype=torch.bfloat16)
    stack = QuantizedStack(Codes.of(weights, quantization.bits, quantization.settings))
    whole = stack.dense()
    assert whole.dtype == torch.bfloat16
    error = (whole - weights).float().norm() / weights.float().norm()
    assert 0 < error < (0.02 if quantization.bits == 8 else 0.12)
    for index in range(-1, shape[0]):
        assert torch.equal(stack[index], whole[index])
        assert torch.equal(stack.transpose(1, 2)[index], whole[index].t())
    assert isinstance(stack.transpose(-1, -2), QuantizedStack)
    assert torch.equal(stack + 0, whole)
    assert torch.equal(stack.transpose(0, 1) + 0, whole.transpose(0, 1))


@pytest.mark.parametrize("quantization", BITS)
def test_only_frozen_experts_and_linear_layers_become_small(mixtral_dir, quantization):
    model = load_model(mixtral_dir, dtype="bfloat16", quantization=quantization)
    small = {n for n, p in model.named_parameters() if isinstance(p, QuantizedStack)}
    assert small == {f"model.layers.{i}.mlp.{name}" for i in range(2) for name in EXPERTS}
    assert not any(dict(model.named_parameters())[name].requires_grad for name in small)
    assert len(list(quantized_stacks(model))) == 2
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    plain = load_model(mixtral_dir, dtype="bfloat16", quantization=Quantization(quantization.bits))
    assert not any(isinstance(p, QuantizedStack) for p in plain.parameters())


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("targets", [(), EXPERTS], ids=["attention", "experts"])
def test_losses_and_gradients_are_those_of_the_dequantized_weights(
    mixtral_dir, quantization, targets
):
    """An adapter on the quantized experts, and one on a model that holds the same numbers plainly,
    over several calls."""
    linear = Quantization(quantization.bits, quantization.settings)
    models = [
        load_model(mixtral_dir, dtype="float32", quantization=q) for q in (quantization, linear)
    ]
    quantized, plain = models
    for name, parameter in quantized.named_parameters():
        if isinstance(parameter, QuantizedStack):
            plain.get_parameter(name).data = parameter.dense()
    adapted = []
    for model in models:
        torch.manual_seed(0)
        adapter = add_adapter(
            model, r=4, alpha=8, target_modules=("q_proj",), target_parameters=targets, init=False
        )
        adapted.append(adapter.train())
    batch = packed_batch()
    batch.pop("supervised_rows")
    for _ in range(2):
        losses = [model(**copy.deepcopy(batch)).loss for model in adapted]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    ours, theirs = (
        {n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in adapted
    )
    assert any("experts" in name for name in ours) == bool(targets)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_stored_adapter_goes_onto_quantized_and_plain_experts(mixtral_dir, tmp_path):
    """So that what was trained on quantized experts is merged into the plain ones."""
    model = load_model(mixtral_dir, dtype="bfloat16", quantization=BITS[0].values[0])
    adapted = add_adapter(model, r=4, alpha=8, target_parameters=EXPERTS, init=False)
    adapted.save_pretrained(str(tmp_path))
    plain = load_adapter(load_model(mixtral_dir, dtype="bfloat16"), tmp_path)
    trained = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    found = {n: p for n, p in plain.named_parameters() if "lora_" in n}
    assert trained.keys() == found.keys()
    assert all(torch.equal(trained[name], found[name].float()) for name in trained)


def test_it_is_not_moved_in_silence():
    stack = QuantizedStack(Codes.of(torch.randn(2, 8, 64), 4, NF4))
    with pytest.raises(RuntimeError, match="stays on cpu"):
        stack.to("meta")
    assert isinstance(stack.to("cpu:0"), QuantizedStack)
    assert torch.equal(stack.to(torch.bfloat16), stack.dense().bfloat16())


def test_kernels_get_plain_weights(mixtral_dir):
    model = load_model(mixtral_dir, dtype="bfloat16", quantization=BITS[0].values[0])
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        weight = fused_experts._projection(experts, name).weight
        assert not isinstance(weight, QuantizedStack)
        assert torch.equal(weight, getattr(experts, name).dense())

"""Copies of float32 weights in 16 bits are as old as the last optimizer step at most."""

import copy

import pytest
import torch

from regrow.kernels.neighbours import rows_of_one
from regrow.tasks.modeling import joint_weights
from regrow.tasks.modeling.fused import INPUTS
from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
from regrow.tasks.modeling.rounded_weights import RoundedWeights, keep_rounded
from tests.tasks.modeling.models import packed_batch, tiny
from tests.tasks.modeling.test_kernels import with_lora


def step(model):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**packed_batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def test_copies_change_neither_loss_nor_gradient():
    model = tiny("llama")
    swap_kernels(model, KERNELS)
    other = copy.deepcopy(model)
    rounded = keep_rounded(other)
    assert other.lm_head.rounded is other.model.layers[0].mlp.rounded is rounded
    assert model.lm_head.rounded is None
    for _ in range(2):  # the second time after an update
        model.zero_grad()
        other.zero_grad()
        rounded.expire()
        (loss, gradients), (found, others) = step(model), step(other)
        torch.testing.assert_close(found, loss, rtol=0, atol=0)
        for name, gradient in gradients.items():
            assert others[name].dtype == torch.float32
            torch.testing.assert_close(others[name], gradient, rtol=0, atol=0)
        for one in (model, other):
            torch.optim.SGD(one.parameters(), lr=0.5).step()


def test_a_weight_is_rounded_once_between_steps():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    rounded = RoundedWeights()
    first = rounded.of(weight, torch.bfloat16)
    assert torch.equal(first, weight.bfloat16())
    weight.data += 1  # as some optimizers do, unseen by the counter of versions
    assert torch.equal(rounded.of(weight, torch.bfloat16), first)
    rounded.expire()
    again = rounded.of(weight, torch.bfloat16)
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, weight.bfloat16())


def test_a_copy_that_is_written_with_its_weight_stays_for_one_step():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    rounded = RoundedWeights()
    assert rounded.to_write(weight) is None
    copy = rounded.of(weight, torch.bfloat16)
    assert rounded.to_write(weight) is copy
    copy.fill_(7)  # what the optimizer has written
    rounded.expire()
    assert rounded.of(weight, torch.bfloat16)[0, 0] == 7
    rounded.expire()  # a validation came between
    assert torch.equal(rounded.of(weight, torch.bfloat16), weight.bfloat16())


def test_matrices_of_one_input_lie_one_under_the_other():
    first, second = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(2, 4))
    rounded = RoundedWeights()
    low = rounded.below([first, second], torch.bfloat16)
    assert torch.equal(rows_of_one(low), torch.cat([first, second]).bfloat16())
    first.data += 1
    rounded.expire()
    again = rounded.below([first, second], torch.bfloat16)
    assert again[0].data_ptr() == low[0].data_ptr()
    assert torch.equal(rows_of_one(again), torch.cat([first, second]).bfloat16())
    assert rounded.below([first, second], torch.float32) is None
    assert rounded.below([first, second.bfloat16()], torch.bfloat16) is None


def test_they_lie_in_room_that_is_large_enough():
    weights = [torch.nn.Parameter(torch.randn(2, 4)) for _ in range(2)]
    room = torch.zeros(5, 4, dtype=torch.bfloat16)
    low = RoundedWeights().below(weights, torch.bfloat16, room)
    assert torch.equal(room[:4], torch.cat(weights).bfloat16())
    assert low[0].data_ptr() == room.data_ptr()
    for other in (room[:3], room.float(), torch.zeros(5, 3, dtype=torch.bfloat16)):
        low = RoundedWeights().below(weights, torch.bfloat16, other)
        assert low[0].data_ptr() != other.data_ptr()
        assert torch.equal(rows_of_one(low), torch.cat(weights).bfloat16())


def test_every_copy_is_written_when_one_is_asked_for():
    first, second = (torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2))
    rounded = RoundedWeights()
    copies = [rounded.of(weight, torch.bfloat16) for weight in (first, second)]
    for weight in (first, second):
        weight.data += 1
    rounded.expire()
    rounded.of(first, torch.bfloat16)
    assert torch.equal(copies[1], second.bfloat16())


def test_what_was_made_of_them_is_kept_until_they_change():
    rounded, made = RoundedWeights(), []
    first = rounded.kept("a", lambda: made.append("a") or [1])
    assert rounded.kept("a", lambda: made.append("a") or [1]) is first
    assert rounded.kept("b", lambda: made.append("b") or [2]) == [2]
    assert copy.deepcopy(rounded).kept("a", lambda: [3]) == [3]
    rounded.expire()
    assert rounded.kept("a", lambda: made.append("a") or [4]) == [4]
    assert made == ["a", "b", "a"]


def test_another_adapter_is_looked_up_anew_and_none_goes_without():
    model = with_lora(tiny("llama"))
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    swap_kernels(model, KERNELS)
    right = copy.deepcopy(model)
    rounded = keep_rounded(model)
    rounded.expire()
    losses = {}
    with torch.no_grad():
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            right.set_adapter(name)
            with torch.autocast("cpu", torch.bfloat16):
                losses[name] = model(**packed_batch()).loss
                assert losses[name] == right(**packed_batch()).loss
                with model.disable_adapter(), right.disable_adapter():
                    losses["off"] = model(**packed_batch()).loss
                    assert losses["off"] == right(**packed_batch()).loss
    assert len({float(loss) for loss in losses.values()}) == 3


@pytest.mark.parametrize("slices", [False, True])
def test_autograd_keeps_no_adapter_that_someone_keeps(slices):
    model = with_lora(tiny("llama"))
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    swap_kernels(model, KERNELS)
    if slices:
        model.get_base_model().model.layers[0].mlp.slice_bytes = 4096
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}

    def saved():
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            layer = model.get_base_model().model.layers[0]
            x = torch.randn(1, 128, 32, dtype=torch.bfloat16, requires_grad=True)
            y = layer.mlp(x)
        y.sum().backward()
        return found

    without = saved()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    keep_rounded(model)
    found = saved()
    assert trained & {t.data_ptr() for t in without}
    assert not trained & {t.data_ptr() for t in found}
    assert len(without) - len(found) == 6 + 5  # a and b of three, all A twice and three B
    assert set(gradients) == {n for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ranks", [{}, {"q_proj": 8, "up_proj": 2}])
def test_adapters_change_neither_loss_nor_gradient(monkeypatch, ranks):
    """Over two steps, with weights that lie one under the other and all A behind them."""
    monkeypatch.setattr(joint_weights, "_is_on_gpu", lambda layers: True)
    model = with_lora(tiny("llama"), rank_pattern=ranks)
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    swap_kernels(model, KERNELS)
    other = copy.deepcopy(model)
    assert [joint_weights.lay_together(one) for one in (model, other)] == [8, 8]
    rounded = keep_rounded(other)
    for _ in range(2):
        losses = []
        rounded.expire()
        for one in (model, other):
            one.zero_grad()
            loss = one(**packed_batch()).loss
            loss.backward()
            losses.append(loss.detach())
        assert losses[0] == losses[1]
        attention = other.get_base_model().model.layers[0].self_attn
        layers = attention.q_proj, attention.k_proj, attention.v_proj
        a = torch.cat([layer.lora_A["default"].weight for layer in layers])
        assert torch.equal(attention.rooms[INPUTS].below, a.bfloat16())
        trained = [p for p in other.parameters() if p.requires_grad]
        for p, q in zip((p for p in model.parameters() if p.requires_grad), trained, strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=0)
        for one in (model, other):
            torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5).step()


def test_compiled_layers_round_their_adapters_themselves():
    model = with_lora(tiny("llama"))
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    swap_kernels(model, ("mlp",))
    right = model(**packed_batch()).loss
    rounded = keep_rounded(model)
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager")
    assert model(**packed_batch()).loss == right
    assert rounded.to_write(mlp.up_proj.lora_A["default"].weight) is None  # there is no copy


def test_what_has_the_type_already_is_not_copied():
    rounded = RoundedWeights()
    assert rounded.of(torch.ones(2, dtype=torch.bfloat16), torch.bfloat16) is None
    assert rounded.of(torch.ones(2), torch.float32) is None


def test_a_copied_model_has_copies_of_its_own():
    model = tiny("llama")
    swap_kernels(model, KERNELS)
    rounded = keep_rounded(model)
    assert copy.deepcopy(model).lm_head.rounded is not rounded

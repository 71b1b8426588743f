"""Copies of float32 weights in 16 bits are as old as the last optimizer step at most."""

import copy

import torch

from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
from regrow.tasks.modeling.rounded_weights import RoundedWeights, keep_rounded
from tests.tasks.modeling.models import packed_batch, tiny


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


def test_what_has_the_type_already_is_not_copied():
    rounded = RoundedWeights()
    assert rounded.of(torch.ones(2, dtype=torch.bfloat16), torch.bfloat16) is None
    assert rounded.of(torch.ones(2), torch.float32) is None


def test_a_copied_model_has_copies_of_its_own():
    model = tiny("llama")
    swap_kernels(model, KERNELS)
    rounded = keep_rounded(model)
    assert copy.deepcopy(model).lm_head.rounded is not rounded

"""What is computed again or kept elsewhere changes no gradient; memory decides how much that is."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from regrow.kernels.linear_cross_entropy import LOGITS_BYTES, SCARCE_LOGITS_BYTES
from regrow.kernels.lora_mlp import SCARCE_SLICE_BYTES, SLICE_BYTES
from regrow.tasks.forecast import setting
from regrow.tasks.modeling import offload
from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
from regrow.tasks.modeling.offload import OffloadSaved
from regrow.tasks.modeling.recompute import (
    POLICIES,
    checkpoint_arguments,
    keep_attention,
    recompute_layers,
    repeats_itself,
)
from tests.tasks.modeling.models import packed_batch, tiny
from tests.tasks.modeling.test_kernels import with_lora


def gradients(model, policy, offload=False, swapped=False):
    recompute_layers(model, policy, use_reentrant=False)
    batch = packed_batch()
    if offload:
        kept = OffloadSaved(batch["input_ids"].shape[1], on_cpu=True)
        with kept:
            loss = model(**batch).loss
        # The inputs of two layers; with our kernels the last one's is the newest with a line for
        # each token, and stays.
        assert kept.bytes >= (1 if swapped else 2) * 128 * 32 * 4
    else:
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("swapped", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_changes_loss_or_gradients(policy, swapped):
    model, other = tiny("qwen3"), tiny("qwen3")
    if swapped:
        swap_kernels(other, KERNELS)
        swap_kernels(model, KERNELS)
    loss, right = gradients(model, "none")
    found, got = gradients(other, policy, policy == "offload", swapped)
    assert torch.equal(found, loss)
    for name, gradient in right.items():  # up to the order in which two gradients are added
        torch.testing.assert_close(got[name], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_dropout_drops_the_same_when_it_is_computed_again(policy, reentrant):
    found = []
    for one in ("none", policy):
        model = with_lora(tiny("llama"), lora_dropout=0.3)
        swap_kernels(model, KERNELS)
        model.enable_input_require_grads()
        assert not repeats_itself(model)
        recompute_layers(model, one, reentrant)
        torch.manual_seed(5)
        loss = model(**packed_batch()).loss
        torch.rand(7)  # what others draw before the backward pass
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got, right, atol=1e-7, rtol=1e-5)


def test_a_layer_repeats_itself_if_all_of_it_is_ours_and_draws_nothing():
    model = with_lora(tiny("llama"))
    assert not repeats_itself(model)
    swap_kernels(model, KERNELS)
    assert repeats_itself(model)
    how = checkpoint_arguments("full", use_reentrant=False, repeats_itself=True)
    assert how == {
        "use_reentrant": False,
        "preserve_rng_state": False,
        "determinism_check": "none",
    }
    for others in (["attention", "rms_norm"], ["mlp", "rms_norm"], ["attention", "mlp"]):
        model = tiny("llama")
        swap_kernels(model, others)
        assert not repeats_itself(model)
    experts = tiny("qwen3_moe")
    swap_kernels(experts, KERNELS)
    assert not repeats_itself(experts)  # a router may jitter
    assert not repeats_itself(torch.nn.Linear(2, 2))


class CountAttention(TorchDispatchMode):
    """Forward passes of attention that really run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.count += "attention" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "times"), [("full", 2), ("selective", 1)])
def test_selective_computes_attention_once(policy, times):
    model = tiny("llama")
    recompute_layers(model, policy, use_reentrant=False)
    with CountAttention() as counter:
        model(**packed_batch((20, 30), pad_to=None)).loss.backward()
    assert counter.count == 2 * 2 * times  # layers, examples


def test_a_tensor_takes_its_own_size_on_the_host_and_comes_back_to_the_bit(monkeypatch):
    """torch's pinned memory alone would round it up to a power of two."""
    monkeypatch.setattr(offload, "PIECE_BYTES", 64)
    kept = OffloadSaved(tokens=5, on_cpu=True)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    with kept:
        turned = (x.t().contiguous().t() * 1.0).sin()
        y = turned.cos()
    assert kept.bytes == 5 * 7 * 8
    y.sum().backward()
    torch.testing.assert_close(x.grad, -x.detach().sin().sin() * x.detach().cos())


ONE = 4 * 3 * 4
"""Bytes of a tensor of the next two tests."""


def sines(stays):
    """(bytes on the host, x and what came of it by one sine after the other)."""
    kept = OffloadSaved(tokens=4, stays=stays, on_cpu=True)
    made: list[Any] = [torch.randn(4, 3, requires_grad=True)]
    with kept:
        for _ in range(4):
            made.append(made[-1].sin())
    return kept.bytes, made


@pytest.mark.parametrize(("stays", "number"), [(0, 1), (2 * ONE + 1, 2), (3 * ONE, 3), (1e9, 4)])
def test_the_newest_tensors_stay_as_far_as_there_is_room(stays, number):
    """The backward pass asks for them first; the newest is there in any case."""
    waiting, made = sines(stays)
    assert waiting == (4 - number) * ONE
    pairs = itertools.pairwise(made)
    there = [result.grad_fn._saved_self.data_ptr() == each.data_ptr() for each, result in pairs]
    assert there == [False] * (4 - number) + [True] * number
    made[-1].sum().backward()
    each = made[0].detach()
    right = torch.ones_like(each)
    for _ in range(4):
        right, each = right * each.cos(), each.sin()
    torch.testing.assert_close(made[0].grad, right)


@pytest.mark.parametrize("stays", [0, 1e9])
def test_what_the_backward_pass_has_used_is_given_up(stays):
    _, made = sines(stays)
    seen = weakref.ref(made[1])
    storages = [weakref.ref(each.untyped_storage()) for each in made[1:3]]
    last = made[-1]
    del made
    last.sum().backward()
    assert seen() is None
    assert [storage() for storage in storages] == [None, None]


def test_offloading_without_checkpoints_is_right_too():
    """Tensors come back in any order, and some twice."""
    model, other = tiny("gemma2"), tiny("gemma2")
    loss, right = gradients(model, "none")
    found, got = gradients(other, "none", offload=True)
    assert torch.equal(found, loss)
    assert all(torch.equal(got[name], gradient) for name, gradient in right.items())


@pytest.mark.parametrize(
    ("operation", "kept"),
    [
        ("torch_attn._varlen_attn.default", True),
        ("flash_attn._flash_attn_varlen_forward.default", True),
        ("flash_attn_3.fwd.default", True),
        ("flash_attn_3._flash_attn_forward.default", True),
        ("flash_attn_3.bwd.default", False),
        ("aten._flash_attention_forward.default", True),
        ("aten._flash_attention_backward.default", False),
        ("aten.mm.default", False),
    ],
)
def test_the_result_of_every_attention_is_kept(operation, kept):
    found = keep_attention(None, operation)
    assert (found == CheckpointPolicy.MUST_SAVE) == kept


def test_policies_are_those_of_the_forecast():
    assert POLICIES == setting.POLICIES


def test_smaller_parts_are_taken_where_inputs_leave_the_device():
    sizes = {}
    for policy in ("full", "offload"):
        model: Any = tiny("llama")
        head = swap_kernels(model, ["cross_entropy", "mlp"]).head
        assert head is not None
        recompute_layers(model, policy, use_reentrant=False)
        sizes[policy] = head.logits_bytes, model.model.layers[0].mlp.slice_bytes
    assert sizes["full"] == (LOGITS_BYTES, SLICE_BYTES)
    assert sizes["offload"] == (SCARCE_LOGITS_BYTES, SCARCE_SLICE_BYTES)


def test_the_hosts_memory_is_free_when_the_backward_pass_is_over():
    """Without a search for garbage, which may be many steps away."""
    kept = OffloadSaved(tokens=4, on_cpu=True)
    x = torch.randn(4, 3, requires_grad=True)
    gc.disable()
    try:
        with kept:
            loss = (x * x).sum()
        host = weakref.ref(kept._host)
        loss.backward()
        del loss, kept
        assert host() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_the_gpu_what_comes_back_is_what_left():
    """While other work goes on, whether a backward pass takes it back or gives it up half-way."""
    torch.manual_seed(0)
    weights = [torch.randn(1024, 1024, device="cuda") / 32 for _ in range(12)]
    x = torch.randn(1, 4096, 1024, device="cuda", requires_grad=True)

    def through(stays_at=None):
        y, layers, kept = x, [], OffloadSaved(4096)
        with kept:
            for weight in weights:
                y = (y @ weight).sin()
                layers.append(y)
        assert kept.bytes == 11 * x.nbytes  # the newest stays
        if stays_at is None:
            return torch.autograd.grad(y.sum(), x)[0]
        return torch.autograd.grad(y.sum(), layers[stays_at])[0]

    y = x
    for weight in weights:
        y = (y @ weight).sin()
    (right,) = torch.autograd.grad(y.sum(), x)
    for _ in range(3):
        assert torch.equal(through(), right)
        through(stays_at=6)  # the graph goes, with a tensor that is still on its way
        assert torch.equal(through(), right)

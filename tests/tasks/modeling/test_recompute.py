"""What is computed again or kept elsewhere changes no gradient; memory decides how much that is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
from regrow.tasks.modeling.offload import OffloadSaved
from regrow.tasks.modeling.recompute import (
    POLICIES,
    LayerSizes,
    checkpoint_arguments,
    choose_policy,
)
from tests.tasks.modeling.models import packed_batch, tiny


def gradients(model, policy, offload=False):
    how = checkpoint_arguments(policy, use_reentrant=False)
    if how is not None:
        model.gradient_checkpointing_enable(how)
    batch = packed_batch()
    if offload:
        kept = OffloadSaved(batch["input_ids"].shape[1], on_cpu=True)
        with kept:
            loss = model(**batch).loss
        assert kept.bytes >= 2 * 128 * 32 * 4  # the inputs of two layers at least
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
    found, got = gradients(other, policy, offload=policy == "offload")
    assert torch.equal(found, loss)
    for name, gradient in right.items():  # up to the order in which two gradients are added
        torch.testing.assert_close(got[name], gradient, atol=1e-7, rtol=1e-5)


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
    model.gradient_checkpointing_enable(checkpoint_arguments(policy, use_reentrant=False))
    with CountAttention() as counter:
        model(**packed_batch((20, 30), pad_to=None)).loss.backward()
    assert counter.count == 2 * 2 * times  # layers, examples


def test_offloading_without_checkpoints_is_right_too():
    """Tensors come back in any order, and some twice."""
    model, other = tiny("gemma2"), tiny("gemma2")
    loss, right = gradients(model, "none")
    found, got = gradients(other, "none", offload=True)
    assert torch.equal(found, loss)
    assert all(torch.equal(got[name], gradient) for name, gradient in right.items())


def llama_8b() -> LayerSizes:
    return LayerSizes(layers=32, hidden=4096, width=14336, heads=4096, key_heads=1024)


def test_sizes_come_from_the_configuration():
    model = copy.deepcopy(tiny("llama"))
    assert LayerSizes.of(model.config) == LayerSizes(2, 32, 48, 32, 16)


@pytest.mark.parametrize(
    ("gib", "expected"), [(62, "none"), (20, "selective"), (8, "selective"), (4, "offload")]
)
def test_as_little_is_computed_again_as_memory_demands(gib, expected):
    """Llama-3.1-8B's shape, two rows of 4096: without checkpoints a hand-written reference held
    51 GiB, of which 15 were weights (H100, 2026-11-21)."""
    sizes = llama_8b()
    assert choose_policy(sizes, 8192, gib * 2**30) == expected
    assert 25 < sizes.kept_bytes("none", 8192, 2) / 2**30 < 40


def test_policies_keep_less_one_after_the_other():
    kept = [llama_8b().kept_bytes(policy, 8192, 2) for policy in POLICIES]
    assert kept == sorted(kept, reverse=True)

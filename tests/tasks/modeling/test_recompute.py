"""What is computed again or kept elsewhere changes no gradient; memory decides how much that is."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from regrow.kernels.linear_cross_entropy import LOGITS_BYTES, SCARCE_LOGITS_BYTES
from regrow.tasks.forecast import setting
from regrow.tasks.modeling import offload
from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
from regrow.tasks.modeling.offload import OffloadSaved
from regrow.tasks.modeling.recompute import (
    POLICIES,
    keep_attention,
    recompute_layers,
)
from tests.tasks.modeling.models import packed_batch, tiny


def gradients(model, policy, offload=False):
    recompute_layers(model, policy, use_reentrant=False)
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
        y = (x.t().contiguous().t() * 1.0).sin()
    assert kept.bytes == 5 * 7 * 8
    y.sum().backward()
    assert torch.equal(x.grad, x.detach().cos())


def test_the_first_tensors_stay_as_far_as_there_is_room():
    kept = OffloadSaved(tokens=4, stays=2 * 4 * 3 * 4 + 1, on_cpu=True)
    x = torch.randn(4, 3, requires_grad=True)
    with kept:
        y = x.sin().sin().sin().sin()
    assert kept.bytes == 2 * 4 * 3 * 4
    y.sum().backward()
    assert x.grad is not None


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


def test_fewer_logits_are_made_where_inputs_leave_the_device():
    sizes = {}
    for policy in ("full", "offload"):
        model = tiny("llama")
        head = swap_kernels(model, ["cross_entropy"]).head
        assert head is not None
        recompute_layers(model, policy, use_reentrant=False)
        sizes[policy] = head.logits_bytes
    assert sizes == {"full": LOGITS_BYTES, "offload": SCARCE_LOGITS_BYTES}

"""Loss and log-probabilities of a linear head equal the formula, whatever the chunks."""

import math

import pytest
import torch

from regrow.kernels import linear_cross_entropy as module
from regrow.kernels.linear_cross_entropy import (
    IGNORED,
    linear_cross_entropy,
    linear_log_probs,
    reference,
)
from regrow.kernels.matmul import matmul

OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "all": {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 1e-3},
}


def targets_of(rows, columns, device):
    targets = torch.randint(0, columns, (rows,))
    targets[::3] = IGNORED  # the first row as well
    targets[1], targets[-1] = 0, columns - 1
    return targets.to(device)


@pytest.fixture(autouse=True, params=[False, True], ids=["", "whole tiles"])
def whole_tiles(request, monkeypatch):
    """Rows of zeros behind the others, here as on CUDA."""
    if request.param:
        monkeypatch.setattr(module, "_rows_more", lambda rows_n: -len(rows_n) % 128)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_formula(check_gradients, random, device, options):
    rows, size, columns = 11, 24, 301
    targets, weights = targets_of(rows, columns, device), torch.rand(rows, device=device)
    check_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, weights_N=weights, **options),
        lambda h, w: reference(h, w, targets, weights, **options)[0] / (targets >= 0).sum(),
        [random(rows, size), random(columns, size)],
    )


# Vocabularies: odd (rows of the buffer are wider), one more than a block of the kernel.
@pytest.mark.parametrize("columns", [3, 4097])
def test_chunks_change_nothing(check_gradients, random, device, columns):
    rows, size = 300, 16  # three chunks of 128, the last one short
    targets = targets_of(rows, columns, device)
    check_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, logits_bytes=1),
        lambda h, w: reference(h, w, targets)[0] / (targets >= 0).sum(),
        [random(rows, size), random(columns, size)],
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probs_equal_the_formula(check_gradients, random, device, softcap):
    rows, size, columns = 140, 16, 53
    targets = targets_of(rows, columns, device)
    check_gradients(
        lambda h, w: linear_log_probs(h, w, targets, softcap=softcap, logits_bytes=1),
        lambda h, w: reference(h, w, targets, softcap=softcap)[1],
        [random(rows, size), random(columns, size)],
    )


def test_equals_pytorch(agree, device):
    hidden, head = torch.randn(9, 8, device=device), torch.randn(31, 8, device=device)
    targets = targets_of(9, 31, device)
    loss = linear_cross_entropy(hidden, head, targets, label_smoothing=0.1)
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, label_smoothing=0.1)
    agree(loss, expected, torch.float32)


def test_ignored_rows_are_never_touched(random, device):
    """NaN in them (memory nobody wrote) changes neither loss nor gradients."""
    head, targets = random(31, 8), targets_of(12, 31, device)
    ignored = targets == IGNORED
    clean = random(12, 8)
    dirty = clean.detach().clone().masked_fill(ignored[:, None], math.nan).requires_grad_()
    losses = [linear_cross_entropy(h, head, targets) for h in (clean, dirty)]
    gradients = [torch.autograd.grad(loss, (clean, head)[1:]) for loss in losses]
    assert torch.equal(*losses)
    assert torch.equal(gradients[0][0], gradients[1][0])
    linear_cross_entropy(dirty, head, targets).backward()
    assert not dirty.grad[ignored].any()
    assert dirty.grad[~ignored].isfinite().all()


def test_given_rows_equal_rows_looked_up(random, device):
    hidden, head, targets = random(12, 8), random(31, 8), targets_of(12, 31, device)
    rows = (targets != IGNORED).nonzero()[:, 0]
    given = linear_cross_entropy(hidden, head, targets, rows_n=rows)
    assert torch.equal(given, linear_cross_entropy(hidden, head, targets))


def test_nothing_supervised_is_a_loss_of_zero(random, device):
    hidden, head = random(5, 8), random(31, 8)
    loss = linear_cross_entropy(hidden, head, torch.full((5,), IGNORED, device=device))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_frozen_parts_get_no_gradient(random, device):
    hidden, targets = random(12, 8), targets_of(12, 31, device)
    frozen = random(31, 8, requires_grad=False)
    linear_cross_entropy(hidden, frozen, targets).backward()
    head = frozen.clone().requires_grad_()
    again = hidden.detach().clone().requires_grad_()
    linear_cross_entropy(again, head, targets).backward()
    assert frozen.grad is None
    assert torch.equal(hidden.grad, again.grad)
    linear_cross_entropy(hidden.detach(), head, targets).backward()


def test_no_gradients_are_made_where_none_are_wanted(random, device):
    hidden, head, targets = random(12, 8), random(31, 8), targets_of(12, 31, device)
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, head, targets)
    assert not quiet.requires_grad
    assert torch.equal(quiet, linear_cross_entropy(hidden, head, targets))


def test_backward_twice_gives_the_same_gradients(random, device):
    hidden, head, targets = random(12, 8), random(31, 8), targets_of(12, 31, device)
    loss = linear_cross_entropy(hidden, head, targets) * 3
    once = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    twice = torch.autograd.grad(loss, (hidden, head))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_large_logits_stay_finite(random, device):
    hidden, head, targets = random(6, 8), random(31, 8), targets_of(6, 31, device)
    loss = linear_cross_entropy(hidden * 100, head, targets)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 8), (31, 7), (4,)), r"\[N, H\]"),
        (((4, 8), (31, 8), (5,)), r"\[N, H\]"),
        (((1, 4, 8), (31, 8), (4,)), r"\[N, H\]"),
    ],
)
def test_what_does_not_fit_is_an_error(shapes, message):
    hidden, head, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, head, targets.long())


def test_mixed_dtypes_and_trained_weights_are_errors():
    hidden, head, targets = torch.zeros(4, 8), torch.zeros(31, 8), torch.zeros(4).long()
    with pytest.raises(ValueError, match="cast one"):
        linear_cross_entropy(hidden, head.bfloat16(), targets)
    with pytest.raises(ValueError, match="no gradient"):
        linear_cross_entropy(hidden, head, targets, weights_N=torch.ones(4, requires_grad=True))


def test_the_factor_of_the_gradients_is_not_rounded(device):
    """1 / 3571 in bfloat16 is 0.12 % off, which would be the same error in every gradient."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 32, device=device).bfloat16().requires_grad_()
    head = torch.randn(99, 32, device=device).bfloat16()
    targets = torch.randint(0, 99, (64,), device=device)
    grads = []
    for normalizer in (1, 3571):
        loss = linear_cross_entropy(hidden, head, targets, normalizer=normalizer)
        grads += torch.autograd.grad(loss, hidden)
    one, scaled = (grad.double() for grad in grads)
    assert ((scaled * one).sum() / (one * one).sum() * 3571 - 1).abs() < 3e-4


@pytest.mark.parametrize("trained", [True, False], ids=["head trained", "head frozen"])
def test_no_product_is_made_twice(monkeypatch, random, device, trained):
    """A chunk has one product for its logits, and one for each gradient; the backward pass none."""
    made = []

    def counted(a, b, out, **options):
        made.append((tuple(a.shape), tuple(b.shape)))
        return matmul(a, b, out, **options)

    monkeypatch.setattr(module, "matmul", counted)
    rows, size, columns = 300, 16, 40
    targets = targets_of(rows, columns, device)
    head = random(columns, size, requires_grad=trained)
    loss = linear_cross_entropy(random(rows, size), head, targets, logits_bytes=1)
    forward = len(made)
    loss.backward()
    assert len(made) == forward == (3 if trained else 2) * 2  # 199 rows are two chunks


@pytest.mark.parametrize("budget", [1, 1 << 20], ids=["chunks", "one"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_float32_head_is_multiplied_in_16_bits_and_gets_its_gradient_unrounded(
    device, budget, kept
):
    rows, size, columns = 300, 16, 40
    targets = targets_of(rows, columns, device)
    hidden = torch.randn(rows, size, device=device).bfloat16().requires_grad_()
    head = torch.randn(columns, size, device=device, requires_grad=True)
    low = head.detach().bfloat16()
    loss = linear_cross_entropy(
        hidden, head, targets, rounded_VH=low if kept else None, logits_bytes=budget
    )
    dhidden, dhead = torch.autograd.grad(loss, [hidden, head])
    assert dhidden.dtype == torch.bfloat16
    assert dhead.dtype == torch.float32
    assert not torch.equal(dhead, dhead.bfloat16().float())
    exact = low.double().requires_grad_()
    right = reference(hidden.double(), exact, targets)[0] / (targets >= 0).sum()
    (due,) = torch.autograd.grad(right, exact)
    assert ((dhead.double() - due).norm() / due.norm()).item() < 5e-3

"""RMS norms equal their formula, with and without residual, forward and every gradient."""

import pytest
import torch

from regrow.kernels.backend import INTERPRETING
from regrow.kernels.neighbours import Gap
from regrow.kernels.rms_norm import add_rms_norm, reference, rms_norm, rms_norm_beside

EPS = 1e-5
# Tiny (of one element the gradient is zero); odd; one more than a power of two; more rows than
# the interpreter's grid has programs.
SHAPES = [(1, 3), (3, 5, 77), (2, 1025), (37, 64)]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_equals_the_formula(check_gradients, random, shape, offset):
    check_gradients(
        lambda x, w: rms_norm(x, w, EPS, offset=offset),
        lambda x, w: reference(x, w, EPS, offset=offset)[0],
        [random(*shape), random(shape[-1])],
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_of_a_sum_equals_the_formula(check_gradients, random, shape):
    check_gradients(
        lambda x, r, w: add_rms_norm(x, r, w, EPS, offset=1.0),
        lambda x, r, w: reference(x, w, EPS, r, 1.0),
        [random(*shape), random(*shape), random(shape[-1])],
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_beside_what_goes_on_equals_the_formula(check_gradients, random, shape):
    check_gradients(
        lambda x, w: rms_norm_beside(x, w, EPS),
        lambda x, w: (reference(x, w, EPS)[0], x * 1),
        [random(*shape), random(shape[-1])],
    )


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)  # of one row PyTorch forgets the stride
def test_there_is_room_behind_the_norm_where_asked(check_gradients, random, shape):
    gap = Gap(8)

    def normed(x, w):
        y, x = rms_norm_beside(x, w, EPS, behind=gap)
        free = gap.behind([y.data.reshape(-1, shape[-1])])
        assert free is None if not y.is_cuda and not INTERPRETING else free.shape[1] == 8
        return y, x

    check_gradients(
        normed,
        lambda x, w: (reference(x, w, EPS)[0], x * 1),
        [random(*shape), random(shape[-1])],
    )


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_may_be_unused(random, used):
    x, weight = random(4, 9), random(9)
    upstream = torch.randn_like(x)
    rms_norm_beside(x, weight, EPS)[used].backward(upstream)
    right = upstream
    if not used:
        leaf = x.detach().clone().requires_grad_()
        right = torch.autograd.grad(reference(leaf, weight, EPS)[0], leaf, upstream)[0]
    torch.testing.assert_close(x.grad, right, atol=2e-5, rtol=1e-4)


def test_frozen_weight_gets_no_gradient(random):
    x, weight = random(6, 33), random(33, requires_grad=False)
    rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is None
    trained = weight.clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    rms_norm(x2, trained, EPS).sum().backward()
    assert torch.equal(x.grad, x2.grad)


def test_only_the_sum_used_is_an_addition(random):
    x, residual, weight = random(4, 9), random(4, 9), random(9)
    _, total = add_rms_norm(x, residual, weight, EPS)
    upstream = torch.randn_like(total)
    total.backward(upstream)
    torch.testing.assert_close(x.grad, upstream)
    torch.testing.assert_close(residual.grad, upstream)


def test_no_tokens_is_no_error(random):
    x, weight = random(0, 8), random(8)
    rms_norm(x, weight, EPS).sum().backward()
    assert not weight.grad.any()


def test_zero_row_stays_finite(random):
    x, weight = (random(2, 16) * 0).detach().requires_grad_(), random(16)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad.isfinite().all()


def test_what_does_not_fit_is_an_error():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="does not fit"):
        rms_norm(x, torch.ones(5), EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, torch.zeros(3, 4), torch.ones(4), EPS)

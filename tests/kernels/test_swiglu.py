"""Gated activations equal their formula, forward and backward."""

import pytest
import torch

from regrow.kernels.swiglu import ACTIVATIONS, gated_activation, gated_backward, reference


# 1: a single element; 77: below a block and odd; 1025: one more than a block; 3-D as in models.
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (2, 3, 1025)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_formula(check_gradients, random, shape, activation):
    check_gradients(
        lambda g, u: gated_activation(g, u, activation),
        lambda g, u: reference(g, u, activation),
        [random(*shape), random(*shape)],
    )


def test_halves_of_one_matrix_need_no_copy(check_gradients, random):
    check_gradients(
        lambda x: gated_activation(*x.chunk(2, -1)),
        lambda x: reference(*x.chunk(2, -1)),
        [random(7, 2 * 33)],
    )


def test_backward_makes_the_output_again(random):
    gate, up, dout = (random(5, 70, requires_grad=False) for _ in range(3))
    _, out = gated_backward(dout, gate, up, "gelu", True)
    torch.testing.assert_close(out, gated_activation(gate, up, "gelu"))


def test_no_tokens_is_no_error(random):
    gate, up = random(0, 8), random(0, 8)
    gated_activation(gate, up).sum().backward()
    assert gate.grad.shape == (0, 8)


def test_large_values_stay_finite(random):
    gate = random(3, 8)
    for activation in ACTIVATIONS:
        out = gated_activation(gate * 100, torch.ones_like(gate), activation)
        out.sum().backward()
        assert out.isfinite().all()
        assert gate.grad.isfinite().all()


def test_what_does_not_fit_is_an_error():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="differ"):
        gated_activation(x, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="relu"):
        gated_activation(x, x, "relu")

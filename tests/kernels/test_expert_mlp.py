"""Experts with low-rank updates equal the formula, forward and every gradient."""

import pytest
import torch

from regrow.kernels.expert_mlp import ExpertProjection, expert_mlp, reference

# Tokens, choices, experts, hidden, width, rank. Rows in bfloat16 are multiples of 16 bytes, as
# torch's grouped product wants them. More experts than tokens leave some without any row.
SHAPES = [(7, 2, 3, 16, 24, 8), (3, 2, 9, 8, 16, 8), (33, 3, 4, 24, 8, 8)]


def routed(tokens, choices, experts, device):
    scores = torch.rand(tokens, experts)
    return scores.topk(choices).indices.to(device)


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_expert_mlp(check_gradients, random, device, shape, adapters):
    tokens, choices, experts, hidden, width, rank = shape
    index = routed(tokens, choices, experts, device)
    weights = random(experts, 2 * width, hidden), random(experts, hidden, width)
    low = [
        random(experts, rank, hidden),
        random(experts, rank, 2 * width),
        random(experts, rank, width),
        random(experts, rank, hidden),
    ]

    def parts(w1, w2, *ab):
        a1, b1, a2, b2 = ab or (None,) * 4
        return ExpertProjection(w1, a1, b1, 0.5), ExpertProjection(w2, a2, b2, 2.0)

    inputs = [random(tokens, hidden), random(tokens, choices), *weights, *(low if adapters else [])]
    inputs = [(x.detach() * 0.3).requires_grad_() for x in inputs]
    check_gradients(
        lambda x, w, *t: expert_mlp(x, index, w, *parts(*t), activation="silu"),
        lambda x, w, *t: reference(x, index, w, *parts(*t), "silu"),
        inputs,
    )


def test_frozen_experts_get_no_gradient(device):
    w1, w2 = torch.randn(3, 16, 8, device=device), torch.randn(3, 8, 8, device=device)
    a = torch.randn(3, 2, 8, device=device, requires_grad=True)
    b = torch.randn(3, 2, 16, device=device, requires_grad=True)
    x = torch.randn(5, 8, device=device, requires_grad=True)
    index = routed(5, 2, 3, device)
    out = expert_mlp(x, index, torch.ones(5, 2, device=device), ExpertProjection(w1, a, b),
                     ExpertProjection(w2))  # fmt: skip
    out.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert w1.grad is None


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="experts take"):
        expert_mlp(torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1),
                   ExpertProjection(torch.ones(1, 8, 4)),
                   ExpertProjection(torch.ones(1, 4, 5)))  # fmt: skip

"""Experts with low-rank updates equal the formula, forward and every gradient."""

import pytest
import torch

from regrow.kernels import expert_mlp as module
from regrow.kernels.expert_mlp import ExpertProjection, expert_mlp, reference

# Tokens, choices, experts, hidden, width, rank. Rows in bfloat16 are multiples of 16 bytes, as
# torch's grouped product wants them. More experts than tokens leave some without any row.
SHAPES = [(7, 2, 3, 16, 24, 8), (3, 2, 9, 8, 16, 8), (33, 3, 4, 24, 8, 8), (9, 2, 3, 16, 8, 3)]


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


@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_every_grouped_product_is_aligned(monkeypatch, rank):
    """As the one of CUDA demands; an expert without rows leaves its gradient unwritten here."""
    calls = []

    def grouped_mm(a, b, ends):
        for factor in (a, b):
            strides = sorted(factor.stride()[-2:])
            assert strides[0] == 1, "neither rows nor columns are in one piece"
            steps = [strides[1], *factor.stride()[:-2]]
            assert all(2 * step % 16 == 0 for step in steps), (factor.shape, factor.stride())
        calls.append((a.shape, b.shape))
        slices = module._slices(ends)
        if b.ndim == 3:
            return torch.cat([a[rows] @ b[i] for i, rows in enumerate(slices)])
        made = [a[:, rows] @ b[rows] for rows in slices]
        empty = [rows.start == rows.stop for rows in slices]
        return torch.stack([m * torch.nan if e else m for m, e in zip(made, empty, strict=True)])

    monkeypatch.setattr(module, "_is_half_on_gpu", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(module, "_grouped_mm", grouped_mm)
    tokens, experts, hidden, width = 5, 9, 16, 8
    index = routed(tokens, 2, experts, "cpu")
    shapes = [(2 * width, hidden), (rank, hidden), (rank, 2 * width),
              (hidden, width), (rank, width), (rank, hidden)]  # fmt: skip
    leaves = [torch.randn(experts, *shape).bfloat16().requires_grad_() for shape in shapes]
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    w = torch.rand(tokens, 2).bfloat16()

    def parts(t):
        return ExpertProjection(*t[:3], 0.5), ExpertProjection(*t[3:], 2.0)

    out = expert_mlp(x, index, w, *parts(leaves))
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, *leaves], upstream)
    assert len(calls) == 6 + 12
    wide = [t.detach().double().requires_grad_() for t in (x, *leaves)]
    right = reference(wide[0], index, w.double(), *parts(wide[1:]))
    for actual, due in zip(found, torch.autograd.grad(right, wide, upstream.double()), strict=True):
        assert ((actual.double() - due).norm() / due.norm()).item() < 0.02


def test_unaligned_rows_are_not_given_to_the_grouped_product():
    aligned = torch.zeros(4, 8, 16, dtype=torch.bfloat16)
    assert module._is_aligned(aligned)
    assert module._is_aligned(aligned.transpose(1, 2))
    assert not module._is_aligned(aligned[:, :, 1:])
    assert not module._is_aligned(aligned[..., ::2])
    assert not module._is_aligned(torch.zeros(5, 12, dtype=torch.bfloat16))


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

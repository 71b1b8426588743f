"""One step of AdamW equals PyTorch's clipping and optimizer, over many steps."""

import pytest
import torch

from regrow.kernels.adamw import AdamWSettings, adamw_step, clipping


def run_both(device, kind, most, steps=5):
    """(ours, PyTorch's, our copy in 16 bits, norms of both)."""
    torch.manual_seed(0)
    shapes = [(33, 65), (7,), (1, 1), (0,)]
    right = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    ours = [p.detach().clone() for p in right]
    low = [torch.empty_like(p, dtype=torch.bfloat16) for p in ours]
    m, v = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    optimizer = torch.optim.AdamW(right, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    norms = []
    for step in range(1, steps + 1):
        gradients = [torch.randn_like(p).to(kind) * 3 for p in ours]
        norm, factor = clipping(gradients, most)
        settings = AdamWSettings(1e-2, 0.9, 0.99, 1e-8, 0.1, step)
        for i, g in enumerate(gradients):
            adamw_step(ours[i], g, m[i], v[i], factor, settings, low[i])
            right[i].grad = g.float()
        largest = most if most > 0 else float("inf")
        norms.append((norm, torch.nn.utils.clip_grad_norm_(right, largest)))
        optimizer.step()
    return ours, right, low, norms


@pytest.mark.parametrize("most", [1.0, 1e4, 0.0], ids=["clipped", "small", "unclipped"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_follows_pytorch(device, kind, most):
    ours, right, low, norms = run_both(device, kind, most)
    for p, expected, copy in zip(ours, right, low, strict=True):
        torch.testing.assert_close(p, expected.detach(), rtol=2e-6, atol=2e-6)
        assert torch.equal(copy, p.bfloat16())
    for norm, expected in norms:
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)


def test_a_gradient_that_is_no_number_shows_in_the_norm(device):
    norm, _ = clipping([torch.tensor([1.0, float("nan")], device=device)], 1.0)
    assert norm.isnan()

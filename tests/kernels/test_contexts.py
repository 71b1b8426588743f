"""Every op gives the same results inside gradient checkpoints and under torch.compile."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from regrow.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from regrow.kernels.lora_linear import lora_linear
from regrow.kernels.lora_mlp import lora_mlp
from regrow.kernels.projection import Projection
from regrow.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_beside
from regrow.kernels.rope import rope
from regrow.kernels.swiglu import gated_activation
from regrow.kernels.taken_rows import taken_rows

TOKENS, SIZE, COLUMNS = 10, 8, 19
ROWS = torch.tensor([1, 2, 5, 9])


def targets(device):
    out = torch.full((TOKENS,), -100)
    out[ROWS] = torch.tensor([3, 0, 18, 7])
    return out.to(device)


def loss(x, w):
    rows = ROWS.to(x.device)
    return linear_cross_entropy(x, w[:COLUMNS], targets(x.device), rows_n=rows)


def log_probs(x, w):
    return linear_log_probs(x, w[:COLUMNS], targets(x.device), rows_n=ROWS.to(x.device))


def projections(w):
    """Weight, a and b from one matrix, so that all ops here take (x, w)."""
    return [
        Projection(w[:SIZE], w[SIZE : SIZE + 2], w[2 : 2 + SIZE, :2]),
        Projection(w[4 : 4 + SIZE], w[9:12], w[:SIZE, 3:6]),
        Projection(w[8 : 8 + SIZE], w[1:3], w[:SIZE, 1:3]),
    ]


def turned(x, w):
    heads = x.view(TOKENS, 2, 4)
    angle = torch.arange(2 * TOKENS, device=x.device).view(TOKENS, 2).float()
    q, k = rope(heads, heads[:, :1], angle.cos(), angle.sin(), q_weight_D=w[0, :4],
                k_weight_D=w[1, :4])  # fmt: skip
    return torch.cat([q, k], 1)


OPS = {
    "linear_cross_entropy": loss,
    "linear_log_probs": log_probs,
    "lora_linear": lambda x, w: lora_linear(x, *projections(w)[:1])[0],
    "lora_linear of two": lambda x, w: torch.cat(lora_linear(x, *projections(w)[:2]), 1),
    "lora_mlp": lambda x, w: lora_mlp(x, *projections(w)),
    "lora_mlp in slices": lambda x, w: lora_mlp(x, *projections(w), slice_bytes=1),
    "rms_norm": lambda x, w: rms_norm(x, w[0], 1e-5),
    "rms_norm_beside": lambda x, w: torch.cat(rms_norm_beside(x * 2, w[0], 1e-5)),
    "add_rms_norm": lambda x, w: torch.cat(add_rms_norm(x, x * 2, w[0], 1e-5)),
    "rope": turned,
    "gated_activation": lambda x, w: gated_activation(x, x.flip(-1) * w[0]),
    "taken_rows": lambda x, w: taken_rows((x * w[0])[None], ROWS.to(x.device)),
}


THREE_D = (
    "lora_linear",
    "lora_mlp",
    "lora_mlp in slices",
    "rms_norm",
    "gated_activation",
)  # take [..., H] and are row by row here


@pytest.fixture
def leaves(device):
    return [torch.randn(n, SIZE, device=device, requires_grad=True) for n in (TOKENS, 24)]


def values_and_gradients(function, leaves, upstream):
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def compare(plain, wrapped, leaves):
    upstream = torch.randn_like(plain(*leaves))
    expected = values_and_gradients(plain, leaves, upstream)
    actual = values_and_gradients(wrapped, leaves, upstream)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPS)
def test_non_reentrant_checkpoint(leaves, name):
    compare(OPS[name], lambda *t: checkpoint(OPS[name], *t, use_reentrant=False), leaves)


@pytest.mark.parametrize("name", OPS)
def test_reentrant_checkpoint(leaves, name):
    """It allows no autograd.grad, only backward."""
    plain, upstream = OPS[name](*leaves), None
    upstream = torch.randn_like(plain)
    plain.backward(upstream)
    expected = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(OPS[name], *leaves, use_reentrant=True).backward(upstream)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("name", OPS)
def test_whole_graph_compiles(leaves, name):
    torch._dynamo.reset()
    compare(OPS[name], torch.compile(OPS[name], backend="aot_eager", fullgraph=True), leaves)


@pytest.mark.parametrize("name", OPS)
def test_outputs_may_be_changed_in_place(leaves, name):
    """Models do (`hidden_states += residual`); autograd forbids it on views that a node returns."""
    wider = [leaf.unflatten(0, (2, -1)) if name in THREE_D else leaf for leaf in leaves[:1]]
    out = OPS[name](*wider, leaves[1])
    out.mul_(2)
    twice = torch.autograd.grad(out.sum(), leaves)
    once = torch.autograd.grad(OPS[name](*leaves).sum() * 2, leaves)
    for a, b in zip(twice, once, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_the_same_when_a_checkpoint_runs_again(leaves):
    """Otherwise the gradients would belong to another mask than the loss."""

    def op(x, w):
        return lora_linear(x, projections(w)[0], dropout=0.5)[0]

    results = []
    for wrap in (False, True):
        torch.manual_seed(1)
        out = checkpoint(op, *leaves, use_reentrant=False) if wrap else op(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)

"""A low-rank product added on the way equals the formula, alone and inside of layers."""

import pytest
import torch

from regrow.kernels import low_rank_sum as op
from regrow.kernels.backend import INTERPRETING
from regrow.kernels.float8 import Float8Weight
from regrow.kernels.lora_linear import lora_linear, reference
from regrow.kernels.lora_mlp import lora_mlp
from regrow.kernels.lora_mlp import reference as mlp_reference
from regrow.kernels.projection import Projection

# (tokens, columns, rank): less than a tile, several with ends that are not full, ranks that are
# padded, one beyond what the kernel takes.
SHAPES = [(3, 7, 1), (70, 136, 16), (65, 257, 20), (5, 8, op.LARGEST_RANK + 1)]

# The interpreter takes the bits of bfloat16 for whole numbers in a product.
KINDS = [torch.float32, torch.float16, *([] if INTERPRETING else [torch.bfloat16])]


@pytest.fixture(params=KINDS, ids=lambda kind: str(kind).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("more", [False, True], ids=["two", "three"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(agree, device, dtype, shape, more):
    tokens, columns, rank = shape

    def wide(rows, count):
        return torch.randn(rows, count + 3).to(device, dtype)[:, 1 : count + 1]

    x, h = wide(tokens, columns), wide(tokens, rank)
    b = torch.randn(columns, rank).to(device, dtype)
    z = wide(tokens, columns) if more else None
    found = op.low_rank_sum(x, h, b, 0.5, z)
    due = x.double() + 0.5 * h.double() @ b.double().t() + (0 if z is None else z.double())
    assert found.is_contiguous()
    agree(found, due, dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_layer_adds_itself_to_a_residual(check_gradients, random, rank, bias):
    weight = random(13, 21, requires_grad=False)
    offset = random(13, requires_grad=False) if bias else None
    ab = [random(rank, 21, kind=torch.float32), random(13, rank, kind=torch.float32)]
    ab = ab if rank else []

    def ours(x, residual, *ab):
        made = Projection(weight, *(ab or (None, None)), 1.5, offset)
        return lora_linear(x, made, residual=residual)

    def right(x, residual, *ab):
        wide, ab = None if offset is None else offset.double(), ab or (None, None)
        return residual + reference(x, Projection(weight.double(), *ab, 1.5, wide))

    check_gradients(ours, right, [random(2, 9, 21), random(2, 9, 13), *ab])


@pytest.mark.parametrize("way", ["whole", "slices", "without"])
def test_an_mlp_adds_itself_to_a_residual(check_gradients, random, way):
    sizes = [(22, 15), (22, 15), (15, 22)]
    weights = [0.3 * random(o, i, requires_grad=False) for o, i in sizes]
    ab = [(random(3, i, kind=torch.float32), random(o, 3, kind=torch.float32)) for o, i in sizes]
    leaves = [(0.3 * t).detach().requires_grad_() for pair in ab for t in pair]
    leaves = [] if way == "without" else leaves

    def group(kind, parts):
        parts = parts or [None] * 6
        return [
            Projection(w.to(kind), *parts[2 * i : 2 * i + 2], 2.0) for i, w in enumerate(weights)
        ]

    slices = {"slice_bytes": 1 << 8} if way == "slices" else {}
    check_gradients(
        lambda x, r, *t: lora_mlp(x, *group(x.dtype, t), residual=r, **slices),
        lambda x, r, *t: r + mlp_reference(x, *group(torch.float64, t)),
        [random(200, 15), random(200, 15), *leaves],
    )


@pytest.mark.skipif(INTERPRETING, reason="is of bfloat16")
@pytest.mark.parametrize("rank", [0, 4])
def test_a_layer_in_8_bits_adds_itself_to_a_residual(random, rank):
    kind = torch.bfloat16
    x, residual = random(48, 64, kind=kind), random(48, 32, kind=kind)
    weight = random(32, 64, requires_grad=False, kind=kind)
    ab = (random(4, 64, kind=torch.float32), random(32, 4, kind=torch.float32)) if rank else ()
    made = Projection(Float8Weight.of(weight), *ab)
    (y,) = lora_linear(x, made, residual=residual)
    (alone,) = lora_linear(x, made)
    error = (y - residual - alone).double().norm() / y.double().norm()
    assert error < 1e-2
    upstream = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, residual, upstream)
    assert torch.equal(found, upstream)

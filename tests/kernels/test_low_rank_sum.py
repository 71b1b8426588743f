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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(agree, device, dtype, shape):
    tokens, columns, rank = shape

    def wide(rows, count):
        return torch.randn(rows, count + 3).to(device, dtype)[:, 1 : count + 1]

    x, h, z = wide(tokens, columns), wide(tokens, rank), wide(tokens, columns)
    b = torch.randn(columns, rank).to(device, dtype)
    found = op.low_rank_sum(x, h, b, 0.5, z)
    due = x.double() + 0.5 * h.double() @ b.double().t() + z.double()
    assert found.is_contiguous()
    agree(found, due, dtype)


TOKENS, INPUTS, OUTPUTS, RANK = 160, 64, 1024, 4


@pytest.fixture(params=[kind for kind in KINDS if kind != torch.float32], ids=str)
def half(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=[1e-3, 1e-2], ids=str)
def update(request, half, device):
    """(A and B, whose update of inputs of rms 1 is this large in steps of bfloat16; its rms)."""
    rms = request.param * torch.finfo(half).eps / torch.finfo(torch.bfloat16).eps
    a, b = torch.randn(RANK, INPUTS), torch.randn(OUTPUTS, RANK)
    return [a.to(device) / INPUTS**0.5, b.to(device) * rms / RANK**0.5], rms


def share_that_arrives(y, with_it, without, rms) -> float:
    """By regression on the update; what else y differs by is chance: 0.02 to 0.05 of it."""
    low = with_it - without
    assert low.std().item() == pytest.approx(rms, rel=0.3)
    return (((y.double() - without) * low).sum() / low.square().sum()).item()


def numbers(*shape, rms, like) -> torch.Tensor:
    return (rms * torch.randn(shape)).to(like[0][0].device, like[1])


@pytest.mark.parametrize("added", ["residual", "bias", "both"])
def test_a_small_update_is_not_lost_beside_large_numbers(device, half, update, added):
    """A stream or bias of rms 4 has steps of up to 30 times the smaller update."""
    ab, rms = update
    like = ab, half
    x = numbers(TOKENS, INPUTS, rms=1, like=like)
    weight = numbers(OUTPUTS, INPUTS, rms=0.3 * INPUTS**-0.5, like=like)
    bias = None if added == "residual" else numbers(OUTPUTS, rms=4, like=like)
    residual = None if added == "bias" else numbers(TOKENS, OUTPUTS, rms=4, like=like)
    (y,) = lora_linear(x, Projection(weight, *ab, 1.0, bias), residual=residual)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    exact = [
        reference(x.double(), Projection(wide[0], *adapter, 1.0, wide[1]))
        + (0 if residual is None else residual.double())
        for adapter in (ab, (None, None))
    ]
    assert share_that_arrives(y, *exact, rms) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("slices", [{}, {"slice_bytes": 1}], ids=["whole", "slices"])
def test_a_small_update_of_an_mlp_is_not_lost_in_the_stream(half, update, slices):
    ab, rms = update
    like = ab, half
    x = numbers(TOKENS, 32, rms=1, like=like)
    residual = numbers(TOKENS, OUTPUTS, rms=4, like=like)
    gate, up = (numbers(INPUTS, 32, rms=size * 32**-0.5, like=like) for size in (1, 1.7))
    down = numbers(OUTPUTS, INPUTS, rms=0.3 * INPUTS**-0.5, like=like)
    inner = Projection(gate), Projection(up)
    y = lora_mlp(x, *inner, Projection(down, *ab), residual=residual, **slices)
    wide = [Projection(t.double()) for t in (gate, up)]
    exact = [
        residual.double() + mlp_reference(x.double(), *wide, Projection(down.double(), *adapter))
        for adapter in (ab, ())
    ]
    assert share_that_arrives(y, *exact, rms) == pytest.approx(1, abs=0.15)


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

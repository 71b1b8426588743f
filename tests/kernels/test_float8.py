"""8-bit products: rounding is the nearest, row by row, and gradients go through the same weight."""

import pytest
import torch

from regrow.kernels.float8 import (
    E4M3,
    Float8Weight,
    dequantize,
    float8_product,
    quantize_rows,
    reference,
)
from regrow.kernels.lora_linear import lora_linear
from regrow.kernels.lora_mlp import lora_mlp
from regrow.kernels.projection import Projection

# Half a unit in the last of 4 binary digits; below the smallest normal number of e4m3 (2^-6)
# rounding is absolute: half of 2^-9 of the scale.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10

# Two factors rounded to 4 digits: measured 0.038 on random matrices (see float8).
PRODUCT_ERROR = 0.05


# 2049: one more than a power of two; 1: a row is one number.
@pytest.mark.parametrize("shape", [(3, 1), (5, 77), (2, 2049)], ids=str)
def test_rounding_is_as_near_as_the_type_allows(random, dtype, shape):
    x = random(*shape, requires_grad=False) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 2.0])[
        : shape[0], None
    ].to(random(1).device, dtype)
    x8, scales = quantize_rows(x)
    assert x8.dtype == E4M3
    assert scales.dtype == torch.float32
    error = (dequantize(x8, scales) - x.float()).abs()
    assert (error <= RELATIVE * 1.001 * x.float().abs() + ABSOLUTE * scales[:, None]).all()


def test_equals_the_formula(random):
    x = random(6, 300, requires_grad=False)
    (x8, scales), (right, right_scales) = quantize_rows(x), reference(x)
    torch.testing.assert_close(scales, right_scales)
    # A value on the edge between two neighbours may fall to either, if the scales differ by an ulp.
    same = (x8.float() == right.float()).float().mean()
    assert same > 0.995


def test_zero_row_stays_zero(random):
    x8, scales = quantize_rows(random(2, 32, requires_grad=False) * 0)
    assert not dequantize(x8, scales).any()


def relative(actual, expected) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def halves(random):
    """bfloat16 leaves: cuBLAS multiplies 8-bit rows into 16-bit results."""
    return lambda *shape, **options: random(*shape, kind=torch.bfloat16, **options)


def test_both_products_are_near_the_exact_ones(halves):
    x, dy, weight = (halves(*s, requires_grad=False) for s in ((48, 64), (48, 32), (32, 64)))
    w8 = Float8Weight.of(weight)
    y = float8_product(*quantize_rows(x), w8.rows_OI, w8.row_scales_O, x.dtype)
    dx = float8_product(*quantize_rows(dy), w8.columns_IO, w8.column_scales_I, x.dtype)
    assert relative(y, x.double() @ weight.double().t()) < PRODUCT_ERROR
    assert relative(dx, dy.double() @ weight.double()) < PRODUCT_ERROR


def test_lora_over_8_bits_is_near_lora_over_the_weight(halves, random):
    x = halves(48, 64)
    weights = [halves(n, 64, requires_grad=False) for n in (32, 16)]
    ab = [(random(4, 64, kind=torch.float32), random(n, 4, kind=torch.float32)) for n in (32, 16)]
    exact = [Projection(w, *p, 0.5) for w, p in zip(weights, ab, strict=True)]
    rounded = [Projection(Float8Weight.of(w), *p, 0.5) for w, p in zip(weights, ab, strict=True)]
    leaves = [x, *(t for pair in ab for t in pair)]
    ys, right = lora_linear(x, *rounded), lora_linear(x, *exact)
    upstream = [torch.randn_like(y) for y in ys]
    got = torch.autograd.grad(ys, leaves, upstream)
    due = torch.autograd.grad(right, leaves, upstream)
    for actual, expected in zip([*ys, *got], [*right, *due], strict=True):
        assert relative(actual, expected) < PRODUCT_ERROR


def test_mlp_over_8_bits_trains_its_adapters(halves, random):
    sizes = [(32, 16), (32, 16), (16, 32)]
    group = [
        Projection(
            Float8Weight.of(halves(o, i, requires_grad=False)),
            random(2, i, kind=torch.float32),
            random(o, 2, kind=torch.float32),
        )
        for o, i in sizes
    ]
    x = halves(16, 16)
    lora_mlp(x, *group).sum().backward()
    assert x.grad.isfinite().all()
    assert all(t.grad.isfinite().all() for p in group for t in (p.a, p.b))


def test_sizes_that_the_hardware_does_not_take_are_an_error():
    with pytest.raises(ValueError, match="multiples of 16"):
        Float8Weight.of(torch.zeros(30, 64))

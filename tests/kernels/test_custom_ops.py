"""Every registered op tells torch.compile the shapes, types and strides that it really gives."""

import pytest
import torch
from torch.library import opcheck

from regrow.kernels import (
    dropout,  # noqa: F401  (importing registers)
    float8,  # noqa: F401
    gated_lora,  # noqa: F401
    linear_cross_entropy,  # noqa: F401
    low_rank_sum,  # noqa: F401
    nf4,  # noqa: F401
    rank_gradients,  # noqa: F401
    rms_norm,  # noqa: F401
    rope,  # noqa: F401
    swiglu,
)
from regrow.kernels.backend import INTERPRETING

CHECKS = ("test_schema", "test_faketensor")


def halves(kind=torch.float32):
    """Two matrices [5, 8] whose rows lie apart."""
    return torch.randn(5, 16).to(kind).split(8, dim=1)


def checked(name, *arguments):
    opcheck(getattr(torch.ops.regrow, name).default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_gated_activations(kind):
    gate, up = halves(kind)
    for activation in swiglu.ACTIVATIONS:
        checked("gated_forward", gate, up, activation)
        for wants_out in (False, True):
            checked("gated_backward", torch.randn(5, 8).to(kind), gate, up, activation, wants_out)


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 2, 3, 4])], ids=["looked up", "given"])
@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_linear_cross_entropy(rows, budget):
    hidden, head = torch.randn(140, 8).bfloat16(), torch.randn(13, 8).bfloat16()
    targets = torch.full((140,), -100)
    targets[torch.tensor([0, 2, 3, 4])] = torch.tensor([1, 3, 12, 0])
    for flags in ([True, True, True], [True, True, False], [True, False, False], [False] * 3):
        checked("linear_cross_entropy", hidden, head, targets, rows, torch.rand(140),
                [2.0, 0.1, 0.1], flags, budget)  # fmt: skip


def test_dropout_and_float8():
    x = halves()[1]
    checked("seeded_dropout", x, 0.3, 5)
    checked("quantize_rows", x)


def test_both_gradients_of_a_rank():
    dy, h = halves(torch.bfloat16)
    checked(
        "rank_gradients", dy, h[:, :3], torch.randn(8, 3).bfloat16(), 2.0, h.clone()[:, :3], [8]
    )


def test_low_rank_sum():
    x, z = halves(torch.float16)
    h, b = torch.randn(5, 3).half(), torch.randn(8, 3).half()
    checked("low_rank_sum", x, h, b, 2.0, z)


@pytest.mark.skipif(not INTERPRETING, reason="has no path without Triton")
def test_gated_activation_with_adapters():
    (gate, up), kind = halves(torch.float16), torch.float16
    h, b, a = (torch.randn(*shape).to(kind) for shape in ((5, 6), (8, 3), (3, 8)))
    given = gate, up, h[:, :3], b, 2.0, h[:, 3:], b, 1.0, a
    checked("gated_lora_forward", *given, "silu", 8)
    d, both = torch.randn(5, 8).to(kind), torch.zeros(5, 24).to(kind)
    checked("gated_lora_backward", d, *given, h[:, 1:4], both, "silu")


@pytest.mark.skipif(not INTERPRETING, reason="has no path without Triton")
def test_weights_in_4_bits():
    packed = torch.randint(0, 256, (64, 1), dtype=torch.uint8)
    code, bytes_ = torch.randn(16), torch.randint(0, 256, (2,), dtype=torch.uint8)
    for scales in (
        (torch.rand(2), None, None, None),
        (bytes_, torch.randn(256), *torch.rand(2, 1)),
    ):
        checked("dequantize_4bit", packed, code, *scales, 64, 256, 16, 8, torch.bfloat16)


@pytest.mark.skipif(not INTERPRETING, reason="has no path without Triton")
def test_norms_and_rope():
    x, r, w = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    for residual in (None, r):
        for room in (0, 8):
            checked("rms_norm_forward", x, residual, w, 1e-5, 0.0, room)
    for wants_weight in (False, True):
        checked("rms_norm_backward", x, r, x + 1, w, torch.rand(3), 1.0, wants_weight)
    q, k = torch.randn(3, 24).view(3, 3, 8).split([2, 1], dim=1)  # views into one matrix
    cos, sin = torch.rand(3, 4), torch.rand(3, 4)
    for weight in (None, w):
        checked("rope_forward", q, k, cos, sin, weight, weight, 1e-5, 0.0)
        unnormed = (None, None) if weight is None else (q, k)
        for v in (None, k):
            checked("rope_backward", q, k, v, cos, sin, *unnormed, weight, weight, 1e-5, 0.0, 4)

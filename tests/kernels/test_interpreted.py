"""The kernels themselves on CPU: in one process of their own, under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from regrow.kernels import (
    backend,
    dropout,
    linear_cross_entropy,
    rms_norm,
    rope,
    swiglu,
)

INSIDE = backend.INTERPRETING
inside = pytest.mark.skipif(not INSIDE, reason="runs in the interpreter's process")

# The interpreter takes milliseconds for each program, so grids are as small as they can be.
ROWS = 3


@pytest.fixture(params=["cpu"])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.mark.skipif(INSIDE, reason="is the interpreter's process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here")
def test_kernels_equal_their_references_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@inside
@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
def test_gated_activation(check_gradients, random, activation):
    check_gradients(
        lambda g, u: swiglu.gated_activation(g, u, activation),
        lambda g, u: swiglu.reference(g, u, activation),
        [random(ROWS, 77), random(ROWS, 77)],
    )


@inside
def test_norm_of_a_sum(check_gradients, random):
    check_gradients(
        lambda x, r, w: rms_norm.add_rms_norm(x, r, w, 1e-5, offset=1.0),
        lambda x, r, w: rms_norm.reference(x, w, 1e-5, r, 1.0),
        [random(ROWS, 77), random(ROWS, 77), random(77)],
    )


@inside
def test_norm(check_gradients, random):
    check_gradients(
        lambda x, w: rms_norm.rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm.reference(x, w, 1e-5)[0],
        [random(ROWS, 77), random(77)],
    )


@inside
@pytest.mark.parametrize("rotated", [20, 12], ids=["whole", "part"])
@pytest.mark.parametrize("norms", [0, 2], ids=["plain", "norms"])
def test_rope(check_gradients, random, rotated, norms):
    angle = torch.arange(ROWS * rotated // 2).view(ROWS, -1).float()
    cos, sin = angle.cos(), angle.sin()

    def op(q, k, qw=None, kw=None):
        return rope.rope(q, k, cos, sin, q_weight_D=qw, k_weight_D=kw, offset=1.0)

    def formula(q, k, qw=None, kw=None):
        return [rope.reference(x, cos, sin, w, 1e-6, 1.0) for x, w in ((q, qw), (k, kw))]

    inputs = [random(ROWS, 3, 20), random(ROWS, 1, 20), *(random(20) for _ in range(norms))]
    check_gradients(op, formula, inputs)


@inside
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_cross_entropy(check_gradients, random, softcap):
    targets = torch.tensor([0, -100, 4099, 17])
    options = {"softcap": softcap, "label_smoothing": 0.2, "z_loss": 1e-3}
    check_gradients(
        lambda h, w: linear_cross_entropy.linear_cross_entropy(h, w, targets, **options),
        lambda h, w: linear_cross_entropy.reference(h, w, targets, **options)[0] / 3,
        [random(4, 16), random(4100, 16)],
    )


@inside
def test_dropout():
    x = torch.ones(ROWS, 1500)
    once = dropout.seeded_dropout(x, 0.3, 7)
    assert torch.equal(once, dropout.seeded_dropout(x, 0.3, 7))
    assert abs((once == 0).float().mean() - 0.3) < 0.05

"""The kernels themselves on CPU: in one process of their own, under Triton's interpreter."""

import importlib.util
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regrow.kernels import (
    backend,
    cross_entropy_rows,
    dropout,
    linear_cross_entropy,
    nf4,
    rank_gradients,
    rms_norm,
    rope,
    swiglu,
)
from tests.kernels import test_adamw as test_adamw_module
from tests.kernels import test_nf4 as test_nf4_module
from tests.kernels import test_rank_gradients as test_rank_gradients_module

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
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
         *(str(Path(__file__).with_name(name)) for name in ("test_custom_ops.py",
                                                            "test_gated_lora.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=900,
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
def test_norm_beside_what_goes_on(check_gradients, random):
    check_gradients(
        lambda x, w: rms_norm.rms_norm_beside(x, w, 1e-5),
        lambda x, w: (rms_norm.reference(x, w, 1e-5)[0], x * 1),
        [random(ROWS, 77), random(77)],
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


@inside
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", test_nf4_module.SHAPES, ids=str)
def test_weights_in_4_bits(shape, nested):
    packed, code, scales = test_nf4_module.random_weight(shape, nested, "cpu")
    found = nf4.dequantize(packed, code, scales, shape, torch.float32)
    assert torch.equal(found, nf4.reference(packed, code, scales, shape, torch.float32))


@inside
@pytest.mark.parametrize("shape", test_rank_gradients_module.SHAPES, ids=str)
def test_both_gradients_of_a_rank(agree, monkeypatch, shape):
    monkeypatch.setattr(rank_gradients, "_TILES", ((64, 32, 4, 3),))
    rank_gradients._division.cache_clear()
    # The interpreter takes the bits of bfloat16 for whole numbers in a product.
    inputs = test_rank_gradients_module.matrices(*shape, "cpu", torch.float16)
    test_rank_gradients_module.equals_the_formula(agree, *inputs)


@inside
def test_both_gradients_of_a_rank_come_from_the_kernel_or_from_two_products(agree, monkeypatch):
    asked, reference = [], rank_gradients.reference
    monkeypatch.setattr(
        rank_gradients, "reference", lambda *args: asked.append(1) or reference(*args)
    )
    dy, *rest = test_rank_gradients_module.matrices(70, 33, 3, "cpu", torch.float16)
    test_rank_gradients_module.equals_the_formula(agree, dy[:1].expand(70, -1), *rest)
    assert not asked  # one row, as the gradient of a sum over tokens is
    test_rank_gradients_module.equals_the_formula(agree, dy.t().contiguous().t(), *rest)
    assert len(asked) == 1  # rows with gaps
    large = rank_gradients.LARGEST_RANK + 1
    inputs = test_rank_gradients_module.matrices(70, 33, large, "cpu", torch.float16)
    test_rank_gradients_module.equals_the_formula(agree, *inputs)
    assert len(asked) == 2


# ---- offsets that 31 bits do not hold: 400,000 tokens of a width of 14336 are 5.7e9 elements ----

APART = (1 << 30) + 8  # elements between rows: the third row begins beyond 2**31
SEEN = 8  # columns of a row that are read and written
_UNRESERVED = mmap.MAP_PRIVATE | 0x4000  # Linux's MAP_NORESERVE, which Python 3.13 names


def far(values=None) -> torch.Tensor:
    """Rows [3, 8] that lie APART elements from each other, in memory that is not there else."""
    room = mmap.mmap(-1, 4 * (2 * APART + SEEN), _UNRESERVED)
    rows = torch.frombuffer(room, dtype=torch.float32).as_strided((3, SEEN), (APART, 1))
    return rows if values is None else rows.copy_(values)


@pytest.fixture
def some():
    return lambda: torch.randn(3, SEEN)


def close(found, expected):
    torch.testing.assert_close(found.clone(), expected, rtol=1e-4, atol=1e-4)


@inside
def test_gated_activation_reaches_far_rows(some):
    g, u, d = some(), some(), some()
    gate, up, dout = far(g), far(u), far(d)
    out, dgate, dup = far(), far(), far()
    swiglu._gated_forward_kernel[(3, 1)](gate, up, out, APART, APART, APART, "silu", SEEN)
    close(out, swiglu.reference(g, u))
    out.zero_()
    swiglu._gated_backward_kernel[(3, 1)](
        dout, gate, up, dgate, dup, out, APART, APART, APART, "silu", True, SEEN
    )
    for found, due in zip((dgate, dup, out), swiglu._backward_torch(d, g, u, "silu", True),
                          strict=True):  # fmt: skip
        close(found, due)


@inside
def test_norm_reaches_far_rows(some):
    """Its mean is over APART columns, of which 8 are no zeros: the norm is by sqrt(eps) = 1."""
    x, r, d, dt = some(), some(), some(), some()
    y, total, dx, rstd, w = far(), far(), far(), torch.empty(3), torch.randn(SEEN)
    rms_norm._rms_norm_forward_kernel[(3,)](
        far(x), far(r), w, y, total, rstd, APART, 1.0, 0.0, True, SEEN
    )  # fmt: skip
    close(y, (x + r) * w)
    close(total, x + r)
    rms_norm._rms_norm_backward_kernel[(2,)](
        far(d), far(dt), total, w, rstd, dx, w, 3, APART, 0.0, True, False, SEEN
    )
    close(dx, d * w + dt)


@inside
def test_cross_entropy_reaches_far_rows(some):
    z, targets = some(), torch.tensor([0, 7, 3])
    grads, weights = far(), torch.rand(3)
    found = cross_entropy_rows.losses_and_gradients(
        far(z), grads, targets, weights, [0.0, 0.0, 0.0], True
    )
    due = torch.empty_like(z)
    expected = cross_entropy_rows._torch(z, due, targets, weights, [0.0, 0.0, 0.0], True)
    close(grads, due)
    for a, b in zip(found, expected, strict=True):
        close(a, b)


HEADS = 1 << 27  # of each token; two of them are computed


def far_heads() -> torch.Tensor:
    """[3, 2, 8], the first heads of tokens that lie HEADS * 8 elements from each other."""
    room = mmap.mmap(-1, 4 * (2 * HEADS + 2) * SEEN, _UNRESERVED)
    rows = torch.frombuffer(room, dtype=torch.float32)
    return rows.as_strided((3, 2, SEEN), (HEADS * SEEN, SEEN, 1))


@inside
def test_rope_reaches_far_tokens():
    q, k, angle = torch.randn(3, 2, SEEN), torch.randn(3, 2, SEEN), torch.rand(3, SEEN // 2)
    cos, sin = angle.cos(), angle.sin()
    near, sizes = q.stride()[:2], (HEADS, HEADS, SEEN // 2, 0, 2, 2, SEEN // 2, 1)
    q_out, k_out, dq, dk = (far_heads() for _ in range(4))
    rope._rope_forward_kernel[(3,)](
        q, k, *near, *near, q, k, q_out, k_out, cos, sin, SEEN // 2, 0.0, 0.0, *sizes, False
    )
    close(q_out, rope.reference(q, cos, sin))
    close(k_out, rope.reference(k, cos, sin))
    apart = q_out.stride()[:2]
    rope._rope_backward_kernel[(2,)](
        q_out, k_out, *apart, *apart, q, k, *near, *near, q, k, dq, dk, dq, cos, sin, SEEN // 2, 3,
        0.0, 0.0, *sizes, False,
    )  # fmt: skip
    close(dq, q)
    close(dk, k)


@inside
def test_dropout_reaches_far_rows():
    y = far()
    dropout._dropout_kernel[(3, 1)](far(torch.ones(3, SEEN)), y, APART, 0.5, 7, SEEN)
    assert set(y.clone().flatten().tolist()) == {0.0, 2.0}
    assert (y != 0).any(1).all()


@inside
@pytest.mark.parametrize("most", [1.0, 0.0])
def test_adamw(most, dtype):
    ours, right, low, _ = test_adamw_module.run_both("cpu", dtype, most)
    for p, expected, copy in zip(ours, right, low, strict=True):
        torch.testing.assert_close(p, expected.detach(), rtol=2e-6, atol=2e-6)
        # The interpreter cuts bits off where the GPU rounds to the nearest.
        torch.testing.assert_close(copy.float(), p, rtol=2**-7, atol=0)

"""The kernels themselves on CPU: in one process of their own, under Triton's interpreter."""

import dataclasses
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
    lora_linear,
    neighbours,
    nf4,
    projection,
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
                                                            "test_gated_lora.py",
                                                            "test_joint_product.py",
                                                            "test_low_rank_sum.py"))],
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
@pytest.mark.parametrize("values", [False, True], ids=["alone", "values"])
def test_rope(check_gradients, random, rotated, norms, values):
    angle = torch.arange(ROWS * rotated // 2).view(ROWS, -1).float()
    cos, sin = angle.cos(), angle.sin()

    def op(q, k, *rest):
        v, (qw, kw) = rest[0] if values else None, rest[values:] or (None, None)
        return rope.rope(q, k, cos, sin, v_TKD=v, q_weight_D=qw, k_weight_D=kw, offset=1.0)

    def formula(q, k, *rest):
        weights = rest[values:] or (None, None)
        found = [rope.reference(x, cos, sin, w, 1e-6, 1.0) for x, w in zip((q, k), weights)]  # noqa: B905
        return [*found, rest[0] * 1] if values else found

    inputs = [random(ROWS, heads, 20) for heads in (3, 1, 1)[: 2 + values]]
    inputs += [random(20) for _ in range(norms)]
    check_gradients(op, formula, inputs)


@inside
def test_gradients_of_heads_are_columns_of_one_matrix():
    q, k, v = (torch.randn(1, ROWS, heads * 20, requires_grad=True) for heads in (3, 1, 1))
    angle = torch.rand(ROWS, 10)
    turned = rope.rope(
        *(x.view(ROWS, -1, 20) for x in (q, k)), angle.cos(), angle.sin(), v_TKD=v.view(ROWS, 1, 20)
    )
    gradients = torch.autograd.grad(turned, [q, k, v], [torch.randn_like(x) for x in turned])
    assert neighbours.columns_of_one([x[0] for x in gradients]) is not None


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str, indirect=False)
def test_attentions_projections_take_their_adapters_in(agree, dtype):
    """dq, dk and dv with dh behind them, times the weights with A below: one product."""
    widths, ranks, hidden = (24, 8, 8), (4, 2, 2), 16
    joint = 0.3 * torch.randn(sum(widths) + sum(ranks), hidden).to(dtype)
    *weights, room = joint.split([*widths, sum(ranks)])
    ab = [
        0.3 * torch.randn(shape) for o, r in zip(widths, ranks, strict=True)
        for shape in ((r, hidden), (o, r))
    ]  # fmt: skip
    cos, sin = torch.rand(ROWS, 4), torch.rand(ROWS, 4)
    x, found, calls = torch.randn(1, ROWS, hidden).to(dtype), [], []
    through = lora_linear._through_base
    for behind in (room, None):
        leaves = [t.clone().requires_grad_() for t in (x, *ab)]
        group = [
            projection.Projection(w, *leaves[1 + 2 * i : 3 + 2 * i], 0.5, room=behind)
            for i, w in enumerate(weights)
        ]
        gap = projection.gap_for(group, dtype)
        assert (gap is None) == (behind is None)
        assert gap is None or gap.columns == sum(ranks)
        short = dataclasses.replace(group[-1], room=room[:1])
        assert projection.gap_for([*group[:-1], short], dtype).columns == 0
        q, k, v = lora_linear.lora_linear(leaves[0], *group, gap=gap)
        q, k, v = (t.view(ROWS, -1, 8) for t in (q, k, v))
        turned = rope.rope(q, k, cos, sin, v_TKD=v, gap=gap)
        torch.manual_seed(2)
        upstream = [torch.randn_like(t) for t in turned]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora_linear, "_through_base", lambda *a: calls.append(1) or through(*a))
            gradients = torch.autograd.grad(turned, leaves, upstream)
        found.append([*turned, *gradients])
        assert len(calls) == (behind is None)
    for one, other in zip(*found, strict=True):
        agree(one, other.double(), dtype)


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
@pytest.mark.parametrize("widths", [(64, 32), (32, 64, 40), (40, 30), (32, 32, 32, 8)], ids=str)
def test_both_gradients_of_several_ranks(agree, monkeypatch, widths):
    monkeypatch.setattr(rank_gradients, "_TILES", ((64, 32, 4, 3),))
    rank_gradients._division.cache_clear()
    asked, reference = [], rank_gradients.reference
    monkeypatch.setattr(
        rank_gradients, "reference", lambda *args: asked.append(1) or reference(*args)
    )
    test_rank_gradients_module.several_equal_the_formula(
        agree, widths, 3, "cpu", torch.float16, tokens=70
    )
    assert len(asked) == (widths in ((40, 30), (32, 32, 32, 8)))
    rank_gradients._division.cache_clear()


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


def far_halves() -> torch.Tensor:
    """[3, 2, 8]: the beginnings of both halves of rows of 2 APART elements."""
    room = mmap.mmap(-1, 4 * (5 * APART + SEEN), _UNRESERVED)
    rows = torch.frombuffer(room, dtype=torch.float32)
    return rows.as_strided((3, 2, SEEN), (2 * APART, APART, 1))


@pytest.fixture
def some():
    return lambda: torch.randn(3, SEEN)


def close(found, expected):
    torch.testing.assert_close(found.clone(), expected, rtol=1e-4, atol=1e-4)


@inside
def test_gated_activation_reaches_far_rows(some):
    g, u, d = some(), some(), some()
    gate, up, dout = far(g), far(u), far(d)
    out, both = far(), far_halves()
    swiglu._gated_forward_kernel[(3, 1)](gate, up, out, APART, APART, APART, "silu", SEEN)
    close(out, swiglu.reference(g, u))
    out.zero_()
    swiglu._gated_backward_kernel[(3, 1)](
        dout, gate, up, both, out, APART, APART, APART, "silu", True, SEEN
    )
    due, again = swiglu._backward_torch(d, g, u, "silu", True)
    close(out, again)
    close(both.flatten(1), due)


@inside
def test_norm_reaches_far_rows(some):
    """Its mean is over APART columns, of which 8 are no zeros: the norm is by sqrt(eps) = 1."""
    x, r, d, dt = some(), some(), some(), some()
    y, total, dx, rstd, w = far(), far(), far(), torch.empty(3), torch.randn(SEEN)
    rms_norm._rms_norm_forward_kernel[(3,)](
        far(x), far(r), w, y, APART, total, rstd, APART, 1.0, 0.0, True, SEEN
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
    q_out, k_out = far_heads(), far_heads()
    room = mmap.mmap(-1, 4 * (7 * HEADS + 2) * SEEN, _UNRESERVED)
    whole = torch.frombuffer(room, dtype=torch.float32)  # [3, HEADS of q and of k, SEEN]
    dq, dk = (
        whole.as_strided((3, 2, SEEN), (2 * HEADS * SEEN, SEEN, 1), first * HEADS * SEEN)
        for first in (0, 1)
    )
    rope._rope_forward_kernel[(3,)](
        q, k, *near, *near, q, k, q_out, k_out, cos, sin, SEEN // 2, 0.0, 0.0, *sizes, False
    )
    close(q_out, rope.reference(q, cos, sin))
    close(k_out, rope.reference(k, cos, sin))
    apart = q_out.stride()[:2]
    rope._rope_backward_kernel[(2,)](
        q_out, k_out, q_out, *apart, *apart, *apart, q, k, *near, *near, q, k, whole,
        2 * HEADS * SEEN, dq, cos, sin, SEEN // 2, 3, 0.0, 0.0, *sizes, False, False, SEEN,
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

"""Fused low-rank projections equal base + s B A x, for every parameter's gradient."""

import pytest
import torch

from regrow.kernels import lora_linear as op
from regrow.kernels.dropout import seeded_dropout
from regrow.kernels.lora_linear import lora_linear, project
from regrow.kernels.projection import Projection, constants_of, group_of, tensors_of

INPUTS = 21
# (outputs, rank, bias) of each projection: grouped as Q, K, V with several ranks, one alone,
# some without an adapter, none with.
GROUPS = {
    "one": [(13, 3, False)],
    "bias": [(13, 3, True)],
    "qkv": [(12, 4, False), (5, 4, False), (5, 2, True)],
    "some": [(12, 0, True), (5, 1, False), (7, 0, False)],
    "none": [(12, 0, False), (5, 0, True)],
}


@pytest.fixture
def projections(random):
    """projections(sizes, trained): [Projection] with float32 adapters."""

    def make(sizes, trained=False, inputs=INPUTS, scaling=1.5):
        return [
            Projection(
                random(outputs, inputs, requires_grad=trained),
                random(rank, inputs, kind=torch.float32) if rank else None,
                random(outputs, rank, kind=torch.float32) if rank else None,
                scaling,
                random(outputs, requires_grad=trained) if bias else None,
            )
            for outputs, rank, bias in sizes
        ]

    return make


def rebuild(group, tensors):
    """The group with other tensors, from a flat list without the missing ones."""
    rest = iter(tensors)
    full = [None if t is None else next(rest) for t in tensors_of(group)]
    return group_of(full, constants_of(group))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_equals_the_formula(check_gradients, random, projections, sizes, trained):
    group = projections(sizes, trained)
    check_gradients(
        lambda x, *t: lora_linear(x, *rebuild(group, t)),
        lambda x, *t: [op.reference(x, p) for p in rebuild(group, t)],
        [random(2, 9, INPUTS), *(t for t in tensors_of(group) if t is not None)],
    )


@pytest.mark.parametrize("apart", ["turned", "columns"])
def test_tensors_may_have_gaps(check_gradients, random, apart):
    """Turned matrices, and columns of wider ones, as a fused or a sharded layer hands them over."""

    def gapped(rows, columns, **options):
        if apart == "turned":
            return random(columns, rows, **options).t()
        return random(rows, columns + 3, **options)[:, 1 : columns + 1]

    sizes = [(13, 3), (5, 2)]
    tensors = [gapped(9, INPUTS)]
    for outputs, rank in sizes:
        tensors += [gapped(outputs, INPUTS, requires_grad=False)]
        tensors += [gapped(rank, INPUTS, kind=torch.float32)]
        tensors += [gapped(outputs, rank, kind=torch.float32)]

    def group(parts):
        return [Projection(*parts[i : i + 3], 1.5) for i in (0, 3)]

    check_gradients(
        lambda x, *t: [y.t() for y in lora_linear(x, *group(t))],  # so dy is turned as well
        lambda x, *t: [op.reference(x, p).t() for p in group(t)],
        tensors,
    )


def test_input_without_gradient_still_trains_the_adapter(agree, random, projections, dtype):
    (projection,) = projections([(13, 3, False)])
    x = random(9, INPUTS, requires_grad=False)
    (y,) = lora_linear(x, projection)
    y.sum().backward()
    h = x.double() @ projection.a.double().t()
    agree(projection.b.grad, 1.5 * h.sum(0).expand(13, -1), dtype)


def test_weight_made_by_a_function_is_called_once_a_direction(random, projections):
    (projection,) = projections([(13, 3, False)])
    calls = []

    def dense():
        calls.append(1)
        return projection.weight

    x = random(9, INPUTS)
    made = Projection(dense, projection.a, projection.b, projection.scaling)
    (y,) = lora_linear(x, made)
    assert len(calls) == 1
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, made.a, made.b), upstream)
    assert len(calls) == 2
    (expected,) = lora_linear(x, projection)
    due = torch.autograd.grad(expected, (x, projection.a, projection.b), upstream)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(got, due, strict=True))


def test_saves_no_more_than_input_and_ranks(random, projections):
    """Beside the parameters the node holds x and h, and the adapters' values as multiplied."""
    x = random(9, INPUTS)
    group = projections([(12, 4, False), (5, 2, False)])
    own = {t.data_ptr() for t in tensors_of(group) if t is not None}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, *group)
    shapes = sorted(tuple(t.shape) for t in saved if t.data_ptr() not in own)
    casts = [] if x.dtype == torch.float32 else [(5, 2), (12, 4)]
    stacked = [(4 + 2, INPUTS)]
    assert shapes == sorted([(9, 4 + 2), (9, INPUTS), *casts, *stacked])


def test_dropout_uses_one_mask_in_both_directions(agree, random, projections, dtype):
    """Against the formula, with the mask that the node drew."""
    group = projections([(13, 3, False), (5, 2, False)])
    x, p, seed = random(9, INPUTS), 0.4, 11
    drop = (p, seed)
    mask = seeded_dropout(torch.ones_like(x), p, seed).detach().double()
    with torch.no_grad():
        a, bs = op.cast_adapters(group, dtype)
        ys, h = project(x, group, a, bs, drop)
        upstream = [torch.randn_like(y) for y in ys]
        dh, dbs = op.rank_gradients(upstream, h, group, bs)
        dx = op.input_gradient(upstream, dh, a, group, drop)
        wanted = [True, True, True, False] * 2
        grads = op.parameter_gradients(upstream, x, dbs, dh, group, drop, wanted)
    exact = x.detach().double().requires_grad_()
    params = [t.detach().double().requires_grad_() for q in group for t in (q.weight, q.a, q.b)]
    expected = [
        exact @ w.t() + 1.5 * (exact * mask) @ a.t() @ b.t()
        for w, a, b in zip(params[::3], params[1::3], params[2::3], strict=True)
    ]
    due = torch.autograd.grad(expected, [exact, *params], [u.double() for u in upstream])
    got = [dx, *(g for g in grads if g is not None)]
    for actual, right in zip([*ys, *got], [*expected, *due], strict=True):
        agree(actual, right, dtype)


def test_dropout_draws_anew_and_can_be_repeated(random, projections):
    (projection,) = projections([(13, 3, False)])
    x = random(9, INPUTS, requires_grad=False)
    torch.manual_seed(3)
    first, second = (lora_linear(x, projection, dropout=0.5)[0] for _ in range(2))
    torch.manual_seed(3)
    assert not torch.equal(first, second)
    assert torch.equal(first, lora_linear(x, projection, dropout=0.5)[0])


@pytest.mark.parametrize(
    ("weight", "a", "b"),
    [
        ((13, 20), (3, INPUTS), (13, 3)),
        ((13, INPUTS), (3, 20), (13, 3)),
        ((13, INPUTS), (3, INPUTS), (13, 2)),
        ((13, INPUTS), (3, INPUTS), (12, 3)),
        ((13, INPUTS), (3, INPUTS), None),
    ],
)
def test_what_does_not_fit_is_an_error(weight, a, b):
    tensors = [None if shape is None else torch.zeros(shape) for shape in (weight, a, b)]
    with pytest.raises(ValueError, match="a projection is"):
        lora_linear(torch.zeros(4, INPUTS), Projection(*tensors))


@pytest.mark.parametrize("kept", [True, False])
def test_a_float32_weight_gets_its_gradient_unrounded(device, kept):
    x = torch.randn(40, 24, device=device).bfloat16().requires_grad_()
    weight = torch.randn(16, 24, device=device, requires_grad=True)
    low = weight.detach().bfloat16()
    (y,) = lora_linear(x, Projection(weight, rounded=low if kept else None))
    assert y.dtype == torch.bfloat16
    upstream = torch.randn_like(y)
    dx, dweight = torch.autograd.grad(y, [x, weight], upstream)
    torch.testing.assert_close(dweight, upstream.float().t() @ x.detach().float())
    assert not torch.equal(dweight, dweight.bfloat16().float())
    torch.testing.assert_close(dx, upstream @ low)


@pytest.mark.parametrize(
    "residual",
    [torch.zeros(1, 6), torch.zeros(6), torch.zeros(5, 7), torch.zeros(5, 6, dtype=torch.float64)],
)
def test_a_residual_that_does_not_fit_is_named(residual):
    projection = Projection(torch.zeros(6, 4))
    with pytest.raises(ValueError, match="residual"):
        lora_linear(torch.zeros(5, 4), projection, residual=residual)
    with pytest.raises(ValueError, match="residual"):
        lora_linear(torch.zeros(5, 4), projection, projection, residual=torch.zeros(5, 6))

"""Parts of one matrix are found, what only looks so is not; their products are the sum's."""

import pytest
import torch

from regrow.kernels import lora_linear as op
from regrow.kernels.float8 import Float8Weight
from regrow.kernels.neighbours import Gap, columns_of_one, rows_of_one
from regrow.kernels.projection import Projection

WIDTHS = [5, 3, 4]


def test_columns_and_rows_of_one_matrix_are_found(device):
    wide = torch.randn(7, 20, device=device)
    inside = wide[1:6, 2:14]
    assert torch.equal(columns_of_one(inside.split(WIDTHS, 1)), inside)
    assert columns_of_one(inside.split(WIDTHS, 1)).data_ptr() == inside.data_ptr()
    tall = torch.randn(20, 7, device=device)
    assert torch.equal(rows_of_one(tall[3:15].split(WIDTHS)), tall[3:15])
    gapped = tall[3:15, 1:5]
    assert torch.equal(rows_of_one(gapped.split(WIDTHS)), gapped)


def test_what_lies_otherwise_is_not_taken_for_one(device):
    wide = torch.randn(6, 12, device=device)
    a, b, c = wide.split(WIDTHS, 1)
    others = [
        [a, c, b],
        [a, c],
        [a, b.clone()],
        [a[:3], b],
        [a, b.half()],
        [wide.t()[:5], wide.t()[5:]],
        [a[:, ::2], b],
        [wide[:1], wide[1:2]],  # rows, not columns
    ]
    assert all(columns_of_one(parts) is None for parts in others)
    a, b, c = wide.t().contiguous().split(WIDTHS)
    others = [[a, c, b], [a, b.clone()], [a[:, :3], b], [a, b.half()], [a.t(), b.t()], [a[:2], b]]
    assert all(rows_of_one(parts) is None for parts in others)


def test_a_gap_is_behind_its_own_gradients_alone(device):
    made = torch.randn(3, 20, device=device)
    gap = Gap(4)
    parts = made[:, :16].split([10, 6], 1)
    assert gap.behind(parts) is None
    gap.is_behind(made)
    found = gap.behind(parts)
    assert torch.equal(found, made[:, 16:])
    assert found.data_ptr() == made[:, 16:].data_ptr()
    assert gap.behind(parts) is None  # is given away once
    for others in (parts[::-1], [part.clone() for part in parts], [parts[0]] * 2,
                   made[:, 1:17].split([10, 6], 1), made.split([12, 8], 1)):  # fmt: skip
        gap.is_behind(made)
        assert gap.behind(others) is None


def made(random, dtype, ranks):
    """A group whose weights are neighbours, and what its input gradient takes."""
    weights = random(sum(WIDTHS), 6, requires_grad=False).split(WIDTHS)
    factors = [
        (random(r, 6, kind=torch.float32), random(o, r, kind=torch.float32)) if r else (None, None)
        for o, r in zip(WIDTHS, ranks, strict=True)
    ]
    group = [Projection(w, *ab, 0.5) for w, ab in zip(weights, factors, strict=True)]
    joint = random(9, sum(WIDTHS), requires_grad=False)
    a, bs = op.cast_adapters(group, dtype)
    h = None if a is None else random(9, sum(ranks), requires_grad=False)
    return group, joint, a, bs, h


@pytest.mark.parametrize("ranks", [(2, 1, 3), (2, 0, 1), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_input_gradient_of_neighbours_is_one_product(
    agree, monkeypatch, random, dtype, ranks, p
):
    group, joint, a, bs, h = made(random, dtype, ranks)
    calls, through = [], op._through_base
    monkeypatch.setattr(op, "_through_base", lambda *x: calls.append(1) or through(*x))
    found = []
    with torch.no_grad():
        for dys in (joint.split(WIDTHS, 1), [dy.clone() for dy in joint.split(WIDTHS, 1)]):
            dh, dbs = op.rank_gradients(dys, h, group, bs)
            found.append((op.input_gradient(dys, dh, a, group, (p, 11)), dh, *dbs))
            calls.append(0)
    assert calls == [1, 0, 1, 1, 1, 0]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            agree(one, other.double(), dtype)


def test_the_bases_of_neighbours_are_one_product(agree, random, dtype):
    group, *_ = made(random, dtype, (2, 1, 3))
    x = random(9, 6, requires_grad=False)
    ys = op.project_bases(x, group)
    assert columns_of_one(ys) is not None
    for y, projection in zip(ys, group, strict=True):
        agree(y, x.double() @ projection.weight.double().t(), dtype)


def relative(actual, expected) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("apart", [False, True], ids=["neighbours", "apart"])
def test_weights_in_8_bits_are_neighbours_where_they_were_rounded_together(
    monkeypatch, random, p, apart
):
    """Apart: each is multiplied by its columns of the whole."""
    kind, sizes = torch.bfloat16, (32, 16, 48)
    weights = [random(o, 64, requires_grad=False, kind=kind) for o in sizes]
    factors = [(random(4, 64, kind=torch.float32), random(o, 4, kind=torch.float32)) for o in sizes]
    parts = Float8Weight.of_group(weights)
    assert Float8Weight.whole_of(parts[:2]) is Float8Weight.whole_of(parts[::-1]) is None
    eighth, exact = (
        [Projection(w, *ab, 0.5) for w, ab in zip(group, factors, strict=True)]
        for group in (parts, weights)
    )
    calls, through = [], op._through_base
    monkeypatch.setattr(op, "_through_base", lambda *x: calls.append(1) or through(*x))
    dys = random(48, sum(sizes), requires_grad=False, kind=kind).split(sizes, 1)
    dys = [dy.clone() for dy in dys] if apart else dys
    x, h = random(48, 64, requires_grad=False, kind=kind), random(48, 12, kind=kind)
    with torch.no_grad():
        a, bs = op.cast_adapters(exact, kind)
        dh, _ = op.rank_gradients(dys, h, exact, bs)
        found = op.input_gradient(dys, dh, a, eighth, (p, 3))
        assert len(calls) == (3 if apart else 1)
        assert relative(found, op.input_gradient(dys, dh, a, exact, (p, 3))) < 0.05
        for y, w in zip(op.project_bases(x, eighth), weights, strict=True):
            assert relative(y, x.double() @ w.double().t()) < 0.05

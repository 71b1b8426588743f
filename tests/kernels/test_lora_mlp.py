"""The fused MLP equals its formula and keeps no hidden layer but gate and up."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from regrow.kernels.lora_mlp import _slice_rows, lora_mlp, reference
from regrow.kernels.projection import Projection, constants_of, group_of, tensors_of

HIDDEN, WIDTH = 15, 22


def mlp(random, ranks, trained, bias=False):
    sizes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]

    def scaled(*shape, **options):  # keeps outputs near one, as in a trained model
        leaf = random(*shape, **options)
        return (leaf.detach() * 0.3).requires_grad_(leaf.requires_grad)

    return [
        Projection(
            scaled(outputs, inputs, requires_grad=trained),
            scaled(rank, inputs, kind=torch.float32) if rank else None,
            scaled(outputs, rank, kind=torch.float32) if rank else None,
            2.0,
            scaled(outputs, requires_grad=trained) if bias else None,
        )
        for (outputs, inputs), rank in zip(sizes, ranks, strict=True)
    ]


def rebuild(group, tensors):
    rest = iter(tensors)
    full = [None if t is None else next(rest) for t in tensors_of(group)]
    return group_of(full, constants_of(group))


@pytest.mark.parametrize(
    ("ranks", "trained", "bias"),
    [((3, 3, 3), False, False), ((2, 0, 5), False, True), ((0, 0, 0), True, False)],
    ids=["lora", "several_ranks", "full_fine_tuning"],
)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_equals_the_formula(check_gradients, random, ranks, trained, bias, activation):
    group = mlp(random, ranks, trained, bias)
    check_gradients(
        lambda x, *t: lora_mlp(x, *rebuild(group, t), activation=activation),
        lambda x, *t: reference(x, *rebuild(group, t), activation=activation),
        [random(2, 7, HIDDEN), *(t for t in tensors_of(group) if t is not None)],
    )


def test_tensors_may_have_gaps(check_gradients, random):
    """Columns of wider matrices, and a gradient that is turned."""

    def gapped(rows, columns, **options):
        return 0.3 * random(rows, columns + 3, **options)[:, 1 : columns + 1]

    tensors = [gapped(7, HIDDEN)]
    for outputs, inputs in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        tensors += [gapped(outputs, inputs, requires_grad=False)]
        tensors += [gapped(size, n, kind=torch.float32) for size, n in ((3, inputs), (outputs, 3))]

    def group(parts):
        return [Projection(*parts[i : i + 3], 1.5) for i in (0, 3, 6)]

    check_gradients(
        lambda x, *t: lora_mlp(x, *group(t)).t(),
        lambda x, *t: reference(x, *group(t)).t(),
        tensors,
    )


def test_keeps_gate_and_up_but_not_their_product(random):
    group = mlp(random, (3, 3, 3), False)
    own = {t.data_ptr() for t in tensors_of(group) if t is not None}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_mlp(random(7, HIDDEN), *group)
    shapes = [tuple(t.shape) for t in saved if t.data_ptr() not in own]
    assert sorted(shape for shape in shapes if shape[0] == 7) == [
        (7, 3), (7, 6), (7, HIDDEN), (7, WIDTH), (7, WIDTH),
    ]  # fmt: skip


def test_frozen_input_trains_the_adapters(random):
    group = mlp(random, (3, 3, 3), False)
    lora_mlp(random(7, HIDDEN, requires_grad=False), *group).sum().backward()
    assert all(t.grad is not None for p in group for t in (p.a, p.b))


def test_dropout_reaches_the_low_rank_paths_alone(random):
    x = random(7, HIDDEN, requires_grad=False)
    plain = mlp(random, (0, 0, 0), False)
    assert torch.equal(lora_mlp(x, *plain, dropout=0.5), lora_mlp(x, *plain))
    adapted = mlp(random, (3, 3, 3), False)
    assert not torch.equal(lora_mlp(x, *adapted, dropout=0.5), lora_mlp(x, *adapted))


def test_what_does_not_fit_is_an_error():
    gate, up = Projection(torch.zeros(8, 4)), Projection(torch.zeros(9, 4))
    down = Projection(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="gate has 8 outputs and up has 9"):
        lora_mlp(torch.zeros(2, 4), gate, up, down)
    narrow = torch.zeros(2, 1)  # which would be added to every column
    for slice_bytes in (1, 1 << 20):
        with pytest.raises(ValueError, match="residual"):
            lora_mlp(torch.zeros(2, 4), gate, gate, down, residual=narrow, slice_bytes=slice_bytes)
    with pytest.raises(ValueError, match="relu"):
        lora_mlp(torch.zeros(2, 4), gate, gate, down, activation="relu")


@pytest.mark.parametrize(
    ("ranks", "trained", "bias"),
    [((3, 3, 3), False, False), ((2, 0, 5), False, True), ((0, 0, 0), True, False)],
    ids=["lora", "several_ranks", "full_fine_tuning"],
)
def test_slices_of_the_tokens_give_the_same(check_gradients, random, ranks, trained, bias):
    group = mlp(random, ranks, trained, bias)
    x = random(2, 150, HIDDEN)
    check_gradients(
        lambda x, *t: lora_mlp(x, *rebuild(group, t), slice_bytes=4096),
        lambda x, *t: reference(x, *rebuild(group, t)),
        [x, *(t for t in tensors_of(group) if t is not None)],
    )


def test_slices_keep_only_the_input(random):
    group = mlp(random, (3, 3, 3), False)
    own = {t.data_ptr() for t in tensors_of(group) if t is not None}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_mlp(random(300, HIDDEN), *group, slice_bytes=4096)
    shapes = [tuple(t.shape) for t in saved if t.data_ptr() not in own]
    assert [shape for shape in shapes if shape[0] == 300] == [(300, HIDDEN)]


def test_slices_drop_alike_in_both_directions(random, device):
    """The gradient of the loss with one mask is the slope of the loss with that mask."""
    group = mlp(random, (3, 3, 3), False)
    x = torch.randn(300, HIDDEN, dtype=torch.float64, device=device)
    group = [
        Projection(p.weight.double(), *(t.detach().double().requires_grad_() for t in (p.a, p.b)))
        for p in group
    ]

    def loss():
        torch.manual_seed(1)
        return lora_mlp(x, *group, dropout=0.4, slice_bytes=4096).square().sum()

    before = loss()
    before.backward()
    b = group[0].b
    step = 1e-6 * torch.randn_like(b)
    with torch.no_grad():
        b += step
    assert (loss() - before).item() == pytest.approx((b.grad * step).sum().item(), rel=1e-3)


def test_a_quantized_weight_is_made_once_for_all_slices(random):
    gate, up, down = mlp(random, (3, 3, 3), False)
    made = []

    def weight():
        made.append(1)
        return gate.weight

    out = lora_mlp(random(300, HIDDEN), replace(gate, weight=weight), up, down, slice_bytes=4096)
    assert len(made) == 1
    out.sum().backward()
    assert len(made) == 2


def test_slices_are_even_and_small_enough():
    assert _slice_rows(1000, 14336, 2, 4 << 30) == 0
    rows = _slice_rows(400_000, 14336, 2, 4 << 30)
    assert rows % 128 == 0
    assert rows * 14336 * 2 * 2 < 1.01 * (1 << 30)
    assert 400_000 / rows == pytest.approx(-(-400_000 // rows), abs=0.2)


@pytest.mark.parametrize(("tokens", "made_again"), [(7, (1, 0)), (300, (0, 0))])
def test_a_checkpoint_makes_no_product_again_that_nothing_needs(random, tokens, made_again):
    """Of gate, which is needed, and of down; in slices of neither."""
    group = mlp(random, (3, 3, 3), False)
    made = [0, 0]

    def counted(at, number):
        def weight():
            made[number] += 1
            return group[at].weight

        return replace(group[at], weight=weight)

    counting = counted(0, 0), group[1], counted(2, 1)
    x = random(tokens, HIDDEN)
    out = checkpoint(lora_mlp, x, *counting, slice_bytes=4096, use_reentrant=False)
    assert made == [1, 1]
    out.sum().backward()
    assert tuple(made) == (2 + made_again[0], 2 + made_again[1])
    found = x.grad.clone()
    x.grad = None
    lora_mlp(x, *group, slice_bytes=4096).sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=0, atol=0)

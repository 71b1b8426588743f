"""The activation's kernels make the low-rank products beside it as the formula says."""

import math

import pytest
import torch

from regrow.kernels import gated_lora, lora_linear, nf4, swiglu
from regrow.kernels.backend import INTERPRETING
from regrow.kernels.lora_mlp import lora_mlp, reference
from regrow.kernels.projection import Projection, constants_of, group_of, tensors_of
from tests.kernels.conftest import CUDA
from tests.kernels.test_nf4 import random_weight

# (tokens, width, ranks of gate, up and down): less than a tile; several strips and runs whose ends
# are not full; ranks that are padded, and one beyond a tile of the cores.
SHAPES = [(3, 7, (1, 2, 3)), (70, 136, (16, 16, 16)), (130, 72, (3, 20, 5))]
KINDS = [torch.float16] if INTERPRETING else [torch.float16, torch.bfloat16]


@pytest.fixture(params=["cpu" if INTERPRETING else CUDA])
def device(request) -> str:
    return request.param


@pytest.fixture(params=KINDS, ids=lambda kind: str(kind).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


def given(tokens, width, ranks, device, dtype):
    """d, gate, up, the adapters of both, A of down and its dh; rows lie apart where they may."""

    def columns(rows, count, scale=1.0):
        return scale * torch.randn(rows, count + 3).to(device, dtype)[:, 1 : count + 1]

    of_gate, of_up, of_down = ranks
    d, gate, up = (columns(tokens, width) for _ in range(3))
    adapters = columns(tokens, of_gate), columns(width, of_gate, 0.3), 1.5
    adapters += columns(tokens, of_up), columns(width, of_up, 0.3), 0.5
    return d, gate, up, adapters, columns(of_down, width, 0.1), columns(tokens, of_down)


CASES = [(shape, "silu") for shape in SHAPES] + [
    (SHAPES[0], kind) for kind in swiglu.ACTIVATIONS[1:]
]


@pytest.mark.parametrize("waits_there", ["nothing", "d", "gate and up"])
@pytest.mark.parametrize(("shape", "activation"), CASES, ids=str)
def test_equals_the_formula(agree, device, dtype, shape, activation, waits_there):
    d, gate, up, adapters, a, dh = given(*shape, device, dtype)
    room = len(a)
    hidden, h = gated_lora.forward(gate, up, *adapters, a, activation, room)
    assert hidden.as_strided((len(hidden), room), hidden.stride(), hidden.shape[1]).isnan().all()
    both = gate.new_full((len(gate), 2 * gate.shape[1] + room), math.nan)
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in (gate, up, *adapters, a)]
    exact_d, (of_gate, of_up) = d.double(), both[:, :-room].chunk(2, 1)
    if waits_there == "d":
        d = of_up.copy_(d)
    elif waits_there == "gate and up":
        gate, up = of_gate.copy_(gate), of_up.copy_(up)
    da = gated_lora.backward(d, gate, up, *adapters, a, dh, both, activation)
    assert both[:, -room:].isnan().all()
    assert da.dtype == torch.float32
    leaves = [exact[0].requires_grad_(), exact[1].requires_grad_(), exact[-1].requires_grad_()]
    right = gated_lora.reference(*exact, activation)
    due = torch.autograd.grad(right, leaves, [exact_d, dh.double()])
    for found, expected in zip(
        (hidden, h, *both[:, :-room].chunk(2, 1), da), (*right, *due), strict=True
    ):
        agree(found, expected, dtype)


@pytest.mark.skipif(INTERPRETING, reason="runs programs one after the other")
def test_is_the_same_every_time(device, dtype):
    d, gate, up, adapters, a, dh = given(*SHAPES[1], device, dtype)

    def backward():
        both = gate.new_empty(len(gate), 2 * gate.shape[1])
        return gated_lora.backward(d, gate, up, *adapters, a, dh, both, "silu"), both

    for made in (lambda: gated_lora.forward(gate, up, *adapters, a, "silu", 0), backward):
        assert all(torch.equal(x, y) for x, y in zip(made(), made(), strict=True))


@pytest.mark.parametrize("in_slices", [False, True], ids=["whole", "slices"])
def test_the_mlp_takes_it(check_gradients, random, monkeypatch, in_slices):
    """Slices are of 128 rows."""
    tokens, hidden, width, calls = 200 if in_slices else 7, 15, 22, []
    kernel = gated_lora.backward
    monkeypatch.setattr(gated_lora, "backward", lambda *all: calls.append(1) or kernel(*all))
    sizes = [(width, hidden), (width, hidden), (hidden, width)]
    group = []
    for (outputs, inputs), rank in zip(sizes, (3, 2, 5), strict=True):
        weight = 0.3 * random(outputs, inputs, requires_grad=False)
        a, b = (random(*s, kind=torch.float32) for s in ((rank, inputs), (outputs, rank)))
        group.append(Projection(weight, (0.3 * a).detach(), (0.3 * b).detach(), 2.0))

    def rebuilt(adapters):
        rest = iter(adapters)
        full = [next(rest) if i % 4 in (1, 2) else t for i, t in enumerate(tensors_of(group))]
        return group_of(full, constants_of(group))

    def exact(x, *adapters):
        wide = [Projection(p.weight.double(), p.a, p.b, 2.0) for p in rebuilt(adapters)]
        return reference(x, *wide)

    adapters = [t.requires_grad_() for p in group for t in (p.a, p.b)]
    slice_bytes = {"slice_bytes": 1 << 13} if in_slices else {}
    check_gradients(
        lambda x, *t: lora_mlp(x, *rebuilt(t), **slice_bytes),
        exact,
        [random(tokens, hidden), *adapters],
    )
    assert len(calls) == (2 if in_slices else 1)


@pytest.mark.parametrize("why", ["dropout", "bias", "trained", "large"])
def test_what_it_does_not_know_goes_the_other_way(random, monkeypatch, why):
    monkeypatch.setattr(gated_lora, "forward", lambda *all: pytest.fail("is not for this"))
    rank = gated_lora.LARGEST_RANK + 1 if why == "large" else 3
    group = [
        Projection(
            random(outputs, inputs, requires_grad=why == "trained"),
            random(rank, inputs, kind=torch.float32),
            random(outputs, rank, kind=torch.float32),
            bias=random(outputs) if why == "bias" else None,
        )
        for outputs, inputs in ((22, 15), (22, 15), (15, 22))
    ]
    y = lora_mlp(random(7, 15), *group, dropout=0.5 if why == "dropout" else 0.0)
    y.float().sum().backward()
    assert group[2].a.grad is not None


def neighbours_and_not(random, shapes, ranks, bits, dtype):
    """Twice the same weights with their room (or None), together and apart."""
    if bits == 16:
        (width, hidden), _, down = shapes
        joint = 0.3 * random(2 * width + ranks, hidden, requires_grad=False)
        *weights, room = joint.split([width, width, ranks])
        weights += [0.3 * random(*down, requires_grad=False)]
        return (weights, room), (weights, None)
    made = []
    for shape in shapes:
        packed, code, scales = random_weight(shape, False, random(1).device)
        made.append(nf4.Nf4Weight(packed, 0.3 * code, scales, shape, dtype))
    return (made, None), ([weight.__call__ for weight in made], None)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("in_slices", [False, True], ids=["whole", "slices"])
def test_room_behind_weights_and_gradients_takes_the_adapters_in(
    agree, random, dtype, monkeypatch, in_slices, bits
):
    """One product each way for gate, up and their A gives the same results."""
    rank, hidden, width, tokens = 4, 16, 24, 200
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    together, apart = neighbours_and_not(random, shapes, 2 * rank, bits, dtype)
    adapters = [
        0.3 * random(*shape, kind=torch.float32).detach()
        for outputs, inputs in shapes
        for shape in ((rank, inputs), (outputs, rank))
    ]
    x, found, calls = random(tokens, hidden), [], []
    below = lora_linear.below_with_adapters
    monkeypatch.setattr(
        lora_linear, "below_with_adapters", lambda *all: calls.append(below(*all)) or calls[-1]
    )
    slices = {"slice_bytes": 1 << 13} if in_slices else {}
    for is_apart, (weights, room) in enumerate((together, apart)):
        leaves = [x, *(t.clone().requires_grad_() for t in adapters)]
        group = [
            Projection(w, *leaves[1 + 2 * i : 3 + 2 * i], 2.0, room=room if i == 1 else None)
            for i, w in enumerate(weights)
        ]
        y = lora_mlp(x, *group, **slices)
        torch.manual_seed(1)
        found.append([y, *torch.autograd.grad(y, leaves, torch.randn_like(y))])
        # Forward and backward (where slices make gate and up again), each slice of 128 rows.
        times = {False: 2, True: 6}[in_slices]
        assert len(calls) == times
        assert all((joint is None) == is_apart for joint in calls)
        calls.clear()
    for one, other in zip(*found, strict=True):
        agree(one, other.double(), dtype)

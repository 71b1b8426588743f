"""Base and update in one product equal the formula, and nothing else happens where it cannot be."""

from dataclasses import replace

import pytest
import torch

from regrow.kernels import gated_lora, lora_linear, lora_mlp
from regrow.kernels.backend import INTERPRETING
from regrow.kernels.joint_product import COLUMNS, Beside, beside_inputs
from regrow.kernels.neighbours import Gap
from regrow.kernels.projection import Projection, group_of, tensors_of
from tests.kernels.conftest import CUDA, TOLERANCE

INPUTS = 21
# (outputs, rank, bias) of each projection: q, k and v with several ranks; one that fills the room.
GROUPS = {
    "qkv": [(12, 4, False), (5, 4, False), (7, 2, True)],
    "one": [(13, 3, False)],
    "full": [(40, COLUMNS, True)],
}


# The interpreter's products take the bits of bfloat16 for whole numbers.
KINDS = [kind for kind in TOLERANCE if not (INTERPRETING and kind == torch.bfloat16)]


@pytest.fixture(params=KINDS, ids=lambda kind: str(kind).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def joint(monkeypatch):
    """How many products were joint."""
    found = []
    whole = lora_linear.joint_products
    monkeypatch.setattr(
        lora_linear, "joint_products", lambda *given: found.append(len(given[3])) or whole(*given)
    )
    return found


@pytest.fixture
def projections(random, device, dtype):
    """Frozen weights with room beside them, under float32 adapters."""

    def make(sizes, inputs=INPUTS, scaling=1.5):
        group, start = [], 0
        for outputs, rank, bias in sizes:
            wide = torch.zeros(outputs, inputs + COLUMNS, device=device, dtype=dtype)
            wide[:, :inputs] = torch.randn(outputs, inputs)
            a = random(rank, inputs, kind=torch.float32)
            b = random(outputs, rank, kind=torch.float32)
            beside = Beside(wide[:, inputs:], start, rank)
            its_bias = random(outputs, requires_grad=False) if bias else None
            weight = wide[:, :inputs]
            group.append(Projection(weight, a, b, scaling, its_bias, beside=beside))
            start += rank
        return group

    return make


def roomy(x, gap):
    """x with NaN behind it, which is announced."""
    wide = torch.cat([x, x.new_full((*x.shape[:-1], COLUMNS), torch.nan)], -1)
    gap.is_behind(wide)
    return wide[..., : x.shape[-1]]


def rebuild(group, tensors):
    rest = iter(tensors)
    full = [None if t is None else next(rest) for t in tensors_of(group)]
    constants = [(None, p.scaling, p.rounded, p.room, p.low, p.beside) for p in group]
    return group_of(full, constants)


def leaves(group):
    return [t for t in tensors_of(group) if t is not None]


@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # of the second no element is dropped
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_equals_the_formula(check_gradients, random, projections, joint, sizes, dropout):
    group, gap = projections(sizes), Gap(COLUMNS)
    check_gradients(
        lambda x, *t: lora_linear.lora_linear(
            roomy(x, gap), *rebuild(group, t), behind=gap, dropout=dropout
        ),
        lambda x, *t: [lora_linear.reference(x, p) for p in rebuild(group, t)],
        [random(1, 9, INPUTS), *leaves(group)],
    )
    assert joint == [len(sizes)]


def test_a_residual_is_added_too(check_gradients, random, projections, joint):
    group, gap = projections(GROUPS["one"]), Gap(COLUMNS)
    check_gradients(
        lambda x, z, *t: lora_linear.lora_linear(
            roomy(x, gap), *rebuild(group, t), residual=z, behind=gap
        ),
        lambda x, z, *t: z + lora_linear.reference(x, *rebuild(group, t)),
        [random(1, 9, INPUTS), random(1, 9, 13), *leaves(group)],
    )
    assert joint == [1]


def test_the_next_step_sees_its_own_adapter(agree, random, projections, dtype):
    """B is written anew each time; the weight itself stays, and nothing saved is said to change."""
    (projection,), gap = projections(GROUPS["one"]), Gap(COLUMNS)
    before = projection.weight.clone()
    x = random(9, INPUTS)
    first = lora_linear.lora_linear(roomy(x, gap), projection, behind=gap)[0]
    projection.b.data.mul_(-3)
    second = lora_linear.lora_linear(roomy(x, gap), projection, behind=gap)[0]
    agree(second, lora_linear.reference(x.double(), doubled(projection)), dtype)
    assert torch.equal(projection.weight, before)
    first.sum().backward()  # its saved weight has not been written to


def doubled(p):
    parts = (None if t is None else t.detach().double() for t in (p.weight, p.a, p.b, p.bias))
    weight, a, b, bias = parts
    return Projection(weight, a, b, p.scaling, bias)


def without_word(group, x, gap):
    return group, torch.cat([x, x[:, :1].expand(-1, COLUMNS)], 1)[:, :INPUTS], None


def without_room_behind(group, x, gap):
    gap.is_behind(torch.empty_like(x))
    return group, x, None


def of_another_rank(group, x, gap):
    wrong = replace(group[0].beside, rank=group[0].rank - 1)
    return [replace(group[0], beside=wrong)], roomy(x, gap), None


def without_room_beside(group, x, gap):
    return [replace(group[0], beside=None)], roomy(x, gap), None


def with_moved_weight(group, x, gap):
    return [replace(group[0], weight=group[0].weight.clone())], roomy(x, gap), None


def with_bias_and_residual(group, x, gap):
    bias = torch.ones(13, dtype=x.dtype, device=x.device)
    return [replace(group[0], bias=bias)], roomy(x, gap), torch.ones_like(x[:, :13])


@pytest.mark.parametrize(
    "case",
    [
        without_word,
        without_room_behind,
        of_another_rank,
        without_room_beside,
        with_moved_weight,
        with_bias_and_residual,
    ],
)
def test_where_there_is_no_room_it_is_computed_as_before(
    agree, random, projections, joint, dtype, case
):
    x, gap = random(9, INPUTS, requires_grad=False), Gap(COLUMNS)
    (projection,), given, residual = case(projections(GROUPS["one"]), x, gap)
    (y,) = lora_linear.lora_linear(given, projection, residual=residual, behind=gap)
    right = lora_linear.reference(x.double(), doubled(projection))
    agree(y, right if residual is None else right + residual.double(), dtype)
    assert not joint


def test_what_h_leaves_of_the_room_is_zero(device, dtype):
    wide = torch.full((70, INPUTS + COLUMNS), torch.nan, device=device, dtype=dtype)
    x, free = wide[:, :INPUTS], wide[:, INPUTS:]
    x.fill_(2)
    h = torch.randn(70, 9, device=device).to(dtype)[:, 1:6]
    found = beside_inputs(x, h, free)
    assert found.data_ptr() == wide.data_ptr()
    assert torch.equal(found[:, INPUTS : INPUTS + 5], h)
    assert (found[:, INPUTS + 5 :] == 0).all()
    assert (found[:, :INPUTS] == 2).all()


@pytest.mark.parametrize("device", ["cpu" if INTERPRETING else CUDA], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16], indirect=True)
@pytest.mark.parametrize("in_slices", [False, True], ids=["whole", "slices"])
def test_an_mlp_gives_its_hidden_layer_room(check_gradients, random, projections, joint, in_slices):
    tokens, hidden, width = 200 if in_slices else 7, 15, 22
    inner = projections([(width, 3, False), (width, 3, False)], hidden)
    group = [*(replace(p, beside=None) for p in inner), *projections([(hidden, 5, False)], width)]
    assert gated_lora.takes(group[0].weight)
    x = (0.3 * random(1, tokens, hidden, requires_grad=False)).requires_grad_()
    more = {"slice_bytes": 1} if in_slices else {}
    check_gradients(
        lambda x, z, *t: lora_mlp.lora_mlp(x, *rebuild(group, t), residual=z, **more),
        lambda x, z, *t: z + lora_mlp.reference(x, *rebuild(group, t)),
        [x, random(1, tokens, hidden), *leaves(group)],
    )
    assert joint == [1] * (2 if in_slices else 1)

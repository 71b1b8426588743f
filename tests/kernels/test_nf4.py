"""Weights in 4 bits come back as the formula says, and as bitsandbytes makes them."""

import pytest
import torch

from regrow.kernels import gated_lora, nf4
from regrow.kernels import lora_linear as lora_linear_module
from regrow.kernels.lora_linear import lora_linear
from regrow.kernels.lora_mlp import lora_mlp
from regrow.kernels.projection import Projection

# A last block that is not full; more than one block of scales; a count that is no multiple of 8,
# which the kernel leaves to the formula; more than one program.
SHAPES = [(5, 72), (300, 64), (3, 7), (70, 128)]


def random_weight(shape, nested, device):
    """Random half-bytes, code and scales of a weight."""
    count = shape[0] * shape[1]
    packed = torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8)
    blocks = -(-count // 64)
    parts = [torch.rand(blocks), 64]
    if nested:
        parts[0] = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        parts += [torch.randn(256), torch.rand(-(-blocks // 256)), torch.tensor(0.7), 256]
    parts = [part.to(device) if isinstance(part, torch.Tensor) else part for part in parts]
    return packed.to(device), torch.randn(16).to(device), nf4.Scales(*parts)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(device, dtype, shape, nested):
    packed, code, scales = random_weight(shape, nested, device)
    found = nf4.dequantize(packed, code, scales, shape, dtype)
    values = scales.values_B.cpu()
    if nested:
        values = (
            scales.code2.cpu()[values.long()]
            * scales.scale2.cpu()[torch.arange(len(values)) // 256]
            + scales.offset.cpu()
        )
    at = torch.arange(shape[0] * shape[1])
    half = torch.where(at % 2 == 0, packed.cpu()[at // 2, 0] >> 4, packed.cpu()[at // 2, 0] % 16)
    due = (code.cpu()[half.long()] * values[at // 64]).to(dtype).view(shape)
    # The GPU may round product and sum of a scale as one.
    torch.testing.assert_close(found.cpu(), due, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("inputs", [64, 7], ids=["kernel", "formula"])
def test_several_weights_are_made_in_one_matrix(device, dtype, nested, inputs):
    weights = [
        nf4.Nf4Weight(*random_weight((rows, inputs), nested, device), (rows, inputs), dtype)
        for rows in (300, 16, 24)
    ]
    joint = nf4.dequantize_below(weights, dtype)
    assert torch.equal(joint, torch.cat([weight() for weight in weights]))


@pytest.fixture
def through_base(monkeypatch):
    """Grows with each product of dy and a frozen weight that is made by itself."""
    calls, through = [], lora_linear_module._through_base
    monkeypatch.setattr(
        lora_linear_module, "_through_base", lambda *given: calls.append(1) or through(*given)
    )
    return calls


@pytest.mark.parametrize("rank", [0, 4])
def test_neighbours_in_4_bits_give_what_each_gives_alone(
    agree, random, through_base, device, dtype, rank
):
    """With adapters, dh lies behind dy, and A below the weights."""
    shapes, ranks = [(40, 64), (24, 64)], 2 * rank
    weights = [nf4.Nf4Weight(*random_weight(s, True, device), s, dtype) for s in shapes]
    *dys, dh = random(9, 64 + ranks, requires_grad=False).split([40, 24, ranks], 1)
    x = random(9, 64, requires_grad=False)
    a, drop = random(ranks, 64, requires_grad=False), (0.0, 0)
    ab = [(a[i * rank : (i + 1) * rank], random(o, rank)) for i, (o, _) in enumerate(shapes)]
    found, products = [], []
    for group in (weights, [w.__call__ for w in weights]):
        group = [Projection(w, *(pair if rank else ())) for w, pair in zip(group, ab, strict=True)]
        with torch.no_grad():
            if rank:
                dx = lora_linear_module.input_gradient(dys, dh, a, group, drop)
                ys = lora_linear_module.project_apart(x, group, a, drop)
            else:
                dx = lora_linear_module.input_gradient(dys, None, None, group, drop)
                ys = lora_linear_module.project_bases(x, group)
        found.append([dx, *ys])
        products.append(len(through_base))
        through_base.clear()
    assert products == [0 if rank else 1, 2]
    for one, other in zip(*found, strict=True):
        agree(one, other.double(), dtype)


@pytest.mark.parametrize("tokens", [100, 200], ids=["whole", "slices"])
@pytest.mark.parametrize("rank", [0, 4])
def test_an_mlp_in_4_bits_has_one_product_of_gate_and_up(
    agree, random, through_base, device, dtype, rank, tokens
):
    """And one of down, in each slice of 128 tokens; where the kernel takes dh A in, that alone.

    Without slices, its product of down goes elsewhere and is not counted.
    """
    hidden, width = 64, 128
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    weights = []
    for shape in shapes:
        packed, code, scales = random_weight(shape, False, device)
        weights.append(nf4.Nf4Weight(packed, 0.2 * code, scales, shape, dtype))
    ab = [
        [0.2 * random(*size, kind=torch.float32) for size in ((rank, i), (o, rank))] if rank else []
        for o, i in shapes
    ]
    x, found, products = random(tokens, hidden), [], []
    upstream = random(tokens, hidden, requires_grad=False)
    for group in (weights, [w.__call__ for w in weights]):
        group = [Projection(w, *pair) for w, pair in zip(group, ab, strict=True)]
        y = lora_mlp(x, *group, slice_bytes=1 << 16 if tokens > 128 else 1 << 30)
        found.append([y, *torch.autograd.grad(y, x, upstream)])
        products.append(len(through_base))
        through_base.clear()
    slices, joint = (2 if tokens > 128 else 1), bool(rank) and gated_lora.takes(x)
    inner, down = (0 if joint else 1), int(slices > 1 or not joint)
    assert products == [slices * (inner + down), slices * (2 + down)]
    for one, other in zip(*found, strict=True):
        agree(one, other.double(), dtype)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(24, 128), (300, 64)], ids=str)
def test_equals_bitsandbytes(device, dtype, shape, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape).to(device, dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    due = functional.dequantize_4bit(packed, state)
    found = nf4.dequantize(packed, state.code, nf4.Scales.of(state), shape, dtype)
    torch.testing.assert_close(found, due, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if dtype != torch.float32:  # there a scale's last bit shows
        assert (found == due).float().mean() > 0.99


def test_bytes_may_be_stored_as_another_type(device):
    """As FSDP wants them, which shards by the type of the rest."""
    packed, code, scales = random_weight((70, 128), True, device)
    found = nf4.dequantize(
        packed.view(-1, 2).view(torch.bfloat16), code, scales, (70, 128), torch.float32
    )
    due = nf4.dequantize(packed, code, scales, (70, 128), torch.float32)
    assert torch.equal(found, due)


def test_a_projection_multiplies_by_it(check_gradients, random, device, dtype):
    packed, code, scales = random_weight((64, 24), True, device)
    dense = nf4.reference(packed, code, scales, (64, 24), dtype)

    def made():
        return nf4.dequantize(packed, code, scales, (64, 24), dtype)

    check_gradients(
        lambda x, a, b: lora_linear(x, Projection(made, a, b))[0],
        lambda x, a, b: x @ dense.to(x.dtype).t() + x @ a.t() @ b.t(),
        [random(9, 24), random(3, 24), random(64, 3)],
    )

"""One pass over dy gives the same dh and dB as two products."""

import importlib.util

import pytest
import torch

from regrow.kernels import backend, rank_gradients
from tests.kernels.conftest import CUDA

# (tokens, outputs, rank): less than a tile; a rank that is padded; several strips and runs with
# an end that is not full; a rank beyond one of the cores' tiles.
SHAPES = [(3, 7, 1), (70, 33, 3), (200, 600, 16), (130, 72, 20)]


def matrices(tokens, outputs, rank, device, dtype):
    """dy, h, b and room for dh, all columns of wider matrices."""

    def part(rows, columns):
        return torch.randn(rows, columns + 5).to(device, dtype)[:, 2 : columns + 2]

    room = torch.full((tokens, rank + 5), 3.0, device=device, dtype=dtype)
    return part(tokens, outputs), part(tokens, rank), part(outputs, rank), room[:, 2 : rank + 2]


def equals_the_formula(agree, dy, h, b, dh):
    outside = dh.as_strided((len(dh), 2), (dh.stride(0), 1), 0)
    db = rank_gradients.one_pass(dy, h, b, 1.5, dh)
    exact = torch.float64 if dy.dtype == torch.float64 else torch.float32
    assert db.dtype == exact
    agree(dh, 1.5 * dy.double() @ b.double(), dy.dtype)
    agree(db, 1.5 * dy.double().t() @ h.double(), torch.float32)
    assert (outside == 3).all()  # its neighbours are another projection's


@pytest.fixture(autouse=True)
def every_width(monkeypatch):
    """On a GPU the kernels take narrow matrices too."""
    monkeypatch.setattr(rank_gradients, "_LEAST_COLUMNS", 1)


@pytest.mark.skipif(backend.INTERPRETING, reason="compiles")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("tile", rank_gradients._TILES, ids=str)
def test_every_tile_fits_where_it_is_taken(tile, monkeypatch, tmp_path):
    """By the bytes that the compiler asks for, for an H100; it needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, (rows, columns, warps, stages) = rank_gradients._both_kernel, tile
    sizes = {"RANK": 16, "PADDED": 16, "ROWS": rows, "COLUMNS": columns}
    kinds = dict.fromkeys(("dy", "h", "b"), "*bf16") | dict.fromkeys(sizes, "constexpr")
    kinds |= dict.fromkeys(("dh_parts", "db_parts"), "*fp32")
    source = ASTSource(
        kernel,
        {name: kinds.get(name, "i32") for name in kernel.arg_names},
        {(place,): sizes[name] for place, name in enumerate(kernel.arg_names) if name in sizes},
        {(n,): [["tt.divisibility", 16]] for n, x in enumerate(kernel.arg_names) if x not in sizes},
    )
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared == rank_gradients._memory(tile, 16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(agree, device, dtype, shape):
    equals_the_formula(agree, *matrices(*shape, device, dtype))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("tile", rank_gradients._TILES, ids=str)
def test_equals_the_formula_with_every_tile(agree, device, dtype, monkeypatch, tile):
    monkeypatch.setattr(rank_gradients, "_TILES", (tile,))
    rank_gradients._division.cache_clear()
    if rank_gradients._memory(tile, 16) > rank_gradients._room(torch.device(device, 0)):
        pytest.skip("this card has less memory for a program")
    equals_the_formula(agree, *matrices(300, 600, 16, device, dtype))
    rank_gradients._division.cache_clear()


def test_rows_may_be_one_row(agree, device, dtype):
    """As the gradient of a sum over tokens is. (Without a GPU see test_interpreted.)"""
    dy, *rest = matrices(70, 33, 3, device, dtype)
    equals_the_formula(agree, dy[:1].expand(70, -1), *rest)


def test_rows_with_gaps_are_two_products(agree, device, dtype):
    dy, *rest = matrices(70, 33, 3, device, dtype)
    equals_the_formula(agree, dy.t().contiguous().t(), *rest)


@pytest.mark.parametrize("device", [CUDA])
def test_is_the_same_every_time(device, dtype):
    inputs = matrices(200, 600, 16, device, dtype)
    first = rank_gradients.one_pass(*inputs[:3], 1.5, inputs[3]), inputs[3].clone()
    again = rank_gradients.one_pass(*inputs[:3], 1.5, inputs[3]), inputs[3]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

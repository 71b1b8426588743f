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
    db = rank_gradients.one_pass(dy, h, b, 1.5, dh, [dy.shape[1]])
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
    rows, columns, warps, stages = tile
    sizes = {"RANK": 16, "PADDED": 16, "ROWS": rows, "COLUMNS": columns}
    options = {"num_warps": warps, "num_stages": stages}
    made = compiled(rank_gradients._both_kernel, sizes, options, monkeypatch, tmp_path)
    assert made.metadata.shared == rank_gradients._memory(tile, 16)


@pytest.mark.skipif(backend.INTERPRETING, reason="compiles")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_sums_of_one_strip_compile(monkeypatch, tmp_path):
    """Triton takes a number that is 1 for a constant."""
    sizes = {"PROJECTIONS": 1, "RANK": 16, "PARTS": 16, "BLOCK": 256}
    sizes |= dict.fromkeys(("strips", "second", "third"), 1)
    compiled(rank_gradients._sum_both_kernel, sizes, {}, monkeypatch, tmp_path)


def compiled(kernel, sizes, options, monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = dict.fromkeys(("dy", "h", "b", "dh"), "*bf16") | dict.fromkeys(sizes, "constexpr")
    kinds |= dict.fromkeys(("dh_parts", "db_parts", "db"), "*fp32") | {"scale": "fp32"}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: kinds.get(name, "i32") for name in names},
        {(place,): sizes[name] for place, name in enumerate(names) if name in sizes},
        {
            (n,): [["tt.divisibility", 16]]
            for n, x in enumerate(names)
            if x not in (*sizes, "scale")
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


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
    width = [600]
    first = rank_gradients.one_pass(*inputs[:3], 1.5, inputs[3], width), inputs[3].clone()
    again = rank_gradients.one_pass(*inputs[:3], 1.5, inputs[3], width), inputs[3]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# Widths of projections: both ends at a tile's; the last one not full; more than the kernel takes;
# ends inside of tiles, which are products.
WIDTHS = [(512, 256, 256), (512, 300), (256, 256, 256, 100), (200, 300)]


def several_equal_the_formula(agree, widths, rank, device, dtype, tokens=200):
    dy, *_ = matrices(tokens, sum(widths), rank, device, dtype)
    _, h, _, dh = matrices(tokens, 1, rank * len(widths), device, dtype)
    b = torch.randn(sum(widths), rank).to(device, dtype)
    outside = dh.as_strided((len(dh), 2), (dh.stride(0), 1), 0)
    dbs = rank_gradients.one_pass(dy, h, b, 1.5, dh, widths).split(widths)
    parts = dy.split(widths, 1), h.split(rank, 1), b.split(widths), dh.split(rank, 1)
    for dy, h, b, dh, db in zip(*parts, dbs, strict=True):
        agree(dh, 1.5 * dy.double() @ b.double(), dy.dtype)
        agree(db, 1.5 * dy.double().t() @ h.double(), torch.float32)
    assert (outside == 3).all()


@pytest.mark.parametrize("rank", [16, 5])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_several_projections_equal_the_formula(agree, device, dtype, widths, rank):
    several_equal_the_formula(agree, widths, rank, device, dtype)

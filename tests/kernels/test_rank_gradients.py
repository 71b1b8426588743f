"""One pass over dy gives the same dh and dB as two products."""

import pytest
import torch

from regrow.kernels import rank_gradients

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


@pytest.mark.parametrize("tile", rank_gradients._TILES, ids=str)
def test_every_tile_fits_where_it_is_taken(tile):
    """By the bytes that the compiler of Triton 3.7 asks for, for an H100 and r = 16."""
    found = {(128, 256, 8, 3): 225_280, (64, 256, 4, 3): 116_736, (64, 128, 4, 3): 63_488}
    assert rank_gradients._memory(tile, 16) == found[tile]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(agree, device, dtype, shape):
    equals_the_formula(agree, *matrices(*shape, device, dtype))


@pytest.mark.parametrize("tile", rank_gradients._TILES, ids=str)
def test_equals_the_formula_with_every_tile(agree, device, dtype, monkeypatch, tile):
    monkeypatch.setattr(rank_gradients, "_TILES", (tile,))
    rank_gradients._division.cache_clear()
    if device == "cuda" and rank_gradients._memory(tile, 16) > rank_gradients._room(
        torch.device("cuda", 0)
    ):
        pytest.skip("this card has less memory for a program")
    equals_the_formula(agree, *matrices(300, 600, 16, device, dtype))
    rank_gradients._division.cache_clear()


def test_rows_may_be_one_row(agree, device, dtype):
    """As the gradient of a sum over tokens is."""
    dy, *rest = matrices(70, 33, 3, device, dtype)
    equals_the_formula(agree, dy[:1].expand(70, -1), *rest)


def test_rows_with_gaps_are_two_products(agree, device, dtype):
    dy, *rest = matrices(70, 33, 3, device, dtype)
    equals_the_formula(agree, dy.t().contiguous().t(), *rest)


def test_is_the_same_every_time(device, dtype):
    inputs = matrices(200, 600, 16, device, dtype)
    first = rank_gradients.one_pass(*inputs[:3], 1.5, inputs[3]), inputs[3].clone()
    again = rank_gradients.one_pass(*inputs[:3], 1.5, inputs[3]), inputs[3]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

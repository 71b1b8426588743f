"""Rows that are taken are those asked for, and their gradients lie where they lay."""

import pytest
import torch

from regrow.kernels.taken_rows import reference, taken_rows

ROWS = {
    "some": [0, 2, 3, 7, 12],
    "in any order": [5, 0, 12],
    "one": [12],
    "none": [],
    "all": list(range(13)),
}


@pytest.mark.parametrize("name", ROWS)
def test_equals_its_reference(device, check_gradients, random, name):
    rows_n = torch.tensor(ROWS[name], dtype=torch.int64, device=device)
    check_gradients(
        lambda x: taken_rows(x, rows_n),
        lambda x: reference(x, rows_n),
        [random(1, 13, 10)],
    )


def test_rows_may_lie_apart(device, check_gradients, random):
    rows_n = torch.tensor([1, 4], device=device)
    check_gradients(
        lambda x: taken_rows(x.transpose(1, 2), rows_n),
        lambda x: reference(x.transpose(1, 2), rows_n),
        [random(1, 6, 5)],
    )


def test_gradients_are_copied_not_added(device):
    torch.use_deterministic_algorithms(False)  # which would index in another way on a GPU
    x = torch.randn(1, 6, 4, device=device, requires_grad=True)
    y = taken_rows(x, torch.tensor([1, 4], device=device))
    with torch.profiler.profile() as profile:
        y.backward(torch.randn_like(y))
    names = {event.name for event in profile.events() or ()}
    assert "aten::index_copy_" in names
    assert not {"aten::index_add_", "aten::scatter_add_", "aten::index_put_"} & names


def test_several_matrices_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        taken_rows(torch.zeros(2, 3, 4), torch.tensor([0]))

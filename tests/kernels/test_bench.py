"""The bench measures nothing that is wrong, and its cases fit their references."""

import pytest
import torch

from regrow.kernels.bench.cases import Case, all_cases
from regrow.kernels.bench.run import largest_error, measure


def test_red_op_prints_no_times(capsys, tmp_path):
    out = tmp_path / "lines.jsonl"

    def inputs(small):
        assert small, "nothing but the check may run"
        return [torch.randn(4, requires_grad=True)]

    wrong = Case("an op", "4", inputs, lambda x: x * 2, {"regrow": lambda x: x * 2.1})
    assert not measure(wrong, out)
    said = capsys.readouterr()
    assert said.out == ""
    assert "RED an op" in said.err
    assert not out.exists()


def test_nan_is_red(capsys):
    def inputs(small):
        return [torch.randn(4, requires_grad=True)]

    case = Case("an op", "4", inputs, lambda x: x * 2, {"regrow": lambda x: x * float("nan")})
    assert not measure(case, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("index", range(13))
def test_cases_are_green(index):
    assert largest_error(all_cases()[index]) < 1.5e-2

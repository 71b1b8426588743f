"""What all kernel tests share: the devices, memory full of NaN, and one tolerance per dtype."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

# Relative error in norm against float64. float32: sums in another order. bfloat16 (8 bits of
# mantissa) and float16 (11 bits): inputs are exact, what lies between is rounded a few times.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    return request.param


@pytest.fixture(params=list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """torch.empty is filled with NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def within(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """`actual` has the shape of `expected` (float64) and is as near as `dtype` allows."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm()
    assert difference <= TOLERANCE[dtype] * expected.double().norm().clamp(min=1e-6), (
        f"relative error {(difference / expected.double().norm()).item():.2e}"
    )


@pytest.fixture(name="agree")
def agree_fixture():
    """agree(actual, expected, dtype) asserts that both are as near as the dtype allows."""
    return within


@pytest.fixture
def check_gradients(dtype):
    """check(op, reference, inputs): outputs and all gradients, under a random upstream gradient.

    The reference runs in float64 on the same numbers. Inputs that require a gradient must get one
    of their own dtype.
    """

    def check(op, reference, inputs: Iterable[Tensor]) -> None:
        mine = list(inputs)
        right = [x.detach().double().requires_grad_(x.requires_grad) for x in mine]
        outs, expected = as_list(op(*mine)), as_list(reference(*right))
        upstream = [torch.randn_like(out) for out in outs]
        wanted = [i for i, x in enumerate(mine) if x.requires_grad]
        got = torch.autograd.grad(outs, [mine[i] for i in wanted], upstream)
        due = torch.autograd.grad(
            expected, [right[i] for i in wanted], [u.double() for u in upstream]
        )
        for actual, exact in zip([*outs, *got], [*expected, *due], strict=True):
            within(actual, exact, dtype)
        for i, gradient in zip(wanted, got, strict=True):
            assert gradient.dtype == mine[i].dtype

    return check


def as_list(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@pytest.fixture
def random(device, dtype):
    """random(*shape): a leaf that requires a gradient."""

    def make(*shape, requires_grad=True, kind=None) -> Tensor:
        return torch.randn(shape).to(device, kind or dtype).requires_grad_(requires_grad)

    return make

"""Triton where it can run, plain PyTorch elsewhere: chosen by the tensors, and said once.

Every op file imports `jit` and `tl` from here, so that it loads on machines without Triton. A
kernel's host function is registered as a custom op, which is how torch.compile and
torch.export see one opaque call with known output shapes instead of tracing into a launch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch bring no Triton
    triton: Any = None
    tl: Any = None

logger = logging.getLogger(__name__)

_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 goes to the reference


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the bare function (never called) where Triton is not installed."""
    return function if triton is None else triton.jit(function)


# Under TRITON_INTERPRET=1 kernels run as Python on CPU tensors (tests). Read once, as `jit` does.
INTERPRETING = triton is not None and bool(triton.knobs.runtime.interpret)


def uses_triton(op: str, *tensors: Tensor) -> bool:
    """Whether `op` runs its Triton kernels on these tensors; logged once for each answer."""
    why = _why_not(*tensors)
    if not torch.compiler.is_compiling():
        _say_once(op, why)
    return not why


def _why_not(*tensors: Tensor) -> str:
    if any(not tensor.is_cuda for tensor in tensors) and not INTERPRETING:
        return "tensors are not on a CUDA device"
    if triton is None:
        return "Triton is not installed"
    if any(tensor.dtype not in _TYPES for tensor in tensors):
        return "no kernel for this dtype"
    return ""


@functools.lru_cache(maxsize=64)
def _say_once(op: str, why: str) -> None:
    logger.info("%s: %s", op, f"PyTorch ({why})" if why else "Triton")


def custom_op(
    name: str, schema: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `regrow::name`; eager code calls the plain function, without the dispatcher.

    Args:
        schema: the op's signature in PyTorch's schema language, "(Tensor x) -> Tensor".
        fake: the same signature; gives outputs of the right shape and dtype, without values.
        mutates: arguments that are written in place.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        register: Any = torch.library.custom_op
        registered = register(f"regrow::{name}", function, mutates_args=mutates, schema=schema)
        registered.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return registered(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return decorate


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n; Triton's block sizes are powers of two."""
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the card: how many programs a persistent grid needs."""
    if device.type != "cuda":
        return 2  # the interpreter runs programs one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count

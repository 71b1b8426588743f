"""One step of AdamW in one pass: clips the gradient, moves the weight, writes its 16-bit copy.

Mathematics (Loshchilov and Hutter 2017, arXiv 1711.05101), for a weight p with gradient g, at step
t (from 1 on), with clipping factor c (Pascanu et al. 2013, arXiv 1211.5063):
    g = c g        c = min(1, most / (norm of all gradients + 1e-6))
    m = b1 m + (1 - b1) g              v = b2 v + (1 - b2) g^2
    p = (1 - lr decay) p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
The factor is read on the device, so that the host need not know the norm.

Bytes of an element: 28 for float32 weights and gradients (p, g, m, v read; p, m, v written) and 2
for the copy. PyTorch's clipping reads and writes the gradient in a pass of its own (8 more), and a
copy made later reads the weight again (6 instead of 2): 10 bytes of 1.2e9 weights are 4 ms on an
H100, of a step of 230 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.kernels.backend import jit, tl, uses_triton

_BLOCK = 2048
_TINY = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


@dataclass(frozen=True)
class AdamWSettings:
    """The numbers of one step; `step` counts from 1 on."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    step: int

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root_correction(self) -> float:
        return (1 - self.beta2**self.step) ** 0.5


def clipping(gradients: Sequence[Tensor], most: float) -> tuple[Tensor, Tensor]:
    """(norm of all gradients together, clipping factor), float32 [] on their device.

    Args:
        most: the largest norm; 0 or less is no clipping.
    """
    norm = torch.linalg.vector_norm(norms(gradients))
    return norm, clipping_factor(norm, most)


def norms(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each gradient, float32 [number of them]."""
    each: Any = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(each(gradients, 2, dtype=torch.float32))


def clipping_factor(norm: Tensor, most: float) -> Tensor:
    """What gradients of that norm are multiplied by."""
    return (most / (norm + _TINY)).clamp(max=1.0) if most > 0 else torch.ones_like(norm)


# ---- reference ----


def reference(p: Tensor, g: Tensor, m: Tensor, v: Tensor, factor: Tensor, s: AdamWSettings) -> None:
    """By the formula, in place."""
    g = g.to(p.dtype) * factor
    p.mul_(1 - s.lr * s.decay)
    m.lerp_(g, 1 - s.beta1)
    v.mul_(s.beta2).addcmul_(g, g, value=1 - s.beta2)
    p.addcdiv_(m, v.sqrt().div_(s.root_correction).add_(s.eps), value=-s.step_size)


# ---- kernel ----


@jit
def _adamw_kernel(p, g, m, v, low, factor, elements, decay, rest1, beta2, rest2, eps, step_size,
                  correction, HAS_LOW: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """`rest1` and `rest2` are 1 - beta, taken in double: 1 - float32(0.999) errs by 5e-5."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = at < elements
    grad = tl.load(g + at, mask=seen, other=0.0).to(tl.float32) * tl.load(factor)
    mean = tl.load(m + at, mask=seen, other=0.0)
    square = tl.load(v + at, mask=seen, other=0.0)
    value = tl.load(p + at, mask=seen, other=0.0)
    value -= value * decay
    mean += (grad - mean) * rest1
    square = square * beta2 + grad * grad * rest2
    value -= step_size * (mean / (tl.sqrt(square) / correction + eps))
    tl.store(p + at, value, mask=seen)
    tl.store(m + at, mean, mask=seen)
    tl.store(v + at, square, mask=seen)
    if HAS_LOW:
        tl.store(low + at, value, mask=seen)


# ---- public ----


def adamw_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    factor: Tensor,
    settings: AdamWSettings,
    low: Tensor | None = None,
) -> None:
    """Moves p, m and v (float32, contiguous) in place; `low`, where given, becomes p rounded.

    Args:
        g: gradient, float32 or 16 bits.
        factor: float32 [] on the device, what the gradient is multiplied by.
    """
    dense = all(x.is_contiguous() for x in (p, m, v)) and (low is None or low.is_contiguous())
    if not dense or not uses_triton("adamw", p, g, m, v):
        reference(p, g, m, v, factor, settings)
        if low is not None:
            low.copy_(p)
        return
    s = settings
    if p.numel():
        _adamw_kernel[(-(-p.numel() // _BLOCK),)](
            p, g.contiguous(), m, v, p if low is None else low, factor, p.numel(),
            s.lr * s.decay, 1 - s.beta1, s.beta2, 1 - s.beta2, s.eps, s.step_size,
            s.root_correction, low is not None, _BLOCK,
        )  # fmt: skip

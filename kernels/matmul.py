"""Matrix products that keep their float32 sums instead of rounding them to 16 bits.

The tensor cores add in float32 whatever the factors are; cuBLAS can write those sums as they are
(`out_dtype`). Measured on an H100: no slower than writing bfloat16, but for the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def matmul(
    a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, *, add: bool = False, scale: float = 1.0
) -> Tensor:
    """out = scale a b, or out += scale a b; `out` may be float32 where a and b are 16-bit."""
    wide: dict[str, Any] = {}
    if a_NK.dtype != out_NM.dtype:
        if a_NK.is_cuda:
            wide = {"out_dtype": out_NM.dtype}
        else:
            a_NK, b_KM = a_NK.to(out_NM.dtype), b_KM.to(out_NM.dtype)
    if add or scale != 1.0:
        beta = 1.0 if add else 0.0
        return torch.addmm(out_NM, a_NK, b_KM, **wide, beta=beta, alpha=scale, out=out_NM)
    return torch.mm(a_NK, b_KM, **wide, out=out_NM)


def matmul_exact(a_NK: Tensor, b_KM: Tensor, *, scale: float = 1.0) -> Tensor:
    """scale a b in float32 (float64 stays float64)."""
    exact = torch.promote_types(a_NK.dtype, torch.float32)
    return matmul(a_NK, b_KM, a_NK.new_empty(len(a_NK), b_KM.shape[1], dtype=exact), scale=scale)

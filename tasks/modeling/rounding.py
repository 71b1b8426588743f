"""Brings float32 weights to bfloat16 without losing what training changed.

A trained weight is an old bfloat16 number plus a change that is often smaller than half the step to
the next bfloat16 number; rounding to the nearest takes it back to the old number, in most weights
at once. Stochastic rounding (Gupta et al. 2015, arXiv 1502.02551) goes up or down with the
probability that keeps the mean, so that the sum over many weights keeps the change.

Measured on SmolLM2-135M-Instruct (LoRA r=16 on all linear layers, 544 tokens of GSM8K; root mean
square of the logits' error after merging, as a share of what the adapter changes): after 30 steps
at 2e-4 11 % by nearest and 1.5 to 1.7 % stochastically, after 4 steps at 2e-5 83 % and 9 to 16 %.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

_DROPPED_BITS = 16  # float32 has 23 bits of mantissa, bfloat16 the upper 7 of them

_BLOCK = 2**20
"""Numbers rounded together: what is needed meanwhile is some 14 MiB, however large a weight
is. A multiple of 4, the numbers in a word of random bits."""


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring the model to `dtype`, in place; the same bytes each time.

    Parameters in float32 are rounded stochastically to bfloat16, with random bits that follow from
    the parameter's name; to other types, and buffers, as torch does.
    """
    if dtype == torch.bfloat16:
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32:
                parameter.data = round_stochastically(parameter.data, name)
    model.to(dtype)


def rounded(parameter: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """What `round_weights` makes of one parameter, or of a buffer among the weights."""
    if dtype == torch.bfloat16 and parameter.dtype == torch.float32:
        return round_stochastically(parameter, name)
    return parameter.to(dtype) if parameter.is_floating_point() else parameter


def round_stochastically(weight: Tensor, name: str) -> Tensor:
    """A finite float32 tensor as bfloat16. What bfloat16 can hold is not changed."""
    bits = weight.detach().cpu().contiguous().view(torch.int32).flatten()
    found = torch.empty(bits.shape, dtype=torch.bfloat16)
    random = _random_words(name)
    for part, place in zip(bits.split(_BLOCK), found.split(_BLOCK), strict=True):
        noise = torch.from_numpy(_random_bits(random, part.numel()))
        place.copy_(((part + noise) & -(1 << _DROPPED_BITS)).view(torch.float32))
    return found.view(weight.shape).to(weight.device)


def _random_words(name: str) -> np.random.Philox:
    """A stream of 64 random bits at a time. Numpy never changes it (NEP 19)."""
    return np.random.Philox(key=int.from_bytes(hashlib.sha256(name.encode()).digest()[:16]))


def _random_bits(words: np.random.Philox, count: int) -> np.ndarray:
    """The next `count` numbers of 16 random bits, int32."""
    found = words.random_raw(-(-count // 4))  # 4 times 16 bits in a word
    return found.astype("<u8").view("<u2")[:count].astype(np.int32)

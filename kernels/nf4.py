"""Dequantizes weights in 4 bits, with their scales in 8 bits, in one pass over memory.

Mathematics (Dettmers et al. 2023, arXiv 2305.14314, section 3; the layout is bitsandbytes'): the
weight's numbers in row order, in blocks of 64; a byte holds two, the first in its high half:
    w[i] = code[nibble i] * scale[i / 64]       code: 16 values between -1 and 1 (NF4)
With double quantization the scales are bytes too, in blocks of 256:
    scale[j] = code2[byte j] * scale2[j / 256] + offset
Products in float32, rounded once: what bitsandbytes' kernels give, but for the last bit of a scale,
whose product and sum the compiler may round as one.

bitsandbytes takes three kernels for it (scales, offset, weights). A step with nothing computed
again makes every weight twice: of 7 G weights, 17.5 GB of half-bytes and bfloat16 each time. Of
W2's step (kernels/bench/results-h100.md) 13.4 ms instead of 22; one weight of 14336 x 4096 takes
0.056 ms, where its bytes alone are 0.051 (H100, 2026-11-22).

Shape legend: O outputs, I inputs, N = O I, B scales of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from regrow.kernels.backend import custom_op, jit, tl, uses_triton

_WORD = 8  # weights in 32 bits
_BLOCK = 512  # words of a program: the best of five by 0 to 3 %


@dataclass(frozen=True)
class Scales:
    """Of blocks of `block` weights; with `code2` they are bytes, in blocks of `block2` scales."""

    values_B: Tensor
    block: int
    code2: Tensor | None = None  # [256]
    scale2: Tensor | None = None
    offset: Tensor | None = None  # one number
    block2: int = 1

    @classmethod
    def of(cls, state: Any) -> Scales:
        """Those in bitsandbytes' state of a weight."""
        if not state.nested:
            return cls(state.absmax, state.blocksize)
        more = state.state2
        return cls(
            state.absmax, state.blocksize, more.code, more.absmax, state.offset, more.blocksize
        )


@dataclass(frozen=True)
class Nf4Weight:
    """A frozen weight [O, I] in 4 bits, which makes the dense matrix each time it is called."""

    holder: Tensor  # of the half-bytes: its data are other ones where FSDP2 has gathered it again
    code: Tensor
    scales: Scales
    shape: tuple[int, int]
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        return dequantize(self.holder.data, self.code, self.scales, self.shape, self.dtype)


# ---- reference ----


def reference(
    packed: Tensor, code: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight [O, I] by the formula."""
    values_B = scales.values_B
    if scales.code2 is not None:
        assert scales.scale2 is not None
        assert scales.offset is not None
        wide = scales.scale2.repeat_interleave(scales.block2)[: len(values_B)]
        values_B = scales.code2[values_B.long()] * wide + scales.offset
    bytes_ = packed.view(torch.uint8).reshape(-1)
    nibbles = torch.stack([bytes_ >> 4, bytes_ & 15], 1).reshape(-1)[: shape[0] * shape[1]]
    wide = values_B.repeat_interleave(scales.block)[: len(nibbles)]
    return (code[nibbles.long()] * wide).to(dtype).view(shape)


# ---- kernel ----


@jit
def _dequantize_kernel(
    packed,
    code,
    values,
    code2,
    scale2,
    offset,
    out,
    words,
    WORDS_OF_BLOCK: tl.constexpr,
    BLOCK2: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = word < words
    bits = tl.load(packed + word, mask=seen, other=0)
    block = word // WORDS_OF_BLOCK
    scale = tl.load(values + block, mask=seen, other=0)
    if NESTED:
        scale = tl.load(code2 + scale.to(tl.int32))
        wide = tl.load(scale2 + block // BLOCK2, mask=seen, other=0.0)
        scale = scale * wide + tl.load(offset)
    place = tl.arange(0, 8)
    nibble = (bits[:, None] >> ((place ^ 1) * 4)[None, :]) & 15  # the high half comes first
    value = tl.load(code + nibble) * scale[:, None]
    at = word[:, None] * 8 + place[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=seen[:, None])


# ---- host ----


def _fake_dequantize(
    packed, code, values, code2, scale2, offset, block, block2, rows, columns, dtype
):
    return packed.new_empty(rows, columns, dtype=dtype)


@custom_op(
    "dequantize_4bit",
    "(Tensor packed, Tensor code, Tensor values, Tensor? code2, Tensor? scale2, Tensor? offset,"
    " int block, int block2, int rows, int columns, ScalarType dtype) -> Tensor",
    _fake_dequantize,
)
def _dequantize(packed, code, values, code2, scale2, offset, block, block2, rows, columns, dtype):
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    scales = Scales(values, block, code2, scale2, offset, block2)
    _write(packed, code, scales, out)
    return out


def _write(packed: Tensor, code: Tensor, scales: Scales, out: Tensor) -> None:
    """The weight into contiguous `out` [O, I]."""
    words = out.numel() // _WORD
    nested = scales.code2 is not None
    more = (scales.code2, scales.scale2, scales.offset) if nested else (code,) * 3
    _dequantize_kernel[(-(-words // _BLOCK),)](
        packed.reshape(-1).view(torch.int32), code, scales.values_B, *more, out, words,
        scales.block // _WORD, scales.block2, nested, _BLOCK, num_warps=8,
    )  # fmt: skip


# ---- public ----


def takes(packed: Tensor, shape: tuple[int, ...], block: int) -> bool:
    """Whether the kernel runs on this weight."""
    return (
        len(shape) == 2
        and shape[0] * shape[1] % _WORD == 0
        and block % _WORD == 0
        and packed.storage_offset() * packed.element_size() % 4 == 0
        and packed.is_contiguous()
    )


def _runs(packed: Tensor, code: Tensor, scales: Scales, shape: tuple[int, int]) -> bool:
    return uses_triton("nf4", code) and takes(packed, shape, scales.block)


def dequantize(
    packed: Tensor, code: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight [O, I] in `dtype`.

    Args:
        packed: half-bytes in row order, of any dtype, contiguous.
        code: the 16 values, float32.
    """
    if not _runs(packed, code, scales, shape):
        return reference(packed, code, scales, shape, dtype)
    tensors = [scales.values_B, scales.code2, scales.scale2, scales.offset]
    return _dequantize(packed, code, *tensors, scales.block, scales.block2, *shape, dtype)


def dequantize_below(weights: Sequence[Nf4Weight], dtype: torch.dtype, room: int = 0) -> Tensor:
    """The weights [O, I], one under the other in one matrix [sum of O + room, I] in `dtype`."""
    first = weights[0]
    ends = list(accumulate(weight.shape[0] for weight in weights))
    joint = torch.empty(ends[-1] + room, first.shape[1], dtype=dtype, device=first.code.device)
    for weight, start, end in zip(weights, [0, *ends], ends, strict=False):
        given = weight.holder.data, weight.code, weight.scales
        if _runs(*given, weight.shape) and not torch.compiler.is_compiling():
            _write(*given, joint[start:end])
        else:
            joint[start:end] = dequantize(*given, weight.shape, dtype)
    return joint

"""Attention inside each example of a packed row, by the fastest backend this machine has.

Several examples lie one after the other in one row; no token sees another example's tokens.

Queries may be the last ones of their examples alone, where other processes have the others.

Shape legend: T tokens of all examples, S the same of keys (T where nothing is said), E examples,
N query heads, K key-value heads (N is a multiple of K; keys and values are not repeated), H head
size, L tokens of one example, M its keys.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regrow.kernels import cudnn_attention
from regrow.kernels.neighbours import Gap

logger = logging.getLogger(__name__)

_HALF_TYPES = (torch.bfloat16, torch.float16)  # all that the flash kernels take
_MAX_FLASH_HEAD = 256  # head sizes of FlashAttention 2 and 3 (their READMEs)
_FLASH_HEAD_MULTIPLE = 8  # torch's flash kernel refuses other head sizes
_MAX_FLASH_4_HEAD = 128  # of FlashAttention 4's backward pass (its README)


@dataclass(frozen=True)
class _Options:
    """What backends need beside queries, keys, values and where the queries' examples lie."""

    max_seqlen: int
    max_seqlen_k: int
    cu_seqlens_k: Tensor
    scale: float
    causal: bool
    sliding_window: int | None
    softcap: float | None
    behind: Gap | None

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) reach of a query in the flash kernels' words; -1 is unlimited."""
        left = -1 if self.sliding_window is None else self.sliding_window - 1
        return left, 0 if self.causal else -1


def packed_attention(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    behind: Gap | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v inside each example; returns [T, N, H] in the dtype of q.

    Args:
        cu_seqlens: int32 [E + 1], example e is tokens cu_seqlens[e] to cu_seqlens[e + 1].
        max_seqlen: length of the longest example, in tokens.
        sliding_window: a query sees this many tokens, itself included (needs `causal`).
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
        cu_seqlens_k, max_seqlen_k: the same of keys, where they are more than the queries: the
            queries are then the last ones of each example.
        behind: room that may be left behind each token's result; not every backend does.

    Raises:
        ValueError: when shapes or options do not fit together.
    """
    _check(q_TNH, k_SKH, v_SKH, causal, sliding_window, cu_seqlens_k is not None)
    capped = softcap is not None and softcap != 0.0
    attend = _backend(q_TNH.device.type, q_TNH.dtype, q_TNH.shape[-1], capped)
    options = _Options(
        max_seqlen,
        max_seqlen if max_seqlen_k is None else max_seqlen_k,
        cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
        scale,
        causal,
        sliding_window,
        softcap if capped else None,
        behind,
    )
    return attend(q_TNH, k_SKH, v_SKH, cu_seqlens, options)


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, sliding_window: int | None, more_keys: bool
) -> None:
    other_length = q.shape[0] != k.shape[0] and not more_keys
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or other_length:
        raise ValueError(
            "packed_attention takes q [T, N, H], k and v [T, K, H], not "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if sliding_window is not None and (sliding_window < 1 or not causal):
        raise ValueError(f"sliding_window={sliding_window} needs causal attention and >= 1 token")


_USED: set[str] = set()


def backends_used() -> list[str]:
    """Names of the backends that attended in this process so far."""
    return sorted(_USED)


Backend = Callable[[Tensor, Tensor, Tensor, Tensor, _Options], Tensor]


@lru_cache(maxsize=32)
def _backend(device: str, dtype: torch.dtype, head_size: int, softcap: bool) -> Backend:
    """The fastest backend that can do all of it; said once for each kind of call."""
    name, attend, why = _choose(device, dtype, head_size, softcap)
    if attend is not _cudnn:  # it says itself what it leaves to another
        _USED.add(name)
    place = f"{device} {str(dtype).removeprefix('torch.')}, head size {head_size}"
    logger.info("packed attention: %s on %s%s", name, place, f" ({why})" if why else "")
    if device == "cuda" and name == "per_example" and dtype in _HALF_TYPES:
        logger.warning("packed attention runs example by example here, which is slow: %s", why)
    return attend


def _choose(
    device: str, dtype: torch.dtype, head_size: int, softcap: bool
) -> tuple[str, Backend, str]:
    """(name, function, why nothing faster)."""
    if device != "cuda" or dtype not in _HALF_TYPES:
        return "per_example", _per_example, ""
    if head_size > _MAX_FLASH_HEAD or head_size % _FLASH_HEAD_MULTIPLE:
        return "per_example", _per_example, f"flash kernels take no head size {head_size}"
    capability = torch.cuda.get_device_capability()
    # FlashAttention 3 is Hopper's; 4 is Blackwell's, and has no backward pass with a soft cap.
    fits_4 = head_size <= _MAX_FLASH_4_HEAD and not softcap and capability >= (10, 0)
    if fits_4 and _is_distributed("flash-attn-4"):
        return "flash_attn_4", _flash_attn_4, ""
    if _is_installed("flash_attn_interface") and capability == (9, 0):
        return "flash_attn_3", _flash_attn_3, ""
    no_cudnn = "" if capability == (9, 0) and not softcap else "cuDNN's kernels are Hopper's"
    no_cudnn = no_cudnn or cudnn_attention.why_not(dtype, head_size)
    if not no_cudnn:
        return "cudnn", _cudnn, ""
    name, flash_2 = _flash_2()
    if name == "flash_attn_2":
        return name, flash_2, ""
    if softcap:
        return "per_example", _per_example, "a soft cap needs the flash-attn package"
    return name, flash_2, no_cudnn


def _flash_2() -> tuple[str, Backend]:
    """FlashAttention 2: its package, else the one inside torch."""
    if _is_installed("flash_attn") and _is_distributed("flash-attn"):
        return "flash_attn_2", _flash_attn_2
    return "torch_varlen", _torch_varlen


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _is_distributed(package: str) -> bool:
    """FlashAttention 2 and 4 install one module name; the packages' names tell them apart."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---- reference, and what runs where no flash kernel does (CPU; float32) ----


def _per_example(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cu_seqlens: Tensor, options: _Options
) -> Tensor:
    """One attention call an example. Reads cu_seqlens on the host: on CUDA that is a sync."""
    bounds, bounds_k = cu_seqlens.tolist(), options.cu_seqlens_k.tolist()
    assert bounds[0] == bounds_k[0] == 0, (bounds, bounds_k)
    assert bounds[-1] == q_TNH.shape[0], f"cu_seqlens ends at {bounds[-1]} of {q_TNH.shape[0]}"
    assert bounds_k[-1] == k_SKH.shape[0], f"{bounds_k[-1]} keys of {k_SKH.shape[0]}"
    one = _sdpa if options.softcap is None else _capped
    parts = [
        one(
            _heads_first(q_TNH, start, end),
            _heads_first(k_SKH, start_k, end_k),
            _heads_first(v_SKH, start_k, end_k),
            options,
        )
        for (start, end), (start_k, end_k) in zip(pairwise(bounds), pairwise(bounds_k), strict=True)
        if end > start
    ]
    return torch.cat([part_1NLH[0].transpose(0, 1) for part_1NLH in parts])


def _heads_first(x_TNH: Tensor, start: int, end: int) -> Tensor:
    """The L tokens of one example, as [1, N, L, H]."""
    return x_TNH[start:end].transpose(0, 1).unsqueeze(0)


def _sdpa(q_1NLH: Tensor, k_1KMH: Tensor, v_1KMH: Tensor, options: _Options) -> Tensor:
    mask_LM = _mask(q_1NLH, k_1KMH, options)
    return scaled_dot_product_attention(
        q_1NLH,
        k_1KMH,
        v_1KMH,
        attn_mask=mask_LM,
        is_causal=options.causal and mask_LM is None,
        scale=options.scale,
        enable_gqa=q_1NLH.shape[1] != k_1KMH.shape[1],
    )


def _mask(q_1NLH: Tensor, k_1KMH: Tensor, options: _Options) -> Tensor | None:
    """True where a query may look, the last query being the last key; None where being causal, or
    not, says it all."""
    queries, keys = q_1NLH.shape[2], k_1KMH.shape[2]
    window = options.sliding_window or keys
    if window >= keys and (queries == keys or not options.causal):
        return None
    position_L = torch.arange(keys - queries, keys, device=q_1NLH.device)
    distance_LM = position_L[:, None] - torch.arange(keys, device=q_1NLH.device)[None, :]
    return (distance_LM >= 0) & (distance_LM < window)


def _capped(q_1NLH: Tensor, k_1KMH: Tensor, v_1KMH: Tensor, options: _Options) -> Tensor:
    """The formula written out, with scores in float32; takes L * M memory a head."""
    assert options.softcap is not None
    groups = q_1NLH.shape[1] // k_1KMH.shape[1]
    k_1NMH = k_1KMH.repeat_interleave(groups, dim=1)
    v_1NMH = v_1KMH.repeat_interleave(groups, dim=1)
    scores_1NLM = (q_1NLH @ k_1NMH.transpose(2, 3)).float() * options.scale
    scores_1NLM = options.softcap * torch.tanh(scores_1NLM / options.softcap)
    mask_LM = _mask(q_1NLH, k_1KMH, options)
    if mask_LM is None and options.causal:
        length = q_1NLH.shape[2]
        mask_LM = torch.ones(length, length, dtype=torch.bool, device=q_1NLH.device).tril()
    if mask_LM is not None:
        scores_1NLM = scores_1NLM.masked_fill(~mask_LM, float("-inf"))
    return scores_1NLM.softmax(dim=-1).to(v_1NMH.dtype) @ v_1NMH


# ---- flash kernels: all examples in one launch ----


def _torch_varlen(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cu_seqlens: Tensor, options: _Options
) -> Tensor:
    """torch.nn.attention.varlen (FlashAttention 2 inside torch)."""
    from torch.nn.attention.varlen import varlen_attn

    extras: dict[str, Any] = _varlen_extras(q_TNH.shape[1] != k_SKH.shape[1])
    out_TNH = varlen_attn(
        q_TNH,
        k_SKH,
        v_SKH,
        cu_seqlens,
        options.cu_seqlens_k,
        options.max_seqlen,
        options.max_seqlen_k,
        scale=options.scale,
        window_size=options.window,
        **extras,
    )
    assert isinstance(out_TNH, Tensor)
    return out_TNH


@lru_cache(maxsize=2)
def _varlen_extras(grouped: bool) -> dict[str, bool]:
    """torch 2.13 wants grouped queries announced; 2.11 takes them and has no such argument."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if grouped and "enable_gqa" in known else {}


def _cudnn(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cu_seqlens: Tensor, options: _Options
) -> Tensor:
    """Causal attention of whole rows; FlashAttention 2 has the rest."""
    plain = options.causal and options.sliding_window is None
    whole = options.cu_seqlens_k is cu_seqlens
    longest, scale, behind = options.max_seqlen, options.scale, options.behind
    sizes = len(cu_seqlens) - 1, longest, scale
    here = plain and whole and not torch.compiler.is_compiling()
    room = 0 if behind is None else behind.columns
    if here and room and cudnn_attention.why_not_here(q_TNH, k_SKH, *sizes, room):
        room = 0
    if not here or cudnn_attention.why_not_here(q_TNH, k_SKH, *sizes, room):
        name, flash_2 = _flash_2()
        _USED.add(name)
        return flash_2(q_TNH, k_SKH, v_SKH, cu_seqlens, options)
    _USED.add("cudnn")
    given = q_TNH, k_SKH, v_SKH, cu_seqlens, longest, scale
    out_TNH = cudnn_attention.cudnn_attention(*given, room)
    if behind is not None and room:
        behind.is_behind(out_TNH)
    return out_TNH


def _flash_attn_2(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cu_seqlens: Tensor, options: _Options
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _call_flash(flash_attn_varlen_func, q_TNH, k_SKH, v_SKH, cu_seqlens, options)


def _flash_attn_3(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cu_seqlens: Tensor, options: _Options
) -> Tensor:
    from flash_attn_interface import (  # pyright: ignore[reportMissingImports]
        flash_attn_varlen_func,
    )

    return _call_flash(flash_attn_varlen_func, q_TNH, k_SKH, v_SKH, cu_seqlens, options)


def _flash_attn_4(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cu_seqlens: Tensor, options: _Options
) -> Tensor:
    """Its windows are None where those of 2 and 3 are -1, and its result is always a tuple."""
    from flash_attn.cute import (  # pyright: ignore[reportMissingImports]
        flash_attn_varlen_func,
    )

    window = tuple(None if reach < 0 else reach for reach in options.window)
    out = flash_attn_varlen_func(
        q_TNH,
        k_SKH,
        v_SKH,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=options.cu_seqlens_k,
        max_seqlen_q=options.max_seqlen,
        max_seqlen_k=options.max_seqlen_k,
        softmax_scale=options.scale,
        causal=options.causal,
        window_size=(None, None) if options.sliding_window is None else window,
    )
    return out[0]


def _call_flash(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    cu_seqlens: Tensor,
    options: _Options,
) -> Tensor:
    """FlashAttention 2 and 3 name these arguments alike; early builds of 3 return a tuple."""
    out = function(
        q_TNH,
        k_SKH,
        v_SKH,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=options.cu_seqlens_k,
        max_seqlen_q=options.max_seqlen,
        max_seqlen_k=options.max_seqlen_k,
        softmax_scale=options.scale,
        causal=options.causal,
        window_size=options.window,
        softcap=options.softcap or 0.0,
    )
    return out[0] if isinstance(out, tuple) else out

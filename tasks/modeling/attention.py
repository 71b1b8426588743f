"""Gives Transformers the packed attention under the name "regrow_packed".

It is for packed rows only: a call without `cu_seq_lens_q` (generation, padded batches, a key-value
cache) is an error, since the result would be wrong; load with attention="sdpa" for those.
Where a row lies on several processes, `context_parts` says so (`context_parallel`).

Shape legend: T tokens, N query heads, K key-value heads, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from regrow.kernels.neighbours import Gap
from regrow.kernels.packed_attention import packed_attention
from regrow.tasks.modeling.context_parallel import ContextParts

NAME = "regrow_packed"
"""What to give as `attn_implementation`."""

# Arguments of some models that change the result and that the packed kernels do not have:
# attention sinks (gpt-oss), learnt biases (T5-like), masked heads.
_REFUSED = ("s_aux", "position_bias", "head_mask", "cache")


def register() -> None:
    """Make "regrow_packed" known to Transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention_forward)
    AttentionMaskInterface.register(NAME, _no_mask)


def packed_attention_forward(
    module: nn.Module,
    query_1NTH: Tensor,
    key_1KTH: Tensor,
    value_1KTH: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: Tensor | None = None,
    context_parts: ContextParts | None = None,
    behind: Gap | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function Transformers calls in each layer; returns ([1, T, N, H], None).

    `behind` is that of `packed_attention`, from a layer of ours.

    Raises:
        ValueError: for a call that packed attention cannot serve exactly.
    """
    if cu_seq_lens_q is None or max_length_q is None or query_1NTH.shape[2] != key_1KTH.shape[2]:
        raise ValueError(
            f"attention {NAME!r} serves packed rows only and got no cu_seq_lens_q / max_length_q "
            'of the whole row; load the model with attention="sdpa" to generate or to use padding'
        )
    if attention_mask is not None and not _says_nothing(attention_mask):
        raise ValueError(f"attention {NAME!r} takes no attention_mask; cu_seq_lens_q replaces it")
    _check_other_arguments(dropout, kwargs)
    query, key, value = _in_autocast_dtype(query_1NTH, key_1KTH, value_1KTH)
    # Not x[0], whose gradient is a tensor of zeros that the gradient is copied into.
    q_TNH, k_TKH, v_TKH = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
        "sliding_window": sliding_window,
        "softcap": softcap,
    }
    if context_parts is not None:
        assert cu_seq_lens_k is not None
        out_TNH = context_parts.attend(q_TNH, k_TKH, v_TKH, cu_seq_lens_q, cu_seq_lens_k, **options)
    else:
        options["behind"] = behind
        out_TNH = packed_attention(q_TNH, k_TKH, v_TKH, cu_seq_lens_q, max_length_q, **options)
    return out_TNH.unsqueeze(0), None


def skip_mask(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook, with keywords, of the outermost model: packed rows come with a mask made.

    Transformers hands on a mask of four dimensions as it is. Without one it asks the device whether
    `position_ids` restart, and the host waits for all that was launched before. Only for models
    that lay no mask of their own over the causal one: nobody would notice (`_no_mask`).
    """
    if kwargs.get("cu_seq_lens_q") is not None and kwargs.get("attention_mask") is None:
        nothing = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=kwargs["cu_seq_lens_q"].device)
        kwargs = kwargs | {"attention_mask": nothing}
    return args, kwargs


def _says_nothing(attention_mask: Tensor) -> bool:
    """Whether it is that of `skip_mask`."""
    return attention_mask.ndim == 4 and not attention_mask.numel()


def _check_other_arguments(dropout: float, given: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"the model asks for attention dropout {dropout}, which {NAME!r} does not have; "
            "set it to 0 in the model's config.json"
        )
    for name in _REFUSED:
        if given.get(name) is not None:
            raise ValueError(f"attention {NAME!r} has no {name!r}, which this model needs")


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Rotary embeddings in float32 leave q and k in float32 under autocast; flash kernels would
    refuse them, and v would differ."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(tensor.to(dtype) for tensor in tensors)
    return tensors


def _no_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> None:
    """The mask function: packed attention needs none, and refuses what a mask alone could say.

    `use_vmap` is set by Transformers when a model overlays a rule of its own on the causal mask.
    """
    if attention_mask is not None:
        raise ValueError(f"attention {NAME!r} takes no attention_mask; use packed rows")
    if use_vmap:
        raise ValueError(f"this model lays a mask of its own over the causal one; {NAME!r} cannot")

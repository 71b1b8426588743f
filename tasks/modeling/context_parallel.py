"""Attention over a row whose tokens lie on several processes: context parallelism.

Each process has the queries of its slice of the row (`context_slices`); keys and values are
gathered over the group, and their gradients summed and sent back. Positions are the row's own and
examples stay apart, so that the result is that of one process.

Shape legend: T tokens of a slice, R of the row, N query heads, K key-value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from regrow.kernels.packed_attention import packed_attention
from regrow.tasks.modeling.context_slices import CONTEXT_PARTS
from regrow.tasks.stage import StageError

# Rotary embeddings that turn by the longest position they are given, which differs by slice.
_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share each row: neighbours in rank."""

    group: ProcessGroup
    rank: int
    """Of this process among them."""
    size: int

    @classmethod
    def of(cls, size: int) -> ContextGroup:
        """This process's group; every process of the training must call it.

        Raises:
            StageError: when the processes do not divide into such groups.
        """
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        check_divides(world, size)
        group, _ = torch.distributed.new_subgroups(group_size=size)
        assert isinstance(group, ProcessGroup)
        return cls(group, torch.distributed.get_rank(group), size)

    def attach(self, model: nn.Module) -> None:
        """Let the attention of the outermost model know of it: a forward pre-hook, for good.

        Raises:
            StageError: for a model whose rows cannot be cut.
        """
        config: Any = model.config
        check_can_be_cut(config)
        model.register_forward_pre_hook(self._bind, with_kwargs=True)

    def _bind(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        parts = kwargs.get(CONTEXT_PARTS)
        if parts is None:
            return args, kwargs
        return args, kwargs | {CONTEXT_PARTS: ContextParts(self, parts)}


def check_divides(processes: int, size: int) -> None:
    """Raises StageError when so many processes are no groups of that size."""
    if processes % size:
        raise StageError(
            f"context_parallel_size: {processes} training processes in all are no groups of {size} "
            "that share a row; lower it, or change num_processes"
        )


def check_can_be_cut(config: Any) -> None:
    """Raises StageError for a model in which a slice of a row would not be computed as in it."""
    text = config.get_text_config()
    rope: Any = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    found = {kind.get("rope_type") for kind in kinds} & set(_BY_LENGTH)
    if found:
        raise StageError(
            f"context_parallel_size: this model's rotary embedding ({', '.join(sorted(found))}) "
            "depends on the row's length, which no process sees whole; remove it"
        )


@dataclass(frozen=True)
class ContextParts:
    """What attention needs to know of a slice: who has the rest, and how examples lie in it."""

    context: ContextGroup
    parts: Sequence[Sequence[int]]
    """As `context_slices.CONTEXT_PARTS`."""

    def attend(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *,
        causal: bool,
        **options: Any,
    ) -> Tensor:
        """[T, N, H]: attention of the slice's queries to all keys of their examples.

        Args:
            cu_seqlens_q, cu_seqlens_k: of the two chunks, one after the other.
            options: of `packed_attention`.

        Raises:
            ValueError: for attention in both directions.
        """
        if not causal:
            raise ValueError("context_parallel_size: attention in both directions cannot be cut")
        kv_RJKH: Any = _Gather.apply(torch.stack((k_TKH, v_TKH), dim=1), self.context)
        chunk = q_TNH.shape[0] // 2
        ends = list(accumulate(part[0] + 1 for part in self.parts))
        found = []
        for number, (segments, first, end, longest_q, longest_k) in enumerate(self.parts):
            here = slice(ends[number] - segments - 1, ends[number])
            keys = kv_RJKH[first:end]
            found.append(
                packed_attention(
                    q_TNH[number * chunk : (number + 1) * chunk],
                    keys[:, 0],
                    keys[:, 1],
                    cu_seqlens_q[here],
                    longest_q,
                    cu_seqlens_k=cu_seqlens_k[here],
                    max_seqlen_k=longest_k,
                    **options,
                )
            )
        return torch.cat(found)


class _Gather(torch.autograd.Function):
    """The row's tensor in its own order, out of all slices; backwards the sum of each slice's."""

    @staticmethod
    def forward(ctx: Any, slice_T: Tensor, context: ContextGroup) -> Tensor:
        ctx.context = context
        shape = (context.size * slice_T.shape[0], *slice_T.shape[1:])
        by_rank = slice_T.new_empty(shape)
        torch.distributed.all_gather_into_tensor(by_rank, slice_T.contiguous(), group=context.group)
        first, second = by_rank.unflatten(0, (context.size, 2, -1)).unbind(1)
        return torch.cat([first, second.flip(0)]).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        context: ContextGroup = ctx.context
        first, second = grads[0].unflatten(0, (2 * context.size, -1)).chunk(2)
        by_rank = torch.stack([first, second.flip(0)], dim=1).flatten(0, 2)
        mine = by_rank.new_empty((by_rank.shape[0] // context.size, *by_rank.shape[1:]))
        torch.distributed.reduce_scatter_tensor(mine, by_rank, group=context.group)
        return mine, None

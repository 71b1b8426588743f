"""Keeps saved activations in the host's memory, copied on a stream of their own.

Inside `OffloadSaved` every tensor with a line for each token that autograd saves goes to pinned
host memory while the forward pass goes on. In the backward pass each is fetched while the layer
after it is still being computed: the one asked for is there already, or on its way, and the one
before it sets out (double buffering). Around a model with gradient checkpointing these are the
inputs of its layers.

TRL's `OffloadActivations` does this too; it is no dependency of the worker, and keeps by age what
here is fetched by order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LEAST_BYTES = 1 << 20  # smaller ones cost more in launches than they free


@dataclass
class _Saved:
    """One tensor on the host, and on the device again once it is on its way."""

    host: Tensor
    device: torch.device
    back: Tensor | None = None
    arrived: Any = None
    done: bool = False


class OffloadSaved(torch.autograd.graph.saved_tensors_hooks):
    """A context around a forward pass; the backward pass comes after it.

    Args:
        tokens: of the batch; tensors [..., tokens, size] are offloaded.
        on_cpu: those of the CPU as well, by copying (for tests).
    """

    def __init__(self, tokens: int, on_cpu: bool = False) -> None:
        super().__init__(self._pack, self._unpack)
        self._tokens, self._on_cpu = tokens, on_cpu
        self._saved: list[_Saved] = []
        self._stream: Any = None

    @property
    def bytes(self) -> int:
        """Held by the host."""
        return sum(saved.host.nbytes for saved in self._saved)

    def _pack(self, tensor: Tensor) -> Any:
        rows = tensor.shape[-2] if tensor.dim() > 1 else 0
        if rows != self._tokens or not (tensor.is_cuda or self._on_cpu):
            return tensor
        if tensor.is_cuda and tensor.nbytes < _LEAST_BYTES:
            return tensor
        self._saved.append(_Saved(self._to_host(tensor), tensor.device))
        return len(self._saved) - 1

    def _to_host(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.detach().clone()
        self._stream = self._stream or torch.cuda.Stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is given out again after the copy
        return host

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        saved = self._saved[packed]
        found = self._fetched(saved)
        if saved.arrived is not None:
            current = torch.cuda.current_stream(saved.device)
            current.wait_event(saved.arrived)
            found.record_stream(current)
        saved.back, saved.done = None, True
        if packed and not self._saved[packed - 1].done:
            self._fetched(self._saved[packed - 1])
        return found

    def _fetched(self, saved: _Saved) -> Tensor:
        """The tensor on its device, perhaps still on its way."""
        if saved.back is None and saved.device.type != "cuda":
            saved.back = saved.host.clone()
        elif saved.back is None:
            with torch.cuda.stream(self._stream):
                saved.back = saved.host.to(saved.device, non_blocking=True)
                saved.arrived = self._stream.record_event()
        assert saved.back is not None
        return saved.back

"""Keeps saved activations in the host's memory, copied on a stream of their own.

Inside `OffloadSaved` every tensor with a line for each token that autograd saves goes to pinned
host memory while the forward pass goes on. In the backward pass each is fetched while the layer
after it is still being computed: the one asked for is there already, or on its way, and the one
before it sets out (double buffering). Around a model with gradient checkpointing these are the
inputs of its layers. The first of them may stay on the device, as far as it has room.

torch's pinned memory comes in powers of two: the 3.3 GB that Llama-3.1-8B keeps of a layer at
400,000 tokens would take 4.3. So a tensor lies in pieces of `PIECE_BYTES`.

TRL's `OffloadActivations` does this too; it is no dependency of the worker, and keeps by age what
here is fetched by order.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 64 << 20
"""Of pinned memory at a time: at most one piece of each tensor is not full."""
_MOST_LEAVING = 2  # tensors on their way to the host at a time
_LEAST_BYTES = 1 << 20  # smaller ones cost more in launches than they free


@dataclass
class _Saved:
    """One tensor on the host, and on the device again once it is on its way."""

    pieces: list[Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    back: Tensor | None = None
    arrived: Any = None
    done: bool = False


class OffloadSaved(torch.autograd.graph.saved_tensors_hooks):
    """A context around a forward pass; the backward pass comes after it.

    Args:
        tokens: of the batch; tensors [..., tokens, size] are offloaded.
        stays: bytes of the first such tensors, which stay where they are.
        on_cpu: those of the CPU as well, by copying (for tests).
    """

    def __init__(self, tokens: int, stays: float = 0, on_cpu: bool = False) -> None:
        super().__init__(self._pack, self._unpack)
        self._tokens, self._stays, self._on_cpu = tokens, stays, on_cpu
        self._saved: list[_Saved] = []
        self._leaving: deque[tuple[Any, Tensor]] = deque()

    @property
    def bytes(self) -> int:
        """Held by the host."""
        return sum(piece.nbytes for saved in self._saved for piece in saved.pieces)

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._let_go(0)

    def _pack(self, tensor: Tensor) -> Any:
        rows = tensor.shape[-2] if tensor.dim() > 1 else 0
        if rows != self._tokens or not (tensor.is_cuda or self._on_cpu):
            return tensor
        if tensor.is_cuda and tensor.nbytes < _LEAST_BYTES:
            return tensor
        if tensor.nbytes <= self._stays:
            self._stays -= tensor.nbytes
            return tensor
        pieces = self._to_host(tensor.detach().contiguous())
        self._saved.append(_Saved(pieces, tensor.shape, tensor.dtype, tensor.device))
        return len(self._saved) - 1

    def _to_host(self, tensor: Tensor) -> list[Tensor]:
        """The tensor's bytes in pieces; on CUDA they are still on their way."""
        parts = bytes_of(tensor).split(PIECE_BYTES)
        if not tensor.is_cuda:
            return [part.clone() for part in parts]
        # The host would run far ahead of the device, and every layer would wait for its copy there.
        self._let_go(_MOST_LEAVING - 1)
        pieces = [torch.empty(len(p), dtype=torch.uint8, pin_memory=True) for p in parts]
        stream = copy_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            for piece, part in zip(pieces, parts, strict=True):
                piece.copy_(part, non_blocking=True)
            self._leaving.append((stream.record_event(), tensor))
        return pieces

    def _let_go(self, most: int) -> None:
        """Give up tensors whose copies are made, waiting for those beyond so many."""
        while len(self._leaving) > most:
            event, _ = self._leaving.popleft()
            event.synchronize()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        saved = self._saved[packed]
        found = self._fetched(saved)
        if saved.arrived is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.arrived)
        saved.back, saved.done = None, True
        if packed and not self._saved[packed - 1].done:
            self._fetched(self._saved[packed - 1])
        return found

    def _fetched(self, saved: _Saved) -> Tensor:
        """The tensor on its device, perhaps still on its way.

        Its memory is the computing stream's: a copy begins when what was asked for before it is
        done, which is one layer ahead of its use.
        """
        if saved.back is None:
            saved.back = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
            parts = bytes_of(saved.back).split(PIECE_BYTES)
            with _copying(saved):
                for part, piece in zip(parts, saved.pieces, strict=True):
                    part.copy_(piece, non_blocking=True)
        return saved.back


@contextlib.contextmanager
def _copying(saved: _Saved) -> Iterator[None]:
    """On the stream for copies, where there is one; notes the event of their end."""
    if saved.device.type != "cuda":
        yield
        return
    stream = copy_stream(saved.device)
    stream.wait_stream(torch.cuda.current_stream(saved.device))
    with torch.cuda.stream(stream):
        yield
        saved.arrived = stream.record_event()
    assert saved.back is not None
    saved.back.record_stream(stream)  # should it be given up before it has arrived


@functools.cache
def copy_stream(device: torch.device) -> Any:
    """The one stream of a device that all copies take."""
    return torch.cuda.Stream(device)


def bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory: uint8 [bytes]."""
    return tensor.view(-1).view(torch.uint8)

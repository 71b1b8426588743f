"""Keeps saved activations in the host's memory, copied on a stream of their own.

Inside `OffloadSaved` every tensor with a line for each token that autograd saves goes to pinned
host memory while the forward pass goes on. In the backward pass each is fetched while the layer
after it is still being computed: the one asked for is there already, or on its way, and the one
before it sets out (double buffering). Around a model with gradient checkpointing these are the
inputs of its layers. The newest stay on the device as far as it has room, and one always does: the
backward pass asks for them first, so that it never begins with waiting.

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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 64 << 20
"""Of pinned memory at a time: at most one piece of each tensor is not full."""
_LEAST_BYTES = 1 << 20  # smaller ones cost more in launches than they free
_ON_THEIR_WAY = 2
"""Tensors on their way to the host whose memory is not yet given back: the device has a layer's
time for each copy before a layer waits for its memory."""
_AHEAD = 8
"""Tensors sent before the host waits for the first. As many layers it may be ahead of the device,
which has work while the host is slow; more would not find pinned memory of the step before free."""


@dataclass
class _Saved:
    """One tensor: on its device, on the host, and on the device again once it is on its way."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    here: Tensor | None
    made: Any
    """On CUDA: when it was there to be copied."""
    before: _Saved | None
    """What the backward pass asks for next."""
    pieces: list[Tensor] = field(default_factory=list)
    arrived: Any = None
    done: bool = False

    def __del__(self) -> None:
        """Given up while it is still on its way: what takes its memory next waits for the copy.

        `record_stream` would say so too, but for every tensor, and of each that was used its memory
        would wait for the copy after it: at 7.6 GiB torch ran out 1.5 times a step (QLoRA of
        Llama-3.1-8B's shape, H100, 2026-11-23).
        """
        if self.arrived is not None and not self.done:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)


class OffloadSaved(torch.autograd.graph.saved_tensors_hooks):
    """A context around a forward pass; the backward pass comes after it.

    Args:
        tokens: of the batch; tensors [..., tokens, size] are offloaded.
        stays: bytes of the newest such tensors, which stay where they are; one does in any case.
        on_cpu: those of the CPU as well, by copying (for tests).
    """

    def __init__(self, tokens: int, stays: float = 0, on_cpu: bool = False) -> None:
        # The hooks are another object's: what holds methods of its own lives on until Python
        # looks for garbage, and the pinned memory of every forward pass would with it (2 GiB a step
        # made anew at 1.3 GB/s: 1.7 s, Llama-3.1-8B's shape, 2 x 4096 tokens, H100, 2026-11-22).
        self._host = _Host(tokens, stays, on_cpu)
        super().__init__(self._host.pack, self._host.unpack)

    @property
    def bytes(self) -> int:
        """Held by the host."""
        return self._host.bytes

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._host.end()


class _Host:
    """What autograd has saved, as long as a graph needs it."""

    def __init__(self, tokens: int, stays: float, on_cpu: bool) -> None:
        self._tokens, self._stays, self._on_cpu = tokens, stays, on_cpu
        self._here: deque[_Saved] = deque()
        self._newest: _Saved | None = None
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._sent: deque[Any] = deque()
        self.bytes = 0
        """Held by the host when the forward pass has ended."""

    def end(self) -> None:
        """Of the forward pass: from now on the graph alone holds what it needs."""
        self._let_go(0)
        self._here.clear()
        self._newest = None

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps in the place of a tensor."""
        rows = tensor.shape[-2] if tensor.dim() > 1 else 0
        if rows != self._tokens or not (tensor.is_cuda or self._on_cpu):
            return tensor
        if tensor.is_cuda and tensor.nbytes < _LEAST_BYTES:
            return tensor
        here = tensor.detach().contiguous()
        made = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
        saved = _Saved(tensor.shape, tensor.dtype, tensor.device, here, made, self._newest)
        self._newest = saved
        self._here.append(saved)
        self._make_room()
        return saved

    def _make_room(self) -> None:
        """Send the oldest away, but never the newest."""
        held = sum(saved.here.nbytes for saved in self._here if saved.here is not None)
        while held > self._stays and len(self._here) > 1:
            oldest = self._here.popleft()
            assert oldest.here is not None
            held -= oldest.here.nbytes
            self._send(oldest, oldest.here)
            oldest.here = None

    def _send(self, saved: _Saved, tensor: Tensor) -> None:
        """The tensor's bytes to the host, in pieces; on CUDA they are still on their way."""
        parts = bytes_of(tensor).split(PIECE_BYTES)
        self.bytes += tensor.nbytes
        if not tensor.is_cuda:
            saved.pieces = [part.clone() for part in parts]
            return
        self._let_go(_ON_THEIR_WAY - 1)
        saved.pieces = [torch.empty(len(p), dtype=torch.uint8, pin_memory=True) for p in parts]
        stream = copy_stream(tensor.device)
        stream.wait_event(saved.made)
        with torch.cuda.stream(stream):
            for piece, part in zip(saved.pieces, parts, strict=True):
                piece.copy_(part, non_blocking=True)
            self._leaving.append((stream.record_event(), tensor))

    def _let_go(self, number: int) -> None:
        """Give up the tensors that are leaving, but for so many.

        What the device does from now on waits for their copies, as it may take their memory; the
        host goes on, but for `_AHEAD`.
        """
        while len(self._leaving) > number:
            copied, tensor = self._leaving.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(copied)
            self._sent.append(copied)
        while len(self._sent) > _AHEAD:
            self._sent.popleft().synchronize()

    def unpack(self, packed: Any) -> Tensor:
        """The tensor, on its device."""
        if isinstance(packed, Tensor):
            return packed
        assert isinstance(packed, _Saved)
        found = self._fetched(packed)
        if packed.arrived is not None:
            torch.cuda.current_stream(packed.device).wait_event(packed.arrived)
        if packed.pieces:  # else it is nowhere else
            packed.here = None
        packed.done = True
        if packed.before is not None and not packed.before.done:
            self._fetched(packed.before)
        return found

    def _fetched(self, saved: _Saved) -> Tensor:
        """The tensor on its device, perhaps still on its way.

        Its memory is the computing stream's: a copy begins when what was asked for before it is
        done, which is one layer ahead of its use.
        """
        if saved.here is None:
            saved.here = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
            parts = bytes_of(saved.here).split(PIECE_BYTES)
            with _copying(saved):
                for part, piece in zip(parts, saved.pieces, strict=True):
                    part.copy_(piece, non_blocking=True)
        return saved.here


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


@functools.cache
def copy_stream(device: torch.device) -> Any:
    """The one stream of a device that all copies take."""
    return torch.cuda.Stream(device)


def bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory: uint8 [bytes]."""
    return tensor.view(-1).view(torch.uint8)

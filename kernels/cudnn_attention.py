"""Causal attention inside packed examples by cuDNN's kernels for Hopper, where its package is.

Mathematics: softmax(scale q k^T) v inside each example, as in `packed_attention`. cuDNN takes
packed rows by offsets ("THD") and sums the gradients of keys and values over the query heads that
share them; PyTorch's FlashAttention 2 writes them for every query head and adds them up afterwards.

The package nvidia-cudnn-frontend (module `cudnn`) hands graphs to the libcudnn that PyTorch brings.
Forward and backward of 8192 tokens in chat-like documents, 32 and 8 heads of 128: 0.94 ms against
1.37 by FlashAttention 2; 16,384 tokens, heads of 64: 1.25 against 1.92 (tests/bench/
attention_backends.py, H100, 2026-11-22). PyTorch's own `_cudnn_attention_forward` takes no packed
rows in 2.11.

cuDNN plans for a number of examples and a longest one, which takes 0.1 s for each direction: half
a step. So a plan serves every row that fits into it, what is too much being examples without
tokens, and a new one is as large as all before it in both respects: a training makes a handful,
nearly all in its first steps. Sizes that cuDNN refuses are not asked for again; smaller ones are,
and get plans of their own. A row that cuDNN has no plan for, or that nobody has tried it on, is
for the backend after it: ask `why_not_here`.

Shape legend: T tokens, E examples, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

EXAMPLES, LONGEST = 64, 4096
"""What the first plan is made for (rows of fewer tokens: no longest one above theirs), and for an
example in each 128 tokens, as short as chats are; rounded up to 64 examples and 1024 tokens,
twice, four times ... that. What a plan has too much costs little: 0.937 ms of W1's attention by a
plan of 32 examples and 2048 tokens, 0.963 by 64 and 4096, 1.007 by 128 and 8192; of W3's 1.261,
1.271, 1.332 (H100, 2026-11-22). A new one costs half a step."""
TOKENS = 1024
"""All tokens of a row are rounded up to a multiple of it."""

_TOKENS_OF_EXAMPLE, _LEAST_LONGEST = 128, 1024  # see `EXAMPLES`
_SIZES_TRIED = (64, 128)  # of heads
_MOST_TOKENS = 65536  # of a row; 16,384 have been tried, and offsets are int32
_LEAST_VERSION = 90600  # of libcudnn: packed rows whose heads share keys (its frontend's checks)


@dataclass(frozen=True)
class _Sizes:
    """All that a plan depends on."""

    device: int
    dtype: torch.dtype
    examples: int
    longest: int
    tokens: int
    heads: int
    key_heads: int
    size: int
    scale: float
    room: int
    """Numbers behind each row of the result."""


class _Plan:
    """A built graph."""

    def __init__(self, graph: Any, tensors: dict[str, Any]) -> None:
        self._graph = graph
        self._ids = {name: tensor.get_uid() for name, tensor in tensors.items()}
        self._room: int = graph.get_workspace_size()

    def run(self, device: torch.device, values: dict[str, Tensor]) -> None:
        """Launch it on PyTorch's current stream."""
        import cudnn  # pyright: ignore[reportMissingImports]

        handle = _handle(device.index)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        workspace = torch.empty(self._room, dtype=torch.uint8, device=device)
        places = {self._ids[name]: value.data_ptr() for name, value in values.items()}
        self._graph.execute(places, workspace.data_ptr(), handle=handle)


@functools.lru_cache(maxsize=16)
def _handle(device: int) -> Any:
    import cudnn  # pyright: ignore[reportMissingImports]

    with torch.cuda.device(device):
        return cudnn.create_handle()


# ---- plans ----


class _Graph:
    """A graph in the making, for rows of one kind of sizes."""

    def __init__(self, sizes: _Sizes) -> None:
        import cudnn  # pyright: ignore[reportMissingImports]

        self.cudnn: Any = cudnn
        exact = cudnn.data_type.FLOAT
        self.kind, self.sizes = cudnn.data_type.BFLOAT16, sizes  # see `why_not`
        self.graph: Any = cudnn.pygraph(
            io_data_type=self.kind,
            intermediate_data_type=exact,
            compute_data_type=exact,
            handle=_handle(sizes.device),
        )
        self.tensors: dict[str, Any] = {
            name: self._whole_numbers(name, sizes.examples + extra)
            for name, extra in zip(_NAMES, (0, 1, 1, 1, 1), strict=True)
        }
        self.options = {
            "attn_scale": sizes.scale,
            "use_causal_mask": True,
            "use_padding_mask": True,
            "seq_len_q": self.tensors["lengths"],
            "seq_len_kv": self.tensors["lengths"],
        }

    def _whole_numbers(self, name: str, count: int) -> Any:
        kind = self.cudnn.data_type.INT32
        return self.graph.tensor(
            name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind
        )

    def layout(self, heads: int, room: int = 0) -> tuple[list[int], list[int]]:
        """(sizes, strides) of [T, heads, H] as cuDNN sees it: [examples, heads, longest, H]."""
        s = self.sizes
        row = heads * s.size + room
        return [s.examples, heads, s.longest, s.size], [s.longest * row, s.size, row, 1]

    def input(self, name: str, heads: int, offsets: str, room: int = 0) -> Any:
        """One of q, k, v, out and its gradient."""
        dim, stride = self.layout(heads, room)
        made = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=self.kind)
        made.set_ragged_offset(self.tensors[offsets])
        self.tensors[name] = made
        return made

    def output(self, name: str, made: Any, heads: int, offsets: str, room: int = 0) -> None:
        """The result and the gradients of q, k and v."""
        dim, stride = self.layout(heads, room)
        made.set_output(True).set_dim(dim).set_stride(stride).set_data_type(self.kind)
        made.set_ragged_offset(self.tensors[offsets])
        self.tensors[name] = made

    def stats_layout(self) -> tuple[list[int], list[int]]:
        """Of one float32 for each token and head: [T, N]."""
        s = self.sizes
        return [s.examples, s.heads, s.longest, 1], [s.longest * s.heads, 1, s.heads, 1]

    def built(self) -> _Plan:
        """The plan that cuDNN's heuristics like best."""
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A])
        self.graph.check_support()
        self.graph.build_plans()
        return _Plan(self.graph, self.tensors)


@functools.lru_cache(maxsize=512)
def _forward_plan(sizes: _Sizes) -> _Plan:
    made = _Graph(sizes)
    q = made.input("q", sizes.heads, "at_q")
    k, v = (made.input(name, sizes.key_heads, "at_k") for name in "kv")
    out, stats = made.graph.sdpa(
        name="attention", q=q, k=k, v=v, generate_stats=True, **made.options
    )
    made.output("out", out, sizes.heads, "at_out", sizes.room)
    dim, stride = made.stats_layout()
    stats.set_output(True).set_dim(dim).set_stride(stride)
    stats.set_data_type(made.cudnn.data_type.FLOAT)
    stats.set_ragged_offset(made.tensors["at_stats"])
    made.tensors["stats"] = stats
    return made.built()


@functools.lru_cache(maxsize=512)
def _backward_plan(sizes: _Sizes) -> _Plan:
    made = _Graph(sizes)
    q = made.input("q", sizes.heads, "at_q")
    k, v = (made.input(name, sizes.key_heads, "at_k") for name in "kv")
    out = made.input("out", sizes.heads, "at_out", sizes.room)
    dout = made.input("dout", sizes.heads, "at_q")
    dim, stride = made.stats_layout()
    exact = made.cudnn.data_type.FLOAT
    stats = made.graph.tensor(name="stats", dim=dim, stride=stride, data_type=exact)
    stats.set_ragged_offset(made.tensors["at_stats"])
    made.tensors["stats"] = stats
    most = {"max_total_seq_len_q": sizes.tokens, "max_total_seq_len_kv": sizes.tokens}
    dq, dk, dv = made.graph.sdpa_backward(
        name="attention", q=q, k=k, v=v, o=out, dO=dout, stats=stats, **most, **made.options
    )
    made.output("dq", dq, sizes.heads, "at_q")
    made.output("dk", dk, sizes.key_heads, "at_k")
    made.output("dv", dv, sizes.key_heads, "at_k")
    return made.built()


# ---- host ----


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _doubled(least: int, count: int) -> int:
    """least, twice that, four times ..., up to the first that is enough."""
    return least << max(0, (-(-count // least) - 1).bit_length())


_planned: dict[_Sizes, list[_Sizes]] = {}
"""{kind: the sizes whose plans cuDNN has made}. Sizes that it refused are not among them: they say
nothing about other sizes."""


def _kind(sizes: _Sizes) -> _Sizes:
    """What plans must have in common to serve the same rows."""
    return replace(sizes, examples=0, longest=0)


def _sizes(q: Tensor, k: Tensor, examples: int, longest: int, scale: float, room: int) -> _Sizes:
    """Those of the plan that serves such a row: the smallest that is large enough."""
    tokens, heads, size = q.shape
    like = heads, k.shape[1], size, scale, room
    return _sizes_of(q.device.index, q.dtype, tokens, examples, longest, like)


@functools.lru_cache(maxsize=64)  # every layer of a model asks for the same
def _sizes_of(
    device: int,
    dtype: torch.dtype,
    tokens: int,
    examples: int,
    longest: int,
    like: tuple[int, int, int, float, int],
) -> _Sizes:
    kind = _Sizes(device, dtype, 0, 0, _up(tokens, TOKENS), *like)
    there = _planned.get(kind, [])
    enough = [s for s in there if s.examples >= examples and s.longest >= longest]
    if enough:
        return min(enough, key=lambda s: s.examples * s.longest)
    usual = max(examples, tokens // _TOKENS_OF_EXAMPLE), max(longest, min(LONGEST, tokens))
    return replace(
        kind,
        examples=max([_doubled(EXAMPLES, usual[0]), *(s.examples for s in there)]),
        longest=max([_doubled(_LEAST_LONGEST, usual[1]), *(s.longest for s in there)]),
    )


def _places(cu_seqlens: Tensor, tokens: int, sizes: _Sizes) -> tuple[Tensor, ...]:
    """Lengths of the examples; where each begins in q, k, the statistics and the result."""
    extra = sizes.examples + 1 - len(cu_seqlens)
    bounds = torch.nn.functional.pad(cu_seqlens, (0, extra), value=tokens)
    row, key_row = sizes.heads * sizes.size, sizes.key_heads * sizes.size
    starts = (bounds * step for step in (row, key_row, sizes.heads, row + sizes.room))
    return bounds.diff(), *starts


_last: list[Any] = []
"""[weak reference to cu_seqlens, its version, tokens, sizes, places] of the last call."""


def _places_once(cu_seqlens: Tensor, tokens: int, sizes: _Sizes) -> tuple[Tensor, ...]:
    """The same, made once for all layers of a model."""
    if cu_seqlens.is_inference():  # it has no version
        return _places(cu_seqlens, tokens, sizes)
    seen = [cu_seqlens._version, tokens, sizes]
    if not _last or _last[0]() is not cu_seqlens or _last[1:4] != seen:
        _last[:] = [weakref.ref(cu_seqlens), *seen, _places(cu_seqlens, tokens, sizes)]
    return _last[4]


def _exactly(
    q: Tensor, k: Tensor, lengths: Tensor, longest: int, scale: float, room: int
) -> _Sizes:
    """The sizes that `_sizes` gave, from what the operations are given."""
    (tokens, heads, size), device = q.shape, q.device.index
    rounded = len(lengths), longest, _up(tokens, TOKENS)
    return _Sizes(device, q.dtype, *rounded, heads, k.shape[1], size, scale, room)


_NAMES = ("lengths", "at_q", "at_k", "at_stats", "at_out")
_INPUTS = "Tensor q, Tensor k, Tensor v"
_PLACES = ", ".join(f"Tensor {name}" for name in _NAMES)


def _with_room(like: Tensor, room: int) -> Tensor:
    """[T, N, H], with so many numbers behind each token's."""
    if not room:
        return torch.empty_like(like)  # no view, which nobody may change in place
    tokens, heads, size = like.shape
    wide = like.new_empty(tokens, heads * size + room)
    return wide.as_strided(like.shape, (wide.shape[1], size, 1))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, at_q: Tensor, at_k: Tensor,
    at_stats: Tensor, at_out: Tensor, longest: int, scale: float, room: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(result, its statistics [T, N]) of contiguous q, k and v."""
    out = _with_room(q, room)
    stats = q.new_empty(q.shape[:2], dtype=torch.float32)
    given = {"q": q, "k": k, "v": v, "out": out, "stats": stats}
    given |= dict(zip(_NAMES, (lengths, at_q, at_k, at_stats, at_out), strict=True))
    _forward_plan(_exactly(q, k, lengths, longest, scale, room)).run(q.device, given)
    return out, stats


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, lengths: Tensor,
    at_q: Tensor, at_k: Tensor, at_stats: Tensor, at_out: Tensor, longest: int, scale: float,
    room: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    sizes = _exactly(q, k, lengths, longest, scale, room)
    if out.stride(0) != q.stride(0) + room:  # it was elsewhere meanwhile
        out = _with_room(q, room).copy_(out)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    given = {"q": q, "k": k, "v": v, "out": out, "stats": stats, "dout": dout.contiguous()}
    given |= {"dq": dq, "dk": dk, "dv": dv}
    given |= dict(zip(_NAMES, (lengths, at_q, at_k, at_stats, at_out), strict=True))
    _backward_plan(sizes).run(q.device, given)
    return dq, dk, dv


# An operation of PyTorch's dispatcher, so that a policy of checkpoints sees attention and keeps it.
# `custom_op` would do more than is needed, and its Python takes longer than the launch.
_library = torch.library.Library("regrow", "FRAGMENT")
_library.define(
    f"cudnn_attention({_INPUTS}, {_PLACES}, int longest, float scale, int room) -> (Tensor, Tensor)"
)
_library.impl("cudnn_attention", _forward, "CompositeExplicitAutograd")


# ---- autograd ----


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, places, *settings):
        out, stats = torch.ops.regrow.cudnn_attention(q, k, v, *places, *settings)
        ctx.save_for_backward(q, k, v, out, stats, *places)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx, *grad_outputs):
        longest, scale, room = ctx.settings
        how: dict[str, Any] = {"longest": longest, "scale": scale, "room": room}
        return *_backward(grad_outputs[0], *ctx.saved_tensors, **how), *(None,) * 4


# ---- public ----


@functools.lru_cache(maxsize=16)
def why_not(dtype: torch.dtype, head_size: int) -> str:
    """Why cuDNN is not to be asked for such heads on this machine; "" when it is."""
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    try:
        import cudnn  # pyright: ignore[reportMissingImports]

        version = int(cudnn.backend_version())
    except (ImportError, OSError, RuntimeError, AttributeError, AssertionError) as error:
        return f"nvidia-cudnn-frontend does not load: {error}"
    if version < _LEAST_VERSION:
        return f"libcudnn {version} is older than {_LEAST_VERSION}"
    if dtype != torch.bfloat16 or head_size not in _SIZES_TRIED:
        return f"cuDNN is not used for heads of {head_size} in {dtype}"
    return ""


def why_not_here(
    q_TNH: Tensor, k_TKH: Tensor, examples: int, longest: int, scale: float, room: int = 0
) -> str:
    """Why cuDNN is not to be asked for this row; "" when it has its plans."""
    if not 0 < len(q_TNH) <= _MOST_TOKENS:
        return f"rows of more than {_MOST_TOKENS} tokens are not for cuDNN"
    if torch.are_deterministic_algorithms_enabled():
        return "cuDNN's sums come in any order"
    return _why_no_plan(_sizes(q_TNH, k_TKH, examples, longest, scale, room))


@functools.lru_cache(maxsize=512)
def _why_no_plan(sizes: _Sizes) -> str:
    import cudnn  # pyright: ignore[reportMissingImports]

    try:
        _forward_plan(sizes)
        _backward_plan(sizes)
    except (RuntimeError, ValueError, cudnn.cudnnGraphNotSupportedError) as error:
        logger.warning("packed attention: cuDNN has no plan for %s: %s", sizes, error)
        return str(error)
    _planned.setdefault(_kind(sizes), []).append(sizes)
    return ""


def cudnn_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    room: int = 0,
) -> Tensor:
    """Causal attention inside each example: [T, N, H] in the dtype of q.

    Args:
        cu_seqlens: int32 [E + 1] from 0 to T.
        longest: tokens of the longest example.
        room: so many numbers behind each token's are free.
    """
    q, k, v = (x.contiguous() for x in (q_TNH, k_TKH, v_TKH))
    sizes = _sizes(q, k, len(cu_seqlens) - 1, longest, scale, room)
    places = _places_once(cu_seqlens, len(q), sizes)
    return _Attention.apply(q, k, v, places, sizes.longest, scale, room)

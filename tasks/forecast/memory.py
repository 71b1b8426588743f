"""Memory of one GPU in training, by part, at each of the moments that can be the fullest.

Everything follows from the model's shape and from what the worker does: weights that are trained
are float32 with float32 gradients, a frozen base is bfloat16, 8 or 4 bits under float32 adapters;
layers keep what `activations` says. The peak is the fullest of four moments: when the loss is
computed, when the last layer's backward pass begins, when the backward pass ends, in the
optimizer's step. Sums are exact where tensors are counted; WORKSPACE, CONTEXT and fragmentation are
not counted but assumed, and say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regrow.tasks.forecast.activations import (
    FULL,
    FUSED_FAMILIES,
    HALF,
    Layer,
    adapts_inside,
    attention_backward_bytes,
    attention_bytes,
    attention_results,
    layer_bytes,
    mlp_width,
    slice_share,
    stream_bytes,
)
from regrow.tasks.forecast.model_shape import Weight
from regrow.tasks.forecast.optimizer_state import state_bytes, state_of
from regrow.tasks.forecast.setting import OFFLOAD, SELECTIVE, Division, Setting

__all__ = ["GIB", "Division", "Memory", "Setting", "as_json", "memory"]

GIB = 2**30
WORKSPACE = 96 * 2**20
"""Bytes of cuBLAS workspaces (32 MiB for each handle and stream on Hopper, by torch's source) and
small buffers."""
CONTEXT = 0.8 * GIB
"""Assumed: CUDA's context and torch's loaded kernels; `tests/bench/memory_table.py` measures it."""
_FRAGMENTATION = 0.08
"""Share that torch reserves beyond what it allocates, of what comes and goes. GiB in use, reserved,
of which stayed: 51.66 55.28 6.1 (a row of 400,000 tokens, offload: 8 %), 43.81 44.97 15.4 (weights
laid anew: 4 %), 34.14 34.81 5.8, 16.50 16.57 15.4, 6.99 7.05 5.8 (H100, 2026-11-22)."""
LOSS_BUDGET = 5 * 2**28
"""Bytes of logits at a time: `LOGITS_BYTES` of `regrow.kernels.linear_cross_entropy`."""
SCARCE_LOSS_BUDGET = 2**28
"""The same where the layers' inputs are offloaded: `SCARCE_LOGITS_BYTES` there."""

FLOAT8_MULTIPLE = 16
"""Sizes of layers that `regrow.tasks.modeling.float8` swaps are multiples of it."""

_CHUNK_MULTIPLE = 128
"""Rows of such a chunk are a multiple of it: `_ROW_MULTIPLE` there."""
_FORWARD_SHARE = 10 / 12
"""Of the memory for logits that is needed before their gradient: bfloat16, float32, logarithms."""
_NF4_BLOCK, _NF4_OUTER = 64, 256
"""Weights that share a scale, and scales that share one (QLoRA, arXiv 2305.14314)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment."""

    parts: Mapping[str, float]
    moment: str
    """When that is."""
    notes: tuple[str, ...] = ()
    lasting: float = 0.0
    """Bytes of them that are there all the time, counted tensor by tensor."""

    @property
    def allocated(self) -> float:
        """What torch's allocator gives out: `torch.cuda.max_memory_allocated`."""
        return sum(self.parts.values())

    @property
    def passing(self) -> float:
        """Bytes of what comes and goes."""
        return self.allocated - self.lasting

    @property
    def fragmentation(self) -> float:
        """Assumed: what torch takes of the GPU beyond that."""
        return _FRAGMENTATION * self.passing

    @property
    def reserved(self) -> float:
        """What torch takes of the GPU: `torch.cuda.max_memory_reserved`."""
        return self.allocated + self.fragmentation

    @property
    def total(self) -> float:
        """What the GPU must have."""
        return self.reserved + CONTEXT


def memory(setting: Setting) -> Memory:
    """The memory that a training step needs at its fullest."""
    static = _static(setting)
    moments = _moments(setting)
    moment, dynamic = max(moments.items(), key=lambda item: sum(item[1].values()))
    parts = {**static, **dynamic, "workspace": _workspace(setting) + dynamic.get("workspace", 0)}
    return Memory(parts, moment, tuple(_notes(setting)), sum(static.values()))


# ---- what is there all the time ----


def weight_bytes(setting: Setting) -> float:
    """Of the model itself, whole."""
    return sum(weight.numel * _bytes_of(weight, setting) for weight in setting.shape.weights)


def _bytes_of(weight: Weight, setting: Setting) -> float:
    """Bytes a parameter."""
    if not setting.frozen:
        trained = weight.name in setting.trainable.names
        if setting.division.way.startswith("zero"):
            return setting.dtype_bytes  # the float32 copy is the optimizer's
        return FULL if trained else setting.dtype_bytes
    if not _is_quantized(weight, setting):
        return setting.dtype_bytes + 2 * _is_in_float8(weight, setting)  # one for each direction
    if setting.bits == 8:
        return 1 + FULL / weight.shape[-1]
    scale = 1 + FULL / _NF4_OUTER if setting.double_quant else FULL
    return 0.5 + scale / _NF4_BLOCK


def _is_in_float8(weight: Weight, setting: Setting) -> bool:
    """Whether `freeze_in_float8` takes the layer: one under the adapter, but not the head."""
    if not setting.float8 or weight.kind != "linear" or weight.module == "lm_head":
        return False
    fits = not any(size % FLOAT8_MULTIPLE for size in weight.shape)
    return fits and setting.trainable.ranks.get(weight.name, 0) > 0


def _is_quantized(weight: Weight, setting: Setting) -> bool:
    if setting.bits == 16:
        return False
    if weight.kind == "experts":
        return setting.quantized_experts
    return weight.kind == "linear" and weight.module != "lm_head"


def _static(setting: Setting) -> dict[str, float]:
    division, trainable = setting.division, setting.trainable
    share = division.share("weights")
    held = 0.0 if division.offloads_weights else share
    parts = {"weights": weight_bytes(setting) * held}
    if trainable.has_adapter:
        zero = division.way.startswith("zero")
        size = setting.dtype_bytes if zero else FULL
        parts["adapter"] = size * (trainable.adapter + trainable.whole) * held
    if _keeps_rounded(setting):
        parts["rounded weights"] = HALF * sum(w.numel for w in _fused_weights(setting))
    optimizer = state_bytes(setting.optimizer, _trained_tensors(setting))
    if division.way.startswith("zero") and setting.dtype_bytes == HALF:
        optimizer += 2 * FULL * trainable.total  # float32 weights, and gradients for the step
    kept = 0.0 if division.offloads_optimizer else division.share("optimizer")
    parts["optimizer"] = optimizer * kept
    return parts


def _keeps_rounded(setting: Setting) -> bool:
    """Whether float32 weights have a copy in bfloat16 for the kernels' products."""
    whole = not setting.frozen and setting.dtype_bytes == HALF
    return whole and setting.division.way == "ddp" and bool(setting.compute.kernels)


_KERNEL_OF = {"attention": ".self_attn.", "mlp": ".mlp.", "cross_entropy": "lm_head"}


def _fused_weights(setting: Setting) -> Iterator[Weight]:
    """Matrices that the kernels multiply, the head among them."""
    parts = [part for name, part in _KERNEL_OF.items() if name in setting.compute.kernels]
    for weight in setting.shape.weights:
        if weight.kind == "linear" and any(part in weight.name for part in parts):
            yield weight
        if weight.kind == "embedding" and setting.shape.tied and "lm_head" in parts:
            yield weight


def _trained_tensors(setting: Setting) -> Iterator[tuple[tuple[int, ...], str]]:
    trainable = setting.trainable
    for weight in setting.shape.weights:
        if weight.name in trainable.names:
            yield weight.shape, _end(weight)
        rank = trainable.ranks.get(weight.name)
        if rank:
            experts = weight.shape[0] if len(weight.shape) == 3 else 1
            yield (rank * experts, weight.shape[-1]), ""
            yield (weight.shape[-2], rank * experts), ""
    if trainable.whole:
        yield (trainable.whole // setting.shape.hidden, setting.shape.hidden), "embedding"


def _end(weight: Weight) -> str:
    if weight.kind == "embedding":
        return "embedding"
    return "head" if weight.module == "lm_head" else ""


def _gradients(setting: Setting) -> tuple[float, float]:
    """Bytes (while micro-batches are added up, at the optimizer's step)."""
    division = setting.division
    size = setting.dtype_bytes if division.way.startswith("zero") else FULL
    whole = size * setting.trainable.total
    if division.way == "ddp" and division.processes > 1:
        return 2 * whole, 2 * whole  # DDP reduces copies in buckets
    shared = whole * division.share("gradients")
    if division.way == "fsdp2" and setting.accumulates and not _sends_rounded(setting):
        # Accelerate lets FSDP2 reduce them with the last micro-batch of a step alone.
        return whole, shared
    return shared, shared


# ---- what comes and goes ----


def _moments(setting: Setting) -> dict[str, dict[str, float]]:
    layers, tokens = list(setting.layers()), setting.tokens
    gradients, at_step = _gradients(setting)
    kept, again = _kept(setting, layers)
    casts = _weight_casts(setting)
    already = gradients if setting.accumulates or _keeps_all(setting) else 0.0
    head = gradients if setting.accumulates else max(already, _head_gradient(setting))
    late = gradients - (_late_gradients(setting) if setting.division.share("gradients") == 1 else 0)
    one = max(backward_bytes(layer) for layer in layers) * tokens
    step = state_of(setting.optimizer)[0].temporaries * setting.trainable.total
    step *= setting.division.share("optimizer")
    in_one = casts / (setting.shape.layers + 1)
    tables, ends = _tables(setting) * tokens, _ends(setting) * tokens
    stream = stream_bytes(layers[-1]) * tokens
    ends += stream if setting.policy == OFFLOAD else 0.0  # a second one on its way to the host
    return {
        "loss": {
            "gradients": already,
            # Autocast's own copies are gone by then; those that layers keep are not.
            "activations": kept + tables + ends + (in_one if setting.recomputes else casts),
            "logits": loss_bytes(setting),
        },
        "end of the forward pass": {
            "gradients": already,
            "activations": kept + tables + ends + casts,
            "logits": loss_bytes(setting) * _FORWARD_SHARE,
        },
        "backward of the last layer": {
            "gradients": head,
            "activations": kept + tables + again + (in_one if setting.recomputes else casts) + one,
            "logits": stream,  # the gradient of the last hidden states
        },
        "backward of the last attention": {
            "gradients": head,
            "activations": _in_attention(setting, layers, kept) + tables + in_one,
            "logits": stream,
        },
        "end of the backward pass": {
            "gradients": gradients if setting.accumulates else max(already, late),
            "activations": kept / setting.shape.layers + tables + again + in_one + one,
            "logits": stream,
        },
        "optimizer step": {
            "gradients": at_step,
            "activations": 0.0,
            "logits": 0.0,
            "workspace": step,
        },
    }


def _kept(setting: Setting, layers: list[Layer]) -> tuple[float, float]:
    """Bytes (that all layers keep, that the computing again of one makes)."""
    if not setting.recomputes:
        return sum(layer_bytes(layer) for layer in layers) * setting.tokens, 0.0
    kept = sum(_checkpointed(setting, layer) for layer in layers) * setting.tokens
    # A layer's own input is among what is kept, and what attention gave may be.
    there = attention_results if setting.policy == SELECTIVE else _nothing
    again = max(layer_bytes(layer) - stream_bytes(layer) - there(layer) for layer in layers)
    return kept, again * setting.tokens


def _nothing(layer: Layer) -> int:
    return 0


def _in_attention(setting: Setting, layers: list[Layer], kept: float) -> float:
    """Bytes while a layer's attention has its backward pass: its MLP's have gone."""
    one = max(attention_bytes(layer) + attention_backward_bytes(layer) for layer in layers)
    if setting.recomputes:
        return kept + one * setting.tokens
    return kept * (1 - 1 / len(layers)) + one * setting.tokens


def _checkpointed(setting: Setting, layer: Layer) -> float:
    """Bytes a token that stay of a layer which is computed again."""
    if setting.policy == OFFLOAD:  # one on its way, and those that stay, one of them used
        stays = max(setting.stays / setting.tokens, stream_bytes(layer))
        return (stream_bytes(layer) + stays) / setting.shape.layers
    kept = stream_bytes(layer)
    if setting.policy == SELECTIVE:
        kept += attention_results(layer)
    return kept


def host_bytes(setting: Setting) -> float:
    """Of the host's memory, for activations that wait there: the layers' inputs."""
    if setting.policy != OFFLOAD:
        return 0.0
    inputs = sum(stream_bytes(layer) for layer in setting.layers()) * setting.tokens
    return max(0.0, inputs - setting.stays)


def _tables(setting: Setting) -> int:
    """Bytes a token of the rotary embedding's cosines and sines, made once for all layers."""
    return 2 * setting.shape.attention.head_size * HALF


def _keeps_all(setting: Setting) -> bool:
    """Whether gradients live in buffers that are made once."""
    return setting.division.way == "ddp" and setting.division.processes > 1


def _weight_casts(setting: Setting) -> float:
    """Autocast keeps the bfloat16 form of trained weights as long as the graph needs them."""
    if setting.trainable.has_adapter or setting.dtype_bytes == FULL:
        return 0.0
    if setting.division.way.startswith("zero") or _sends_rounded(setting):
        return 0.0
    without = tuple(part for name, part in _KERNEL_OF.items() if name in setting.compute.kernels)
    matrices = [w for w in setting.shape.weights if w.kind in ("linear", "experts")]
    total = sum(w.numel for w in matrices if not any(part in w.name for part in without))
    if setting.shape.tied and "lm_head" not in without:
        total += setting.shape.vocabulary * setting.shape.hidden
    return HALF * total


def _ends(setting: Setting) -> int:
    """Bytes a token that the last norm keeps and gives, and the head's input."""
    hidden, fused = setting.shape.hidden, "rms_norm" in setting.compute.kernels
    norm = HALF if fused else FULL if setting.frozen else FULL + HALF
    result = HALF if setting.frozen or fused else FULL
    head = 0 if setting.frozen or fused else HALF
    return hidden * (norm + result + head)


def _late_gradients(setting: Setting) -> float:
    """Those that come after the first layer's activations have gone: its own, the embedding's."""
    shape, names = setting.shape, setting.trainable.names
    late = [w for w in shape.layer(0) if w.name in names]
    late += [
        w for w in shape.weights if w.kind == "embedding" and w.name in names and not shape.tied
    ]
    return FULL * sum(weight.numel for weight in late)


def _head_gradient(setting: Setting) -> float:
    """The first gradient of a backward pass."""
    shape = setting.shape
    names = {"lm_head.weight", "model.embed_tokens.weight"} & setting.trainable.names
    whole = min(setting.trainable.whole, shape.vocabulary * shape.hidden)
    return FULL * (shape.vocabulary * shape.hidden if names else whole)


def loss_bytes(setting: Setting) -> float:
    """From the last hidden states to the loss and its gradient.

    Plain: the logits' log-probabilities and two gradients of them, each in float32 (with bfloat16
    logits and their float32 copy before). With the kernel: a chunk of logits, hidden states with a
    label and their gradients, and the head's gradient in float32, which is made at once.
    """
    shape, tokens = setting.shape, setting.tokens
    if "cross_entropy" not in setting.compute.kernels:
        return 3 * FULL * shape.vocabulary * tokens
    labelled = tokens * setting.supervised
    rows = HALF * shape.hidden * labelled * 2
    budget = SCARCE_LOSS_BUDGET if setting.policy == OFFLOAD else LOSS_BUDGET
    chunk = chunk_bytes(shape.vocabulary, tokens, labelled, budget)
    kept = rows + max(chunk, HALF * shape.hidden * tokens)
    if setting.frozen and not setting.trainable.whole:
        return kept
    rounded = 0 if _keeps_rounded(setting) else HALF
    return kept + (FULL + rounded) * shape.vocabulary * shape.hidden


def chunk_bytes(vocabulary: int, tokens: int, labelled: float, budget: int) -> float:
    """Of the logits that `regrow.kernels.linear_cross_entropy` makes at a time, in float32."""
    columns = -(-vocabulary // 8) * 8
    most = max(budget // (FULL * columns) // _CHUNK_MULTIPLE, 1) * _CHUNK_MULTIPLE
    even = -(-tokens // max(-(-tokens // most), 1))
    rows = max(-(-even // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE, 1)
    return FULL * columns * min(rows, labelled)


def backward_bytes(layer: Layer) -> float:
    """Bytes a token that a layer's backward pass needs beside what is kept, at its fullest.

    With the kernels: gradients of the MLP's product, of gate and of up, and the product made again;
    where small adapters are computed inside, those of gate, of up and of the input.
    Through PEFT: the product and its float32 copy, in the forward pass already. Otherwise the
    gradient of the product, since what was kept is freed as the pass goes on. And, without the
    kernels, the residual stream and the gradients of those that read it.
    """
    width, hidden = mlp_width(layer), layer.shape.hidden
    if "mlp" in layer.compute.kernels or "experts" in layer.compute.kernels:
        share, inside = slice_share(layer), adapts_inside(layer)
        # As `tests/bench/fake_gpu.py` counts: one more line of the stream, beside slices as well.
        line = HALF * hidden
        if share < 1:  # of a slice also gate and up, whose gradients may take their place; of all
            # the input's gradient
            return HALF * (3 if inside else 6) * width * share + line + HALF * hidden
        token = HALF * (2 * width + hidden) if inside else HALF * 4 * width
        return token + (line if layer.compute.scarce else 0)
    if layer.frozen:
        inside = (HALF + FULL if layer.compute.bits == 16 else 2 * HALF) * width
    else:
        inside = HALF * width
    return inside + 4 * HALF * hidden


def _workspace(setting: Setting) -> float:
    division = setting.division
    total = float(WORKSPACE)
    if setting.frozen and setting.bits < 16:  # one is made dense at a time, into the same memory
        dense = (w.numel for w in setting.shape.weights if _is_quantized(w, setting))
        one = HALF * max(dense, default=0) * (setting.bits == 4 or setting.quantized_experts)
        # An MLP that goes in slices makes its three matrices for all of them.
        total += one * (3 if min(slice_share(layer) for layer in setting.layers()) < 1 else 1)
    if division.share("weights") < 1 and division.way != "tp":
        total += _gathered(setting) / division.cut
    return total


def _gathered(setting: Setting) -> float:
    """Weights of layers that are whole while they run, and gradients before they are divided."""
    shape = setting.shape
    sent = HALF / FULL if _sends_rounded(setting) else 1.0
    if setting.division.keeps_gathered:
        return sent * weight_bytes(setting)
    layer = sum(w.numel * _bytes_of(w, setting) for w in shape.layer(shape.layers - 1))
    ends = sum(
        w.numel * _bytes_of(w, setting) * (sent if w.module == "lm_head" else 1)
        for w in shape.weights
        if "layers." not in w.name
    )
    gradients = 0.0 if setting.trainable.has_adapter else layer
    return 2 * sent * layer + gradients + ends  # the next layer is fetched while one runs


def _sends_rounded(setting: Setting) -> bool:
    """Whether FSDP2 gathers bfloat16 forms of float32 weights (`regrow.tasks.train.gathering`)."""
    division = setting.division
    whole = division.way == "fsdp2" and division.cut == 1 and not setting.trainable.has_adapter
    return whole and not setting.frozen and setting.dtype_bytes == HALF


def _notes(setting: Setting) -> Iterator[str]:
    if not state_of(setting.optimizer)[1]:
        yield f"the state of {setting.optimizer} is not known here; it counts as AdamW's"
    if setting.optimizer.startswith("paged_"):
        yield f"{setting.optimizer} moves its state out of a full GPU; here it counts in full"
    none = {"mlp"} if setting.shape.family.experts is not None else {"experts"}
    left = sorted(set(setting.kernels) - setting.compute.kernels - none)
    if left:
        yield f"without kernels for {', '.join(left)}: {_why_left(setting)}"
    if setting.shape.config.get("attn_logit_softcapping"):
        yield "without the flash-attn package, soft-capped attention takes far more"


def _why_left(setting: Setting) -> str:
    if setting.shape.model_type not in FUSED_FAMILIES:
        return f"{setting.shape.model_type} is no architecture they know"
    if setting.trainable.dora:
        return "they have no DoRA"
    return "they do not multiply 8-bit layers"


def as_json(found: Memory) -> dict[str, Any]:
    """For machines: bytes."""
    return {
        "parts": {name: round(size) for name, size in found.parts.items()},
        "allocated": round(found.allocated),
        "fragmentation": round(found.fragmentation),
        "context": round(CONTEXT),
        "total": round(found.total),
        "moment": found.moment,
        "notes": list(found.notes),
    }

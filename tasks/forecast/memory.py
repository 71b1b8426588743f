"""Memory of one GPU in training, by part, at each of the moments that can be the fullest.

Everything follows from the model's shape and from what the worker does: weights that are trained
are float32 with float32 gradients, a frozen base is bfloat16, 8 or 4 bits under float32 adapters;
layers keep what `activations` says. The peak is the fullest of four moments: when the loss is
computed, when the last layer's backward pass begins, when the backward pass ends, in the
optimizer's step. Sums are exact where tensors are counted; WORKSPACE, CONTEXT and FRAGMENTATION are
not counted but assumed, and say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from regrow.tasks.forecast.activations import (
    FULL,
    FUSED_FAMILIES,
    GPU,
    HALF,
    KERNELS,
    Compute,
    Layer,
    Machine,
    layer_bytes,
    stream_bytes,
)
from regrow.tasks.forecast.model_shape import ModelShape, Weight
from regrow.tasks.forecast.optimizer_state import state_bytes, state_of
from regrow.tasks.forecast.trainable import Trainable

GIB = 2**30
WORKSPACE = 96 * 2**20
"""Bytes of cuBLAS workspaces (32 MiB for each handle and stream on Hopper, by torch's source) and
small buffers."""
CONTEXT = 0.8 * GIB
"""Assumed: CUDA's context and torch's loaded kernels; `tests/bench/memory_table.py` measures it."""
FRAGMENTATION = 0.03
"""Share that torch reserves beyond what it allocates: 0.5 to 2.8 % in the peers' runs on an H100
with packed rows, 2026-11-21."""
LOSS_BUDGET = 5 * 2**28
"""Bytes of logits at a time: `LOGITS_BYTES` of `regrow.kernels.linear_cross_entropy`."""

_FORWARD_SHARE = 10 / 12
"""Of the memory for logits that is needed before their gradient: bfloat16, float32, logarithms."""
_NF4_BLOCK, _NF4_OUTER = 64, 256
"""Weights that share a scale, and scales that share one (QLoRA, arXiv 2305.14314)."""


@dataclass(frozen=True)
class Division:
    """How the model is laid over GPUs."""

    processes: int = 1
    shards: int = 1
    """Processes that share one copy."""
    way: str = "ddp"
    """ddp, fsdp2, zero1, zero2 or zero3."""
    keeps_gathered: bool = False
    """FSDP2 without resharding after the forward pass."""
    offloads_optimizer: bool = False
    offloads_weights: bool = False

    def share(self, part: str) -> float:
        """Of weights, gradients or optimizer: how much of it one GPU holds."""
        divided = {
            "ddp": (),
            "zero1": ("optimizer",),
            "zero2": ("optimizer", "gradients"),
            "zero3": ("optimizer", "gradients", "weights"),
            "fsdp2": ("optimizer", "gradients", "weights"),
        }[self.way]
        return 1 / self.shards if part in divided else 1.0


@dataclass(frozen=True)
class Setting:
    """All that decides how much memory a training step takes."""

    shape: ModelShape
    trainable: Trainable
    tokens: int
    """In one micro-batch on one GPU: rows times their full length."""
    optimizer: str = "adamw_torch_fused"
    kernels: tuple[str, ...] = KERNELS
    bits: int = 16
    double_quant: bool = True
    dtype_bytes: int = HALF
    """In which forward and backward are computed, and a frozen base is held."""
    checkpointing: bool | str = False
    """True and "full": a layer's input stays; "selective": attention's results too; "offload": all
    of it waits in the host's memory. False and "none": nothing is computed again."""
    accumulates: bool = False
    """More than one micro-batch a step: gradients are there all the time."""
    division: Division = field(default_factory=Division)
    machine: Machine = GPU

    @cached_property
    def compute(self) -> Compute:
        """With the kernels that can be put into this model."""
        kernels = set(self.kernels) if self.shape.model_type in FUSED_FAMILIES else set()
        if self.trainable.dora or self.bits == 8:
            kernels -= {"attention", "mlp"}
        kernels -= {"mlp"} if self.shape.family.experts is not None else {"experts"}
        return Compute(frozenset(kernels), self.bits, self.machine)

    def layers(self) -> Iterator[Layer]:
        """Every layer."""
        for number in range(self.shape.layers):
            yield Layer(self.shape, self.shape.layer(number), self.trainable, self.compute)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment."""

    parts: Mapping[str, float]
    moment: str
    """When that is."""
    notes: tuple[str, ...] = ()

    @property
    def allocated(self) -> float:
        """What torch's allocator gives out: `torch.cuda.max_memory_allocated`."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """What the GPU must have."""
        return self.allocated * (1 + FRAGMENTATION) + CONTEXT


def memory(setting: Setting) -> Memory:
    """The memory that a training step needs at its fullest."""
    static = _static(setting)
    gradients = _gradients(setting)
    moments = _moments(setting, gradients)
    moment, dynamic = max(moments.items(), key=lambda item: sum(item[1].values()))
    parts = {**static, **dynamic, "workspace": _workspace(setting) + dynamic.get("workspace", 0)}
    return Memory(parts, moment, tuple(_notes(setting)))


# ---- what is there all the time ----


def weight_bytes(setting: Setting) -> float:
    """Of the model itself, whole."""
    return sum(weight.numel * _bytes_of(weight, setting) for weight in setting.shape.weights)


def _bytes_of(weight: Weight, setting: Setting) -> float:
    """Bytes a parameter."""
    if not setting.trainable.has_adapter:
        trained = weight.name in setting.trainable.names
        if setting.division.way.startswith("zero"):
            return setting.dtype_bytes  # the float32 copy is the optimizer's
        return FULL if trained else setting.dtype_bytes
    if setting.bits == 16 or weight.kind != "linear" or weight.module == "lm_head":
        return setting.dtype_bytes
    if setting.bits == 8:
        return 1 + FULL / weight.shape[1]
    scale = 1 + FULL / _NF4_OUTER if setting.double_quant else FULL
    return 0.5 + scale / _NF4_BLOCK


def _static(setting: Setting) -> dict[str, float]:
    division, trainable = setting.division, setting.trainable
    share = division.share("weights")
    held = 0.0 if division.offloads_weights else share
    parts = {"weights": weight_bytes(setting) * held}
    if trainable.has_adapter:
        zero = division.way.startswith("zero")
        size = setting.dtype_bytes if zero else FULL
        parts["adapter"] = size * (trainable.adapter + trainable.whole) * held
    optimizer = state_bytes(setting.optimizer, _trained_tensors(setting))
    if division.way.startswith("zero") and setting.dtype_bytes == HALF:
        optimizer += 2 * FULL * trainable.total  # float32 weights, and gradients for the step
    kept = 0.0 if division.offloads_optimizer else division.share("optimizer")
    parts["optimizer"] = optimizer * kept
    return parts


def _trained_tensors(setting: Setting) -> Iterator[tuple[tuple[int, ...], bool]]:
    trainable = setting.trainable
    for weight in setting.shape.weights:
        if weight.name in trainable.names:
            yield weight.shape, weight.kind == "embedding"
        rank = trainable.ranks.get(weight.name)
        if rank:
            experts = weight.shape[0] if len(weight.shape) == 3 else 1
            yield (rank * experts, weight.shape[-1]), False
            yield (weight.shape[-2], rank * experts), False
    if trainable.whole:
        yield (trainable.whole // setting.shape.hidden, setting.shape.hidden), True


def _gradients(setting: Setting) -> float:
    division = setting.division
    size = setting.dtype_bytes if division.way.startswith("zero") else FULL
    gradients = size * setting.trainable.total * division.share("gradients")
    if division.way == "ddp" and division.processes > 1:
        gradients *= 2  # DDP reduces copies in buckets
    return gradients


# ---- what comes and goes ----


def _moments(setting: Setting, gradients: float) -> dict[str, dict[str, float]]:
    layers = list(setting.layers())
    recomputes = setting.checkpointing not in (False, "none")
    if recomputes:
        kept = sum(_checkpointed(setting, layer) for layer in layers) * setting.tokens
        again = max(layer_bytes(layer) for layer in layers) * setting.tokens
    else:
        kept, again = sum(layer_bytes(layer) for layer in layers) * setting.tokens, 0.0
    kept += _ends(setting) * setting.tokens
    casts = _weight_casts(setting)
    already = gradients if setting.accumulates or _keeps_all(setting) else 0.0
    head = gradients if setting.accumulates else max(already, _head_gradient(setting))
    late = gradients - (_late_gradients(setting) if setting.division.share("gradients") == 1 else 0)
    one = max(backward_bytes(layer) for layer in layers) * setting.tokens
    step = state_of(setting.optimizer)[0].temporaries * setting.trainable.total
    step *= setting.division.share("optimizer")
    in_one = casts / (setting.shape.layers + 1)
    in_backward = kept + again + (in_one if recomputes else casts)
    return {
        "loss": {
            "gradients": already,
            # Autocast's own copies are gone by then; those that layers keep are not.
            "activations": kept + (in_one if recomputes else casts),
            "logits": loss_bytes(setting),
        },
        "end of the forward pass": {
            "gradients": already,
            "activations": kept + casts,
            "logits": loss_bytes(setting) * _FORWARD_SHARE,
        },
        "backward of the last layer": {
            "gradients": head,
            "activations": in_backward + one,
            "logits": HALF * setting.shape.hidden * setting.tokens,
        },
        "end of the backward pass": {
            "gradients": gradients if setting.accumulates else max(already, late),
            "activations": kept / setting.shape.layers + again + in_one + one,
            "logits": 0.0,
        },
        "optimizer step": {
            "gradients": gradients,
            "activations": 0.0,
            "logits": 0.0,
            "workspace": step,
        },
    }


def _checkpointed(setting: Setting, layer: Layer) -> float:
    """Bytes a token that stay of a layer which is computed again."""
    if setting.checkpointing == "offload":
        return 2 * stream_bytes(layer) / setting.shape.layers  # on the way out, and on the way in
    kept = stream_bytes(layer)
    if setting.checkpointing == "selective":
        sizes = setting.shape.attention
        kept += sizes.query_heads * (HALF * sizes.value_size + FULL)
    return kept


def _keeps_all(setting: Setting) -> bool:
    """Whether gradients live in buffers that are made once."""
    return setting.division.way == "ddp" and setting.division.processes > 1


def _weight_casts(setting: Setting) -> float:
    """Autocast keeps the bfloat16 form of trained weights as long as the graph needs them."""
    if setting.trainable.has_adapter or setting.dtype_bytes == FULL:
        return 0.0
    if setting.division.way.startswith("zero"):
        return 0.0
    parts = {"attention": ".self_attn.", "mlp": ".mlp.", "cross_entropy": "lm_head"}
    without = tuple(part for name, part in parts.items() if name in setting.compute.kernels)
    matrices = [w for w in setting.shape.weights if w.kind in ("linear", "experts")]
    total = sum(w.numel for w in matrices if not any(part in w.name for part in without))
    if setting.shape.tied and "lm_head" not in without:
        total += setting.shape.vocabulary * setting.shape.hidden
    return HALF * total


def _ends(setting: Setting) -> int:
    """Bytes a token that the last norm and the head's input keep."""
    hidden, frozen = setting.shape.hidden, setting.trainable.has_adapter
    fused = "rms_norm" in setting.compute.kernels
    norm = FULL if fused or frozen else 2 * FULL
    head = 0 if frozen or "cross_entropy" in setting.compute.kernels else HALF
    return hidden * (norm + head)


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
    logits and their float32 copy before). With the kernel: a chunk of logits, hidden states and
    their gradients, and the head's gradient in float32, which is made at once.
    """
    shape, tokens = setting.shape, setting.tokens
    if "cross_entropy" not in setting.compute.kernels:
        return 3 * FULL * shape.vocabulary * tokens
    chunk = min(LOSS_BUDGET, FULL * shape.vocabulary * tokens)
    kept = chunk + 4 * HALF * shape.hidden * tokens
    if setting.trainable.has_adapter and not setting.trainable.whole:
        return kept
    return kept + (FULL + HALF) * shape.vocabulary * shape.hidden


def backward_bytes(layer: Layer) -> float:
    """Bytes a token that a layer's passes need beside what is kept, at their fullest.

    With the kernels: gradients of the MLP's product, of gate and of up, and the product made again.
    Through PEFT: the product and its float32 copy, in the forward pass already. Otherwise the
    gradient of the product, since what was kept is freed as the pass goes on. And the residual
    stream, its gradient and those of what reads it.
    """
    family, config, hidden = layer.shape.family, layer.shape.config, layer.shape.hidden
    width = config.get("intermediate_size", 4 * hidden)
    if family.experts is not None:
        width = config[family.experts.width] * config[family.experts.per_token]
    if "mlp" in layer.compute.kernels or "experts" in layer.compute.kernels:
        inside = 4 * HALF * width
    elif layer.frozen:
        inside = (HALF + FULL if layer.compute.bits == 16 else 2 * HALF) * width
    else:
        inside = HALF * width
    return inside + 4 * HALF * hidden


def _workspace(setting: Setting) -> float:
    division = setting.division
    total = float(WORKSPACE)
    if setting.trainable.has_adapter and setting.bits == 4:
        blocks = (w for layer in setting.layers() for w in layer.weights if w.kind == "linear")
        total += HALF * max(w.numel for w in blocks)
    if division.share("weights") < 1:
        total += _gathered(setting)
    return total


def _gathered(setting: Setting) -> float:
    """Weights of layers that are whole while they run, and gradients before they are divided."""
    shape = setting.shape
    if setting.division.keeps_gathered:
        return weight_bytes(setting)
    layer = sum(w.numel * _bytes_of(w, setting) for w in shape.layer(shape.layers - 1))
    ends = sum(w.numel * _bytes_of(w, setting) for w in shape.weights if "layers." not in w.name)
    gradients = 0.0 if setting.trainable.has_adapter else layer
    return 2 * layer + gradients + ends  # the next layer is fetched while one runs


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
        "fragmentation": round(found.allocated * FRAGMENTATION),
        "context": round(CONTEXT),
        "total": round(found.total),
        "moment": found.moment,
        "notes": list(found.notes),
    }

"""What one transformer layer keeps for its backward pass, in bytes a token, formula by formula.

Counted from what Transformers' layers, PEFT's LoRA layers and our kernels save under bfloat16
autocast with the packed attention; `tests/tasks/forecast/test_activations.py` compares with the
tensors that the autograd graphs of real layers hold. The residual stream is bfloat16, as the
worker lets the embedding follow autocast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regrow.tasks.forecast.model_shape import ModelShape, Weight
from regrow.tasks.forecast.trainable import Trainable

HALF, FULL = 2, 4
"""Bytes of bfloat16 and of float32."""

KERNELS = ("attention", "mlp", "experts", "rms_norm", "cross_entropy")
"""As `regrow.tasks.modeling.kernels` names them."""

SLICE_BYTES, SCARCE_SLICE_BYTES, LARGEST_SLICE = 4 << 30, 160 << 20, 1 << 30
LARGER_SLICE = 1.5
"""Of `regrow.kernels.lora_mlp`: above so many bytes of gate and up the tokens go in slices, two or
more, of at most so many times that."""
LARGEST_RANK = 32
"""Of `regrow.kernels.gated_lora`: of the adapters whose updates the activation's kernel makes."""

FUSED_FAMILIES = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "smollm3", "gemma2", "gemma3_text", "phi3")
)
"""Architectures that the kernels are put into (`regrow.tasks.modeling.families`)."""


@dataclass(frozen=True)
class Machine:
    """How much torch's own operations keep; on a CPU some keep more."""

    mask: int = 1
    """Bytes of each element of a dropout mask."""
    attention_copies: int = 0
    """Further copies of the attention's output: made example by example, then joined."""


GPU, CPU = Machine(), Machine(mask=FULL, attention_copies=1)


@dataclass(frozen=True)
class Compute:
    """How the layers are computed."""

    kernels: frozenset[str] = frozenset()
    """Those that are really put in."""
    bits: int = 16
    """Of the frozen base's linear layers: 16, 8 or 4."""
    machine: Machine = GPU
    context: int = 1
    """Processes that share each row; keys and values of all of them are gathered."""
    halves: bool = True
    """Whether products are of 16 bits; float32 otherwise."""
    tokens: int = 0
    """Of a micro-batch: long ones go through the MLP's kernel in slices."""
    scarce: bool = False
    """Whether memory is short, so that the slices are smaller."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model and how it is trained."""

    shape: ModelShape
    weights: Sequence[Weight]
    trainable: Trainable
    compute: Compute

    @property
    def frozen(self) -> bool:
        """Whether the model's own weights are not trained."""
        return self.trainable.has_adapter

    def linear(self, *names: str) -> list[Weight]:
        """The linear layers of these names."""
        return [w for w in self.weights if w.kind == "linear" and w.module.endswith(names)]

    def rank(self, weight: Weight) -> int:
        """Of the adapter on a weight; 0 without one."""
        return self.trainable.ranks.get(weight.name, 0)


def layer_bytes(layer: Layer) -> float:
    """Bytes a token that the layer keeps between its forward and its backward pass."""
    return _norms(layer) + _attention(layer) + _feed_forward(layer)


def stream_bytes(layer: Layer) -> int:
    """Bytes a token of the residual stream: what a checkpointed layer keeps."""
    return HALF * layer.shape.hidden


# ---- norms ----


def _norms(layer: Layer) -> int:
    return len(layer.shape.family.norms) * (norm_bytes(layer, layer.shape.hidden) + FULL)


def norm_bytes(layer: Layer, width: int) -> int:
    """What it reads, and in full training what its own weight is multiplied with."""
    if "rms_norm" in layer.compute.kernels:
        return width * HALF
    return width * (FULL if layer.frozen else FULL + HALF)


# ---- attention ----


def _attention(layer: Layer) -> int:
    sizes = layer.shape.attention
    fused = "attention" in layer.compute.kernels
    q, k = sizes.query_heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    v, out = sizes.kv_heads * sizes.value_size, sizes.query_heads * sizes.value_size
    others = layer.compute.context
    flash = HALF * (q + (k + v) * others) + attention_results(layer)
    if others > 1:  # each half of the slice has results of its own, which are then joined
        flash += HALF * out
    if layer.shape.family.fused_qkv:
        flash += HALF * (q + k)  # the values are a part of what the one matrix gave
    if fused or not layer.frozen or layer.compute.bits == 4:  # the output layer keeps its input
        flash += HALF * out * layer.compute.machine.attention_copies
    inputs = layer.linear(
        "q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"
    )
    kept = _inputs(layer, inputs, fused, "new")
    kept += _inputs(layer, layer.linear("self_attn.o_proj"), fused, "kept already")
    return flash + kept + _head_norms(layer, q + k, fused) + _latent(layer)


def attention_results(layer: Layer) -> int:
    """Bytes a token of what attention gives: the values, and the log-sum-exp of the scores."""
    sizes = layer.shape.attention
    return sizes.query_heads * (HALF * sizes.value_size + FULL)


def attention_backward_bytes(layer: Layer) -> float:
    """Bytes a token that attention's backward pass needs beside what is kept.

    Gradients of its result and of q, k and v, and what the kernel makes for itself.
    """
    sizes, others = layer.shape.attention, layer.compute.context
    q, out = sizes.query_heads * sizes.head_size, sizes.query_heads * sizes.value_size
    kv = sizes.kv_heads * (sizes.head_size + sizes.value_size) * others
    return HALF * (q + kv + out) + flash_bytes(layer)


def flash_bytes(layer: Layer) -> float:
    """Bytes a token inside of attention's backward pass.

    FlashAttention 2 adds the queries' gradients up in float32, and makes those of keys and values
    for every query head first (`mha_varlen_bwd`).
    """
    sizes = layer.shape.attention
    q, out = sizes.query_heads * sizes.head_size, sizes.query_heads * sizes.value_size
    inside = FULL * (q + sizes.query_heads)
    if sizes.kv_heads != sizes.query_heads:
        inside += HALF * (q + out) * layer.compute.context
    return inside


def attention_bytes(layer: Layer) -> float:
    """Bytes a token that the layer's attention keeps, with what feeds it."""
    return _attention(layer)


def _head_norms(layer: Layer, width: int, fused: bool) -> int:
    has = [w for w in layer.weights if w.name.endswith("q_norm.weight")]
    if not has:
        return 0
    if fused:
        return HALF * width
    # Llama's way: normed, rounded, and then multiplied with the weight; Gemma's stays float32.
    normed = FULL if layer.shape.family.norms[-1].startswith("post_f") else HALF
    return width * (FULL + (0 if layer.frozen else normed))


def _latent(layer: Layer) -> int:
    """Latent attention: the low-rank inputs with their norms."""
    ups = layer.linear("q_b_proj", "kv_b_proj")
    return sum(norm_bytes(layer, w.shape[1]) + _inputs(layer, [w], False, "new") for w in ups)


# ---- linear layers ----


def _inputs(layer: Layer, group: Sequence[Weight], fused: bool, source: str) -> int:
    """What linear layers of one input keep of it, and their adapters' inner values.

    Args:
        source: "new": nobody else keeps the input; "kept already": in bfloat16, by what made it.
    """
    if not group:
        return 0
    width, adapted = group[0].shape[1], [w for w in group if layer.rank(w)]
    ranks = HALF * sum(layer.rank(w) for w in adapted)
    new = HALF * width if source == "new" else 0
    if fused:
        return new + ranks
    if not layer.frozen:
        return len(group) * new  # each rounds the float32 input for itself
    if layer.compute.bits == 8:
        new = HALF * width * len(group)  # MatMul8bitLt keeps its input
    elif layer.compute.bits == 16:
        new = HALF * width * len(adapted)  # PEFT goes through float32: a copy for each adapter
    elif not adapted:
        new = 0
    dropout = 0
    if layer.trainable.dropout:
        mask, copy = layer.compute.machine.mask, 0 if layer.compute.bits == 16 else HALF
        dropout = width * len(adapted) * (mask + copy)
    dora = 2 * HALF * sum(w.shape[0] for w in adapted) if layer.trainable.dora else 0
    return new + ranks + dropout + dora


# ---- feed-forward ----


def _feed_forward(layer: Layer) -> int:
    experts = [w for w in layer.weights if w.kind == "experts"]
    shared = layer.linear("shared_expert.down_proj", "shared_experts.down_proj")
    if experts:
        return _experts(layer, experts) + (_mlp(layer, shared[0]) if shared else 0)
    (down,) = layer.linear("mlp.down_proj", "mlp.c_proj")
    return _mlp(layer, down)


def _mlp(layer: Layer, down: Weight) -> int:
    block, width = down.module.rpartition(".")[0], down.shape[1]
    fused = "mlp" in layer.compute.kernels and "shared" not in block
    gated = layer.shape.family.plain_mlp is None
    ups = [
        w
        for w in layer.weights
        if w.kind == "linear" and w.module.startswith(f"{block}.") and w is not down
    ]
    hidden = HALF * width
    kept = _inputs(layer, ups, fused, "new")
    if fused and slice_share(layer) < 1:
        return HALF * layer.shape.hidden  # its input alone; gate and up are made again
    if fused:
        product = hidden if layer.shape.family.fused_gate_up else 0
        return kept + 2 * hidden + product + _inputs(layer, [down], True, "kept already")
    # gate, act(gate) and up; without a gate the activation's input alone.
    kept += (3 if gated else 1) * hidden
    copies = layer.frozen and layer.compute.bits == 16
    product = 0 if copies else hidden if not layer.frozen or layer.rank(down) else 0
    return kept + product + _inputs(layer, [down], False, "kept already")


def mlp_width(layer: Layer) -> int:
    """Of the hidden layer of what a token goes through: an MLP, or all its experts."""
    family, config = layer.shape.family, layer.shape.config
    if family.experts is not None:
        return config[family.experts.width] * config[family.experts.per_token]
    return config.get("intermediate_size", 4 * layer.shape.hidden)


def slice_share(layer: Layer) -> float:
    """Share of the tokens that the MLP's kernel takes at a time (`regrow.kernels.lora_mlp`)."""
    tokens, width = layer.compute.tokens, mlp_width(layer)
    whole = 2 * HALF * width * tokens
    if "mlp" not in layer.compute.kernels or layer.shape.family.fused_gate_up:
        return 1.0
    most = SCARCE_SLICE_BYTES if layer.compute.scarce else SLICE_BYTES
    if whole <= most:
        return 1.0
    slices = max(2, math.ceil(whole / min(LARGER_SLICE * most, LARGEST_SLICE)))
    return min(1.0, -(-tokens // slices // 128) * 128 / tokens)


def adapts_inside(layer: Layer) -> bool:
    """Whether the MLP's kernel makes its adapters' updates, and so no product again for them."""
    biases = ("mlp.gate_proj.bias", "mlp.up_proj.bias")
    if not layer.compute.halves or any(w.name.endswith(biases) for w in layer.weights):
        return False
    layers = layer.linear("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    small = all(0 < layer.rank(weight) <= LARGEST_RANK for weight in layers)
    return len(layers) == 3 and small and not layer.trainable.dropout


def _experts(layer: Layer, experts: Sequence[Weight]) -> int:
    """A mixture by grouped products: every token once for each of its experts."""
    family, config = layer.shape.family, layer.shape.config
    assert family.experts is not None
    times, width = config[family.experts.per_token], config[family.experts.width]
    hidden = layer.shape.hidden
    ranks = HALF * sum(layer.rank(w) for w in experts)
    router = FULL * 2 * experts[0].shape[0]
    if "experts" in layer.compute.kernels:  # the input once, gate and up for each expert
        return HALF * hidden + times * (HALF * 2 * width + ranks) + router
    trained = not layer.frozen or any(layer.rank(w) for w in experts)
    # gate and up in one, act(gate), the output before it is weighted ...
    kept = HALF * (2 * width + width + hidden)
    if trained:  # ... and the inputs of both products
        kept += HALF * (hidden + width)
    return times * (kept + ranks) + router

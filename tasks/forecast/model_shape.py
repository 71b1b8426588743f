"""A model's weights by name and shape, from its config.json alone.

No torch, no weights: `model_shape` knows the architectures in `families`; of others
`stored_parameters` reads the number of parameters from the headers of the files.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from regrow.tasks.forecast.families import FAMILIES, Experts, Family, Flag

_MOST_LAYERS = 1000  # no known model has a quarter of it
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format


class UnknownArchitectureError(ValueError):
    """A config.json whose layers this module does not know."""


@dataclass(frozen=True)
class Weight:
    """One parameter of a model."""

    name: str
    """As `named_parameters()` of Transformers gives it."""
    shape: tuple[int, ...]
    kind: str = "other"
    """"linear" (an nn.Linear's weight), "embedding", "experts" (stacked matrices) or "other"."""

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Name of the layer that holds it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Attention:
    """Sizes of the attention of every layer."""

    query_heads: int
    kv_heads: int
    head_size: int
    value_size: int
    """Of one head's values; `head_size` but for latent attention."""


@dataclass(frozen=True)
class ModelShape:
    """A model as far as its sizes go."""

    model_type: str
    family: Family
    config: Mapping[str, Any]
    """Of the text model."""
    weights: tuple[Weight, ...]
    attention: Attention
    tied: bool
    """Whether the output head is the embedding."""

    @cached_property
    def parameters(self) -> int:
        """All of them; a tied head counts once."""
        return sum(weight.numel for weight in self.weights)

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return self.config["num_hidden_layers"]

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.config["hidden_size"]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.config["vocab_size"]

    def layer(self, number: int) -> tuple[Weight, ...]:
        """The weights of one layer."""
        return self._by_layer[number]

    @cached_property
    def _by_layer(self) -> dict[int, tuple[Weight, ...]]:
        found: dict[int, list[Weight]] = {number: [] for number in range(self.layers)}
        for weight in self.weights:
            if weight.name.startswith("model.layers."):
                found[int(weight.name.split(".")[2])].append(weight)
        return {number: tuple(weights) for number, weights in found.items()}

    @cached_property
    def active_matrix_parameters(self) -> int:
        """Weights of the layers that one token is multiplied with; no embedding, no head."""
        total = 0
        for weight in self.weights:
            if weight.kind == "linear" and weight.module != "lm_head":
                total += weight.numel
            elif weight.kind == "experts":
                assert self.family.experts is not None
                total += (
                    weight.numel // weight.shape[0] * self.config[self.family.experts.per_token]
                )
        return total


def model_shape(config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
    """The shape of the causal language model that a config.json describes.

    Args:
        vocabulary: rows of the embedding, where the tokenizer has more tokens than the model.

    Raises:
        UnknownArchitectureError: for a `model_type` that is not in `FAMILIES`, or without sizes.
    """
    text, kind = config, config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None and isinstance(config.get("text_config"), Mapping):
        # A model of images too holds more than its text part: the count would be wrong.
        kind = kind or config["text_config"].get("model_type")
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnknownArchitectureError(
            f"model_type {kind or 'none given'!r} is not known here (known: {known})"
        )
    filled = {**family.defaults, **{k: v for k, v in text.items() if v is not None}}
    try:
        filled["vocab_size"] = max(vocabulary or 0, filled.get("vocab_size", 0))
        if not 0 < int(filled["num_hidden_layers"]) <= _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {filled['num_hidden_layers']}")
        return _checked(_shape(str(kind), family, filled))
    except KeyError as missing:
        raise UnknownArchitectureError(f"its config.json does not say {missing}") from missing
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UnknownArchitectureError(f"the sizes in its config.json are odd: {error}") from error


def _checked(shape: ModelShape) -> ModelShape:
    for weight in shape.weights:
        if not all(type(side) is int and side > 0 for side in weight.shape):
            raise ValueError(f"{weight.name} would be of shape {weight.shape}")
    return shape


def _shape(kind: str, family: Family, config: dict[str, Any]) -> ModelShape:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    attention = _attention_sizes(family, config)
    tied = bool(config.get("tie_word_embeddings", family.tied))
    weights = [Weight("model.embed_tokens.weight", (vocabulary, hidden), "embedding")]
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        parts = (
            *_attention(family, config, attention),
            *_feed_forward(family, config, number),
            *(w for name in family.norms for w in _norm(family, name, hidden)),
        )
        weights += (Weight(prefix + w.name, w.shape, w.kind) for w in parts)
    weights += (Weight(f"model.{w.name}", w.shape) for w in _norm(family, "norm", hidden))
    if not tied:
        weights.append(Weight("lm_head.weight", (vocabulary, hidden), "linear"))
    return ModelShape(kind, family, config, tuple(weights), attention, tied)


def _attention_sizes(family: Family, config: Mapping[str, Any]) -> Attention:
    heads = config["num_attention_heads"]
    if family.latent:
        size = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        return Attention(heads, heads, size, config["v_head_dim"])
    size = config.get("head_dim") or config["hidden_size"] // heads
    return Attention(heads, config.get("num_key_value_heads") or heads, size, size)


def _is(flag: Flag, config: Mapping[str, Any]) -> bool:
    return bool(config.get(flag, False)) if isinstance(flag, str) else flag


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (outputs, inputs), "linear")
    if bias:
        yield Weight(f"{name}.bias", (outputs,))


def _norm(family: Family, name: str, *shape: int) -> Iterator[Weight]:
    if family.norm_weight:
        yield Weight(f"{name}.weight", shape)
    if family.norm_bias:
        yield Weight(f"{name}.bias", shape)


def _attention(family: Family, config: Mapping[str, Any], sizes: Attention) -> Iterator[Weight]:
    hidden, name = config["hidden_size"], "self_attn."
    bias, o_bias = _is(family.qkv_bias, config), _is(family.o_bias, config)
    q, kv = sizes.query_heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    if family.sinks:
        yield Weight(f"{name}sinks", (sizes.query_heads,))
    if family.latent:
        yield from _latent_projections(config, sizes, o_bias)
    elif family.fused_qkv:
        yield from _linear(f"{name}qkv_proj", hidden, q + 2 * kv, bias)
    else:
        yield from _linear(f"{name}q_proj", hidden, q, bias)
        yield from _linear(f"{name}k_proj", hidden, kv, bias)
        yield from _linear(f"{name}v_proj", hidden, kv, bias)
    yield from _linear(f"{name}o_proj", sizes.query_heads * sizes.value_size, hidden, o_bias)
    if family.qk_norm and _is(family.qk_norm_if, config):
        heads = {"q_norm": sizes.query_heads, "k_norm": sizes.kv_heads}
        for norm, count in heads.items():
            shape = {
                "head": (sizes.head_size,),
                "full": (count * sizes.head_size,),
                "grid": (count, sizes.head_size),
            }[family.qk_norm]
            yield Weight(f"{name}{norm}.weight", shape)


def _latent_projections(
    config: Mapping[str, Any], sizes: Attention, bias: bool
) -> Iterator[Weight]:
    name, hidden, heads = "self_attn.", config["hidden_size"], sizes.query_heads
    q_rank, kv_rank = config.get("q_lora_rank"), config["kv_lora_rank"]
    if q_rank:
        yield from _linear(f"{name}q_a_proj", hidden, q_rank, bias)
        yield Weight(f"{name}q_a_layernorm.weight", (q_rank,))
        yield from _linear(f"{name}q_b_proj", q_rank, heads * sizes.head_size, False)
    else:
        yield from _linear(f"{name}q_proj", hidden, heads * sizes.head_size, False)
    rope = config["qk_rope_head_dim"]
    yield from _linear(f"{name}kv_a_proj_with_mqa", hidden, kv_rank + rope, bias)
    yield Weight(f"{name}kv_a_layernorm.weight", (kv_rank,))
    both = config["qk_nope_head_dim"] + sizes.value_size
    yield from _linear(f"{name}kv_b_proj", kv_rank, heads * both, False)


def _feed_forward(family: Family, config: Mapping[str, Any], layer: int) -> Iterator[Weight]:
    if family.experts is not None and not _is_dense(config, layer):
        yield from _experts(family.experts, config)
        return
    hidden, width = config["hidden_size"], config["intermediate_size"]
    bias = _is(family.mlp_bias, config)
    if family.plain_mlp:
        first, second = family.plain_mlp
        yield from _linear(f"mlp.{first}", hidden, width, bias)
        yield from _linear(f"mlp.{second}", width, hidden, bias)
    elif family.fused_gate_up:
        yield from _linear("mlp.gate_up_proj", hidden, 2 * width, bias)
        yield from _linear("mlp.down_proj", width, hidden, bias)
    else:
        yield from _gated("mlp.", hidden, width, bias)


def _gated(prefix: str, hidden: int, width: int, bias: bool = False) -> Iterator[Weight]:
    yield from _linear(f"{prefix}gate_proj", hidden, width, bias)
    yield from _linear(f"{prefix}up_proj", hidden, width, bias)
    yield from _linear(f"{prefix}down_proj", width, hidden, bias)


def _is_dense(config: Mapping[str, Any], layer: int) -> bool:
    """Whether this layer of a mixture of experts has a plain MLP all the same."""
    kinds = config.get("mlp_layer_types")
    if kinds:
        return kinds[layer] == "dense"
    if layer < config.get("first_k_dense_replace", 0):
        return True
    step = config.get("decoder_sparse_step", 1)
    return layer in config.get("mlp_only_layers", ()) or (layer + 1) % step != 0


def _experts(experts: Experts, config: Mapping[str, Any]) -> Iterator[Weight]:
    hidden, width = config["hidden_size"], config[experts.width]
    found = [config[key] for key in experts.count if key in config]
    if not found:
        raise KeyError(experts.count[0])
    count, block = found[0], experts.block
    up, down = (2 * width, hidden), (hidden, width)
    if experts.transposed:
        up, down = up[::-1], down[::-1]
    yield Weight(f"{block}.{experts.router}.weight", (count, hidden))
    if experts.router_bias:
        yield Weight(f"{block}.{experts.router}.bias", (count,))
    yield Weight(f"{block}.experts.gate_up_proj", (count, *up), "experts")
    yield Weight(f"{block}.experts.down_proj", (count, *down), "experts")
    if experts.bias:
        yield Weight(f"{block}.experts.gate_up_proj_bias", (count, 2 * width))
        yield Weight(f"{block}.experts.down_proj_bias", (count, hidden))
    if experts.shared:
        beside = (
            config[experts.shared_width]
            if experts.shared_width
            else (width * config["n_shared_experts"])
        )
        yield from _gated(f"{block}.{experts.shared}.", hidden, beside)
    if experts.shared_gate:
        yield from _linear(f"{block}.shared_expert_gate", hidden, 1, False)


def stored_parameters(directory: Path) -> int | None:
    """Numbers in the safetensors files of a directory, by their headers; None without files.

    Raises:
        ValueError: for a file that is no safetensors file.
    """
    files = sorted(directory.glob("*.safetensors"))
    return sum(_stored(path) for path in files) if files else None


def _stored(path: Path) -> int:
    with path.open("rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER + 1
        if size > _MAX_HEADER:
            raise ValueError(f"{path} is no safetensors file")
        tensors = json.loads(file.read(size))
    return sum(math.prod(t["shape"]) for name, t in tensors.items() if name != "__metadata__")

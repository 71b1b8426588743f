"""How many bytes of state an optimizer keeps for what it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_BLOCK = 256
"""Values that share a scale in bitsandbytes' and torchao's 8-bit states (their defaults)."""
_SMALL = 4096
"""bitsandbytes keeps states of tensors up to this size in 32 bits (`min_8bit_size`)."""


@dataclass(frozen=True)
class State:
    """What is kept for each parameter."""

    moments: float
    """Bytes a parameter."""
    factored: bool = False
    """And a float32 for each row and column of a matrix."""
    quantized: bool = False
    """In blocks with scales; small tensors and embeddings stay in float32."""
    temporaries: float = 0.0
    """Bytes a parameter that a step needs besides."""


_ADAM_LIKE = State(8.0, temporaries=4.0)  # torch's foreach form holds one list of roots
STATES: dict[str, State] = {
    "adamw_torch": _ADAM_LIKE,
    "adamw_torch_fused": State(8.0),
    "adafactor": State(0.0, factored=True, temporaries=4.0),
    "sgd": State(0.0),
    "adagrad": State(4.0, temporaries=4.0),
    "rmsprop": State(4.0, temporaries=4.0),
    "muon": State(4.0, temporaries=4.0),
    "ademamix": State(12.0),
    "ademamix_8bit": State(3.0, quantized=True),
    "adamw_bnb_8bit": State(2.0, quantized=True),
    "adamw_8bit": State(2.0, quantized=True),
    "lion_8bit": State(1.0, quantized=True),
    "lion_32bit": State(4.0),
    "rmsprop_bnb": State(4.0),
    "rmsprop_bnb_32bit": State(4.0),
    "rmsprop_bnb_8bit": State(1.0, quantized=True),
    "paged_adamw_32bit": State(8.0),
    "adamw_torch_8bit": State(2.0, quantized=True),
    "ao_adamw_8bit": State(2.0, quantized=True),
    "adamw_torch_4bit": State(1.0, quantized=True),
    "ao_adamw_4bit": State(1.0, quantized=True),
    "ao_adamw_fp8": State(2.0, quantized=True),
    "schedule_free_adamw": _ADAM_LIKE,
    "schedule_free_radam": _ADAM_LIKE,
    "schedule_free_sgd": State(4.0, temporaries=4.0),
    "stable_adamw": _ADAM_LIKE,
    "optimi_adamw": _ADAM_LIKE,
    "came_pytorch": State(4.0, factored=True, temporaries=4.0),
}
"""By the optimizer's name in a recipe; those that are not here project gradients to low rank."""


def state_of(optimizer: str) -> tuple[State, bool]:
    """(its state, whether that is known); an unknown one counts as AdamW."""
    name = optimizer.removeprefix("paged_") if optimizer not in STATES else optimizer
    return STATES.get(name, _ADAM_LIKE), name in STATES


def state_bytes(optimizer: str, tensors: Iterable[tuple[tuple[int, ...], bool]]) -> float:
    """Bytes of the state of tensors, given as (shape, whether it is an embedding)."""
    state, _ = state_of(optimizer)
    total = 0.0
    for shape, is_embedding in tensors:
        size = 1
        for side in shape:
            size *= side
        total += _tensor_bytes(state, shape, size, is_embedding)
    return total


def _tensor_bytes(state: State, shape: tuple[int, ...], size: int, is_embedding: bool) -> float:
    if state.quantized:
        if size <= _SMALL or is_embedding:
            return state.moments * 4 * size
        return state.moments * size * (1 + 4 / _BLOCK)
    if state.factored:
        if len(shape) < 2:
            return (state.moments + 4) * size
        matrices = size // (shape[-1] * shape[-2])
        return state.moments * size + 4 * matrices * (shape[-1] + shape[-2])
    return state.moments * size

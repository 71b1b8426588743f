"""How many bytes of state an optimizer keeps for what it trains.

`tests/tasks/forecast/test_optimizer_state.py` compares with the optimizers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_SMALL = 4096
"""bitsandbytes and torchao keep states of smaller tensors in 32 bits (`min_8bit_size`, numel)."""

Tensor = tuple[tuple[int, ...], str]
"""(shape, "embedding", "head" or "")."""


@dataclass(frozen=True)
class State:
    """What is kept for each parameter."""

    moments: float
    """Bytes a parameter."""
    factored: int = 0
    """Second moments that are a float32 for each row and column of a matrix."""
    block: int = 0
    """Values of a quantized moment that share a float32 scale; 0: nothing is quantized."""
    wide: float = 0.0
    """Bytes a parameter where a quantized moment stays in float32."""
    embeddings_wide: bool = False
    """Transformers has bitsandbytes keep those of embeddings in 32 bits."""
    matrices_only: bool = False
    """Vectors, embedding and head are AdamW's."""
    temporaries: float = 0.0
    """Bytes a parameter that a step needs besides."""


def _bnb(moments: int) -> State:
    """So many in 8 bits; 256 values to a scale."""
    return State(moments, block=256, wide=4.0 * moments, embeddings_wide=True)


_ADAM_LIKE = State(8.0, temporaries=4.0)  # torch's foreach form holds one list of roots
STATES: dict[str, State] = {
    "adamw_torch": _ADAM_LIKE,
    "adamw_torch_fused": State(8.0),
    "adafactor": State(0.0, factored=1, temporaries=4.0),
    "sgd": State(0.0),
    "adagrad": State(4.0, temporaries=4.0),
    "rmsprop": State(4.0, temporaries=4.0),
    "muon": State(4.0, matrices_only=True, temporaries=4.0),
    "ademamix": State(12.0),
    "ademamix_8bit": _bnb(3),
    "adamw_bnb_8bit": _bnb(2),
    "adamw_8bit": _bnb(2),
    "lion_8bit": _bnb(1),
    "lion_32bit": State(4.0),
    "rmsprop_bnb": State(4.0),
    "rmsprop_bnb_32bit": State(4.0),
    "rmsprop_bnb_8bit": _bnb(1),
    "paged_adamw_32bit": State(8.0),
    "paged_ademamix_32bit": State(12.0),
    "paged_lion_32bit": State(4.0),
    "adamw_torch_8bit": State(2.0, block=256, wide=8.0),
    "ao_adamw_8bit": State(2.0, block=256, wide=8.0),
    "adamw_torch_4bit": State(1.0, block=128, wide=8.0),
    "ao_adamw_4bit": State(1.0, block=128, wide=8.0),
    "ao_adamw_fp8": State(2.0, block=256, wide=8.0),
    "schedule_free_adamw": _ADAM_LIKE,
    "schedule_free_radam": _ADAM_LIKE,
    "schedule_free_sgd": State(4.0, temporaries=4.0),
    "stable_adamw": _ADAM_LIKE,
    "optimi_adamw": _ADAM_LIKE,
    "came_pytorch": State(4.0, factored=2, temporaries=4.0),
}
"""By the optimizer's name in a recipe; those that are not here project gradients to low rank."""


def state_of(optimizer: str) -> tuple[State, bool]:
    """(its state, whether that is known); an unknown one counts as AdamW."""
    name = optimizer.removeprefix("paged_") if optimizer not in STATES else optimizer
    return STATES.get(name, _ADAM_LIKE), name in STATES


def state_bytes(optimizer: str, tensors: Iterable[Tensor]) -> float:
    """Bytes of the state of tensors."""
    state, _ = state_of(optimizer)
    return sum(_tensor_bytes(state, *tensor) for tensor in tensors)


def _tensor_bytes(state: State, shape: tuple[int, ...], end: str) -> float:
    size = math.prod(shape)
    if state.matrices_only and (end or len(shape) != 2):
        return 8.0 * size
    if state.block:
        odd = size < _SMALL or (not state.embeddings_wide and size % state.block != 0)
        if odd or (state.embeddings_wide and end == "embedding"):
            return state.wide * size
        return state.moments * size + 4 * (state.wide / 4) * math.ceil(size / state.block)
    if state.factored and len(shape) < 2:
        return (state.moments + 4) * size
    if state.factored:
        lines = size // (shape[-1] * shape[-2]) * (shape[-1] + shape[-2])
        return state.moments * size + 4 * state.factored * lines
    return state.moments * size

"""Which adapter is put on a model (`AdapterSettings`). Light: a plan is made with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdapterSettings:
    """A LoRA adapter; the names are PEFT's, less the prefix `lora_`."""

    r: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    """Names (endings) of layers, or one regular expression. None and no `target_linear`: PEFT's
    choice for the architecture."""
    target_linear: bool = False
    """Every linear layer but the output head, and `target_modules` too."""
    target_parameters: tuple[str, ...] = ()
    """Names of parameters outside of linear layers, such as those of a layer of experts."""
    exclude_modules: tuple[str, ...] | str | None = None
    """Names of layers, or one regular expression."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    """Numbers of the transformer layers that are adapted; None: all."""
    layers_pattern: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    init: bool | str = True
    """First values; "eva" needs the data, see `regrow.tasks.modeling.first_values`."""
    loftq: Mapping[str, int] = field(default_factory=dict)
    """PEFT's `loftq_config`, for init "loftq"."""
    modules_to_save: tuple[str, ...] = ()
    """Layers trained whole and stored with the adapter."""
    trainable_tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    """Token ids whose embeddings are trained, or {layer: ids}."""

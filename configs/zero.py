"""DeepSpeed's ZeRO: which stage a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def zero_stage(deepspeed: Mapping[str, Any] | None) -> Any:
    """0 where nothing is divided; what is no stage at all comes back as it is written.

    Args:
        deepspeed: DeepSpeed's configuration; None: not DeepSpeed.
    """
    options = (deepspeed or {}).get("zero_optimization")
    return options.get("stage", 0) if isinstance(options, Mapping) else 0

"""How much work each training row is, so that ranks which wait for each other get equal shares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from regrow.tasks.modeling.row_sizes import costs, read_sizes
from regrow.tasks.stage import StageError

_USUAL_HIDDEN_SIZE = 4096  # of a model whose configuration does not name it; 7B models have it


def row_costs(prepared: Path, base_model: str | Path) -> np.ndarray | None:
    """About the work of each training row: float64 [rows]; None where sizes were not stored."""
    sizes = read_sizes(prepared, "train")
    return None if sizes is None else costs(sizes, _hidden_size(Path(base_model)))


def row_lengths(prepared: Path) -> np.ndarray:
    """Tokens of each training row: int64 [rows]. Raises StageError where they were not stored."""
    sizes = read_sizes(prepared, "train")
    if sizes is None:
        raise StageError(
            f"group_by_length: {prepared} does not say how long its rows are; prepare it again"
        )
    return sizes[:, 0]


def _hidden_size(base_model: Path) -> int:
    path = base_model / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    size = config.get("hidden_size") or config.get("text_config", {}).get("hidden_size")
    return int(size or _USUAL_HIDDEN_SIZE)

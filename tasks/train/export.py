"""Writes the result of training: the same bytes on every machine, and nothing but the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.modeling_utils import PreTrainedModel

from regrow.tasks.modeling.rounding import round_weights
from regrow.tasks.modeling.rounds import Rounds


def save_adapter(model: PeftModel, out: Path, first_values: Path | None = None) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`, in the form that PEFT loads.

    Args:
        first_values: the adapter before training, where it changed the base it stands on. What is
            stored is then the difference, of twice the rank, which fits the original base.
    """
    model.save_pretrained(
        str(out),
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(first_values) if first_values else None,
    )
    _make_portable(out)


def save_rounds(rounds: Rounds, out: Path) -> None:
    """The same for the finished rounds of a ReLoRA training, as one adapter."""
    rounds.save_adapter(out)
    _make_portable(out)


def _make_portable(out: Path) -> None:
    (out / "README.md").unlink(missing_ok=True)  # PEFT's model card: it names a local path
    path = out / "adapter_config.json"
    path.write_text(json.dumps(_portable(json.loads(path.read_text())), indent=2, sort_keys=True))


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Without the base model's path; lists that PEFT keeps as sets (random order) are sorted."""
    for name in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    return config | {"base_model_name_or_path": None, "revision": None}  # nothing of a machine


def save_model(model: PreTrainedModel, out: Path, dtype: torch.dtype, use_cache: bool) -> None:
    """Safetensors in `dtype` with config.json, in the form that Transformers loads.

    The model itself is rounded to `dtype`, see `regrow.tasks.modeling.rounding`.

    Args:
        use_cache: what the base model's config says of the key-value cache; training turns it off.
    """
    round_weights(model, dtype)
    model.config.use_cache = use_cache
    model.save_pretrained(str(out))

"""First values of an adapter that come from the data or the base: EVA, PiSSA, OLoRA, LoftQ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, initialize_lora_eva_weights

from regrow.tasks.modeling.adapter import cast_trainable
from regrow.tasks.modeling.batches import PackedRow, flatten
from regrow.tasks.stage import StageError

_CHANGES_BASE = ("pissa", "olora", "loftq")
"""Initialisations that put a part of the base weights into the adapter. What is stored at the end
is the difference to the first values, which fits the original base."""

_EVA_BATCHES = 16
"""PEFT goes round them until the directions settle; some 10 batches do (EVA, arXiv 2410.07170)."""

_TOKENS_PER_DIRECTION = 4  # of a batch: PEFT's rho of 2, doubled; with fewer it would never settle


def changes_base(init: bool | str) -> bool:
    """Whether an adapter of this initialisation does not fit the base model as it is stored."""
    return isinstance(init, str) and init.startswith(_CHANGES_BASE)


def initialise_from_data(model: PeftModel, rows: Iterable[PackedRow]) -> None:
    """EVA's first values: the directions in which the layers' inputs vary most.

    Args:
        rows: of the training data, the same on every rank; as many are read as are needed.

    Raises:
        StageError: they hold too few supervised tokens for the adapter's rank.
    """
    config: Any = model.peft_config["default"]
    directions = max((config.r, *config.rank_pattern.values()))
    batches = _batches(rows, _TOKENS_PER_DIRECTION * directions)
    if not batches:
        raise StageError(
            f"peft_init_lora_weights: eva needs {_TOKENS_PER_DIRECTION * directions} supervised "
            f"tokens for a rank of {directions}, and the data has fewer; lower lora_r"
        )
    initialize_lora_eva_weights(
        model, batches, gather_distributed_inputs=False, show_progress_bar=False
    )
    cast_trainable(model, torch.float32)


def _batches(rows: Iterable[PackedRow], least: int) -> list[Mapping[str, Any]]:
    """Batches of whole rows with at least so many supervised tokens each."""
    batches, waiting, supervised = [], [], 0
    for row in rows:
        waiting.append(row)
        supervised += int(row.loss_mask.sum())
        if supervised >= least:
            batches.append(flatten(waiting))
            waiting, supervised = [], 0
        if len(batches) == _EVA_BATCHES:
            break
    return batches


def keep_first_values(model: PeftModel, directory: Path) -> None:
    """Store the adapter as it is before training: what PEFT's `save_pretrained` takes off at the
    end, as `path_initial_model_for_weight_conversion`.

    The stored configuration says nothing of how they came to be: read again, they are plain values.
    """
    model.save_pretrained(str(directory), save_embedding_layers=False)
    config: Any = LoraConfig.from_pretrained(str(directory))
    config.init_lora_weights = True
    config.save_pretrained(str(directory))

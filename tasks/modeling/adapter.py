"""Puts a LoRA adapter on a base model: float32 adapter weights over a frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from regrow.tasks.stage import StageError

SAFE_INITS = (True, False, "gaussian", "orthogonal")
"""Initialisations that leave the base weights alone. The others (pissa, olora, corda, loftq, eva,
...) change the base or need data, so that the adapter by itself would not hold the result."""


def add_adapter(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    target_linear: bool = False,
    rslora: bool = False,
    dora: bool = False,
    init: bool | str = True,
    modules_to_save: Sequence[str] = (),
) -> PeftModel:
    """The model with a fresh adapter; all that trains is float32.

    Args:
        target_modules: names (endings) of layers, or one regular expression. None and no
            `target_linear`: PEFT's choice for the architecture.
        target_linear: every linear layer but the output head, and `target_modules` too.
        modules_to_save: layers trained whole and stored with the adapter.

    Raises:
        StageError: an initialisation that is not safe, or targets that the model has not.
    """
    if init not in SAFE_INITS:
        raise StageError(
            f"peft_init_lora_weights: {init!r} changes the base or needs data, which is not "
            f"supported; choose one of {', '.join(map(str, SAFE_INITS))}"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (floats work too)
        lora_dropout=dropout,
        target_modules=_targets(model, target_modules, target_linear),
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights=init,  # pyright: ignore[reportArgumentType]
        modules_to_save=sorted(modules_to_save) or None,
        ensure_weight_tying=_trains_a_tied_end(model, modules_to_save),
    )
    try:
        adapted: Any = get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:
        raise StageError(
            f"lora_target_modules: no adapter can be put on this model: {error} "
            "(lora_target_linear: true takes every linear layer)"
        ) from error
    _cast_trainable(adapted, torch.float32)
    return adapted


def embedding_names(model: PreTrainedModel) -> set[str]:
    """Names of the layers that new tokens need trained: the embedding, and the head if not tied."""
    head = None if _is_tied(model) else model.get_output_embeddings()
    ends = [model.get_input_embeddings(), *([head] if head is not None else [])]
    named = {id(module): name for name, module in model.named_modules()}
    return {named[id(module)].rpartition(".")[2] for module in ends}


def _trains_a_tied_end(model: PreTrainedModel, modules_to_save: Sequence[str]) -> bool:
    """Whether a copy of one end would be trained and leave the other end behind."""
    return _is_tied(model) and bool({*embedding_names(model), "lm_head"} & set(modules_to_save))


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


def load_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """The model with the adapter stored in `directory`, frozen.

    Raises:
        StageError: when the adapter is not there or is of another model.
    """
    if not (directory / "adapter_config.json").is_file():
        raise StageError(f"{directory} holds no adapter (no adapter_config.json)")
    try:
        return PeftModel.from_pretrained(model, str(directory))
    except (ValueError, RuntimeError, OSError) as error:
        raise StageError(f"the adapter in {directory} does not fit the model: {error}") from error


def _targets(
    model: PreTrainedModel, named: Sequence[str] | str | None, linear: bool
) -> str | list[str] | None:
    if not named:
        return "all-linear" if linear else None
    if isinstance(named, str):
        if linear:
            raise StageError(
                f"lora_target_modules: {named!r} is a pattern and cannot be joined with "
                "lora_target_linear: true; keep one of the two"
            )
        return named
    if not linear:
        return sorted(named)
    head = model.get_output_embeddings()
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return sorted(layers | set(named))


def _cast_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    """PEFT leaves `modules_to_save` in the base's dtype, where small updates round away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)

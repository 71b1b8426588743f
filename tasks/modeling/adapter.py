"""Puts a LoRA adapter on a base model: float32 adapter weights over a frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from regrow.tasks.modeling.adapter_settings import AdapterSettings
from regrow.tasks.stage import StageError


def add_adapter(model: PreTrainedModel, **settings: Any) -> PeftModel:
    """The model with a fresh adapter; all that trains is float32.

    Args:
        settings: the fields of `AdapterSettings`.

    Raises:
        StageError: for targets that the model has not, or an initialisation that does not work.
    """
    wanted = AdapterSettings(**settings)
    _check(model, wanted)
    try:
        adapted: Any = get_peft_model(model, _lora_config(model, wanted))
    except (ValueError, NotImplementedError, TypeError) as error:
        raise StageError(
            f"lora_target_modules: no adapter can be put on this model: {error} "
            "(lora_target_linear: true takes every linear layer)"
        ) from error
    cast_trainable(adapted, torch.float32)
    return adapted


def _check(model: PreTrainedModel, wanted: AdapterSettings) -> None:
    """What PEFT would pass over, or say in other words."""
    if wanted.init == "loftq" and not torch.cuda.is_available():
        raise StageError(
            "peft_init_lora_weights: PEFT computes loftq on a CUDA device only, and there is none; "
            "use pissa, or true"
        )
    for target in wanted.target_parameters:
        if not any(name.endswith(target) for name, _ in model.named_parameters()):
            raise StageError(f"lora_target_parameters: no parameter's name ends in {target!r}")


def _lora_config(model: PreTrainedModel, wanted: AdapterSettings) -> LoraConfig:
    loftq = dict(wanted.loftq or {"loftq_bits": 4, "loftq_iter": 1})
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": wanted.r,
        "lora_alpha": wanted.alpha,
        "lora_dropout": wanted.dropout,
        "target_modules": _targets(model, wanted),
        "target_parameters": list(wanted.target_parameters) or None,
        "exclude_modules": _listed(wanted.exclude_modules),
        "rank_pattern": dict(wanted.rank_pattern),
        "alpha_pattern": dict(wanted.alpha_pattern),
        "layers_to_transform": None if wanted.layers is None else list(wanted.layers),
        "layers_pattern": list(wanted.layers_pattern) or None,
        "use_rslora": wanted.rslora,
        "use_dora": wanted.dora,
        "init_lora_weights": wanted.init,
        "loftq_config": loftq if wanted.init == "loftq" else {},
        "eva_config": EvaConfig() if wanted.init == "eva" else None,
        "modules_to_save": sorted(wanted.modules_to_save) or None,
        "trainable_token_indices": _token_ids(wanted.trainable_tokens),
        "ensure_weight_tying": _trains_a_tied_end(model, wanted),
    }
    return LoraConfig(**settings)


def embedding_names(model: PreTrainedModel) -> set[str]:
    """Names of the layers that new tokens need trained: the embedding, and the head if not tied."""
    head = None if _is_tied(model) else model.get_output_embeddings()
    ends = [model.get_input_embeddings(), *([head] if head is not None else [])]
    named = {id(module): name for name, module in model.named_modules()}
    return {named[id(module)].rpartition(".")[2] for module in ends}


def _trains_a_tied_end(model: PreTrainedModel, wanted: AdapterSettings) -> bool:
    """Whether a copy of one end would be trained and leave the other end behind."""
    ends = {*embedding_names(model), "lm_head"} & set(wanted.modules_to_save)
    return _is_tied(model) and bool(ends or wanted.trainable_tokens)


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


def load_adapter(model: PreTrainedModel, directory: Path, *, trainable: bool = False) -> PeftModel:
    """The model with the adapter stored in `directory`, frozen unless it is to be trained.

    Raises:
        StageError: when the adapter is not there or is of another model.
    """
    if not (directory / "adapter_config.json").is_file():
        raise StageError(f"{directory} holds no adapter (no adapter_config.json)")
    try:
        # With low_cpu_mem_usage the tensors of the file are taken as they are, not copied.
        adapted = PeftModel.from_pretrained(
            model, str(directory), is_trainable=trainable, low_cpu_mem_usage=True
        )
        if trainable:
            cast_trainable(adapted, torch.float32)
        return adapted
    except (ValueError, RuntimeError, OSError) as error:
        raise StageError(f"the adapter in {directory} does not fit the model: {error}") from error


def _listed(names: Sequence[str] | str | None) -> list[str] | str | None:
    return names if names is None or isinstance(names, str) else sorted(names)


def _token_ids(
    tokens: Sequence[int] | Mapping[str, Sequence[int]] | None,
) -> list[int] | dict[str, list[int]] | None:
    if isinstance(tokens, Mapping):
        return {layer: list(ids) for layer, ids in tokens.items()}
    return None if tokens is None else list(tokens)


def _targets(model: PreTrainedModel, wanted: AdapterSettings) -> str | list[str] | None:
    """PEFT's `target_modules`; it counts layers only where the targets are names."""
    named, linear, by_name = wanted.target_modules, wanted.target_linear, wanted.layers is not None
    if not named and not (linear and by_name):
        return "all-linear" if linear else None
    if isinstance(named, str):
        if linear:
            raise StageError(
                f"lora_target_modules: {named!r} is a pattern and cannot be joined with "
                "lora_target_linear: true; keep one of the two"
            )
        return named
    if not linear:
        return sorted(named or ())
    head = model.get_output_embeddings()
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if by_name:
        layers = {name.rpartition(".")[2] for name in layers}
    return sorted(layers | set(named or ()))


def cast_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    """PEFT leaves `modules_to_save` in the base's dtype, where small updates round away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)

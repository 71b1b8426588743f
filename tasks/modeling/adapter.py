"""Puts a LoRA adapter on a base model: float32 adapter weights over a frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from regrow.tasks.stage import StageError


def add_adapter(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    target_linear: bool = False,
    target_parameters: Sequence[str] = (),
    exclude_modules: Sequence[str] | str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    layers_pattern: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
    init: bool | str = True,
    loftq: Mapping[str, int] | None = None,
    modules_to_save: Sequence[str] = (),
    trainable_tokens: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> PeftModel:
    """The model with a fresh adapter; all that trains is float32.

    Args:
        target_modules: names (endings) of layers, or one regular expression. None and no
            `target_linear`: PEFT's choice for the architecture.
        target_linear: every linear layer but the output head, and `target_modules` too.
        target_parameters: names of parameters outside of linear layers, such as experts'.
        layers: numbers of the transformer layers that are adapted; None: all.
        init: first values; "eva" still needs `first_values.initialise_from_data`.
        modules_to_save: layers trained whole and stored with the adapter.
        trainable_tokens: token ids whose embeddings are trained, or {layer: ids}.

    Raises:
        StageError: for targets that the model has not, or an initialisation that does not work.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (floats work too)
        lora_dropout=dropout,
        target_modules=_targets(model, target_modules, target_linear, by_name=layers is not None),
        target_parameters=list(target_parameters) or None,
        exclude_modules=_listed(exclude_modules),
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),  # pyright: ignore[reportArgumentType]
        layers_to_transform=None if layers is None else list(layers),
        layers_pattern=list(layers_pattern) or None,
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights=init,  # pyright: ignore[reportArgumentType]
        loftq_config=dict(loftq or {"loftq_bits": 4, "loftq_iter": 1}) if init == "loftq" else {},
        eva_config=EvaConfig() if init == "eva" else None,
        modules_to_save=sorted(modules_to_save) or None,
        trainable_token_indices=_token_ids(trainable_tokens),
        ensure_weight_tying=_trains_a_tied_end(model, modules_to_save, trainable_tokens),
    )
    if init == "loftq" and not torch.cuda.is_available():
        raise StageError(
            "peft_init_lora_weights: PEFT computes loftq on a CUDA device only, and there is none; "
            "use pissa, or true"
        )
    for target in target_parameters:
        if not any(name.endswith(target) for name, _ in model.named_parameters()):
            raise StageError(f"lora_target_parameters: no parameter's name ends in {target!r}")
    try:
        adapted: Any = get_peft_model(model, config)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise StageError(
            f"lora_target_modules: no adapter can be put on this model: {error} "
            "(lora_target_linear: true takes every linear layer)"
        ) from error
    cast_trainable(adapted, torch.float32)
    return adapted


def embedding_names(model: PreTrainedModel) -> set[str]:
    """Names of the layers that new tokens need trained: the embedding, and the head if not tied."""
    head = None if _is_tied(model) else model.get_output_embeddings()
    ends = [model.get_input_embeddings(), *([head] if head is not None else [])]
    named = {id(module): name for name, module in model.named_modules()}
    return {named[id(module)].rpartition(".")[2] for module in ends}


def _trains_a_tied_end(
    model: PreTrainedModel, modules_to_save: Sequence[str], tokens: object
) -> bool:
    """Whether a copy of one end would be trained and leave the other end behind."""
    ends = {*embedding_names(model), "lm_head"}
    return _is_tied(model) and (bool(ends & set(modules_to_save)) or bool(tokens))


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


def _targets(
    model: PreTrainedModel, named: Sequence[str] | str | None, linear: bool, by_name: bool
) -> str | list[str] | None:
    """PEFT's `target_modules`; `by_name`: "all-linear" is spelt out as the names of layers."""
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

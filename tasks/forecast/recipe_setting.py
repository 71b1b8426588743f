"""From a recipe and its model's config.json to what the memory model needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.configs.recipe import Recipe
from regrow.infra import hub
from regrow.tasks.forecast.activations import FULL, HALF, KERNELS
from regrow.tasks.forecast.fit import Choice, Wish
from regrow.tasks.forecast.memory import Division, Setting
from regrow.tasks.forecast.model_shape import (
    ModelShape,
    UnknownArchitectureError,
    model_shape,
    stored_parameters,
)
from regrow.tasks.forecast.trainable import (
    Trainable,
    UnknownTargetsError,
    all_weights,
    with_adapter,
)
from regrow.tasks.modeling.adapter_settings import AdapterSettings
from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.sharding import Sharding


@dataclass(frozen=True)
class Model:
    """What is known of a base model."""

    directory: Path | None
    shape: ModelShape | None
    why_unknown: str = ""
    stored: int | None = None
    """Parameters in its files, where the shape is not known."""


def read_model(place: str) -> Model:
    """The model at a place: a directory, or the hub's cache. Never reads weights."""
    if hub.is_hub_place(place):
        try:
            directory = hub.local_directory(place, patterns=["config.json"])
        except hub.HubError as error:
            return Model(None, None, str(error))
    else:
        directory = Path(place)
    try:
        config = json.loads((directory / "config.json").read_text())
        return Model(directory, model_shape(config))
    except (OSError, UnknownArchitectureError) as error:
        return Model(directory, None, str(error), stored_parameters(directory))


def trainable_of(recipe: Recipe, shape: ModelShape) -> Trainable:
    """What the recipe trains of a model.

    Raises:
        UnknownTargetsError: where only the model itself can tell.
    """
    if not recipe.uses_adapter:
        return all_weights(shape, recipe.unfrozen_parameters)
    if recipe.lora_model_dir:
        return with_adapter(shape, _stored_adapter(Path(recipe.lora_model_dir)))
    spec = AdapterSpec.from_recipe(recipe)
    assert spec is not None
    return with_adapter(shape, spec)


def _stored_adapter(directory: Path) -> AdapterSettings:
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise UnknownTargetsError(f"lora_model_dir: {directory} is not on this machine")
    data = json.loads(path.read_text())
    targets = data.get("target_modules") or ()
    linear = targets == "all-linear"
    return AdapterSettings(
        r=data["r"],
        alpha=data["lora_alpha"],
        dropout=data.get("lora_dropout") or 0.0,
        target_modules=None if linear else targets if isinstance(targets, str) else tuple(targets),
        target_linear=linear,
        rank_pattern=data.get("rank_pattern") or {},
        dora=bool(data.get("use_dora")),
        modules_to_save=tuple(data.get("modules_to_save") or ()),
        target_parameters=tuple(data.get("target_parameters") or ()),
    )


def wish_of(recipe: Recipe, shape: ModelShape, processes: int) -> Wish:
    """The recipe's placement for the memory model.

    Raises:
        UnknownTargetsError: as `trainable_of`.
    """
    quantization = Quantization.from_recipe(recipe)
    settings: Mapping[str, Any] = quantization.settings if quantization else {}
    setting = Setting(
        shape,
        trainable_of(recipe, shape),
        tokens=recipe.sequence_len,
        optimizer=recipe.optimizer,
        kernels=_kernels(recipe),
        bits=quantization.bits if quantization else 16,
        double_quant=bool(settings.get("bnb_4bit_use_double_quant")),
        dtype_bytes=HALF if recipe.dtype == "bfloat16" else FULL,
        division=division_of(Sharding.from_recipe(recipe), processes),
    )
    asked = careful(recipe)
    return Wish(
        setting,
        row_tokens=recipe.sequence_len,
        global_batch=recipe.global_batch_size,
        micro_batch=None if recipe.micro_batch_size == "auto" else asked.micro_batch,
        checkpointing=None if recipe.gradient_checkpointing == "auto" else asked.checkpointing,
    )


def careful(recipe: Recipe) -> Choice:
    """The recipe's values, and what takes the least where it says `auto`."""
    micro = recipe.micro_batch_size
    return Choice(
        micro_batch=1 if micro == "auto" else int(micro),
        checkpointing=_checkpointing(recipe),
    )


def _checkpointing(recipe: Recipe) -> bool | str:
    if recipe.fsdp_config and recipe.fsdp_config.activation_checkpointing:
        return True
    wanted = recipe.gradient_checkpointing
    return True if wanted == "auto" else wanted


def _kernels(recipe: Recipe) -> tuple[str, ...]:
    """On a GPU; a recipe without the key leaves them on."""
    wanted = recipe.kernels
    if wanted == "auto":
        return KERNELS
    return () if wanted == "off" else tuple(name for name in KERNELS if name in wanted)


def division_of(sharding: Sharding, processes: int) -> Division:
    """How a model is laid over so many processes."""
    if processes == 1:
        return Division()
    if sharding.fsdp is not None:
        shards = sharding.dp_shard_size or processes // sharding.dp_replicate_size
        gathered = not sharding.fsdp["reshard_after_forward"]
        offloads = bool(sharding.fsdp["cpu_offload"])
        return Division(processes, shards, "fsdp2", gathered, offloads, offloads)
    if sharding.deepspeed is None:
        return Division(processes)
    zero = sharding.deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    return Division(
        processes,
        processes if stage else 1,
        f"zero{stage}" if stage else "ddp",
        offloads_optimizer=_is_offloaded(zero.get("offload_optimizer")),
        offloads_weights=_is_offloaded(zero.get("offload_param")),
    )


def _is_offloaded(option: Any) -> bool:
    return bool(option) and option.get("device", "none") != "none"

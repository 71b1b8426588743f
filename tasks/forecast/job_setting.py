"""From what a training is told (spec and placement) and its model's shape to the memory model.

Both sides use it: a plan before anything runs, and the worker once its model is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.configs.zero import zero_stage
from regrow.tasks.forecast.activations import FULL, HALF, KERNELS
from regrow.tasks.forecast.fit import Wish
from regrow.tasks.forecast.model_shape import ModelShape
from regrow.tasks.forecast.setting import Division, Setting
from regrow.tasks.forecast.trainable import (
    Trainable,
    UnknownTargetsError,
    all_weights,
    with_adapter,
)
from regrow.tasks.modeling.adapter_settings import AdapterSettings
from regrow.tasks.stage import StageError
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.spec import TrainPlacement, TrainSpec


@dataclass(frozen=True)
class Facts:
    """What spec and placement do not say."""

    shape: ModelShape
    row_tokens: int
    """Of the longest row."""
    processes: int = 1
    """Of the whole training."""
    kernels: tuple[str, ...] | None = None
    """Those that were put in; None: all that the placement asks for."""
    start_adapter: str | None = None
    """Directory of the adapter to go on from, where the spec names one."""


def wish_of_job(spec: TrainSpec, placement: TrainPlacement, facts: Facts) -> Wish:
    """What the memory model needs; a micro-batch of 0 rows and "auto" are left to be chosen.

    Raises:
        UnknownTargetsError: where only the model itself can tell what is trained.
        StageError: for processes that cannot be divided as the placement says.
    """
    quantization = spec.quantization
    settings: Mapping[str, Any] = quantization.settings if quantization else {}
    division = division_of(placement.sharding, facts.processes)
    setting = Setting(
        facts.shape,
        trainable_of(spec, facts),
        tokens=facts.row_tokens // division.context,
        optimizer=spec.optimizer,
        kernels=_kernels(placement) if facts.kernels is None else facts.kernels,
        bits=quantization.bits if quantization else 16,
        double_quant=bool(settings.get("bnb_4bit_use_double_quant")),
        quantized_experts=bool(quantization and quantization.experts),
        float8=spec.fp8 and spec.adapter is not None,
        dtype_bytes=HALF if spec.dtype == "bfloat16" else FULL,
        division=division,
    )
    asked = placement.gradient_checkpointing
    return Wish(
        setting,
        row_tokens=facts.row_tokens,
        global_batch=spec.global_batch_size,
        micro_batch=placement.micro_batch_size or None,
        checkpointing=None if asked == "auto" else asked,
    )


def trainable_of(spec: TrainSpec, facts: Facts) -> Trainable:
    """What a spec trains of a model.

    Raises:
        UnknownTargetsError: as `wish_of_job`.
    """
    if spec.adapter is None:
        return all_weights(facts.shape, spec.unfrozen)
    if spec.adapter.start is None:
        return with_adapter(facts.shape, spec.adapter)
    if facts.start_adapter is None:
        raise UnknownTargetsError("lora_model_dir: the adapter is not on this machine")
    return with_adapter(facts.shape, stored_adapter(Path(facts.start_adapter)))


def stored_adapter(directory: Path) -> AdapterSettings:
    """The settings of an adapter that PEFT has written.

    Raises:
        UnknownTargetsError: where there is none that can be read.
    """
    path = directory / "adapter_config.json"
    try:
        data = json.loads(path.read_text())
        targets = data.get("target_modules") or ()
        linear = targets == "all-linear"
        named = None if linear else targets if isinstance(targets, str) else tuple(targets)
        return AdapterSettings(
            r=int(data["r"]),
            alpha=data["lora_alpha"],
            dropout=data.get("lora_dropout") or 0.0,
            target_modules=named,
            target_linear=linear,
            rank_pattern=data.get("rank_pattern") or {},
            dora=bool(data.get("use_dora")),
            modules_to_save=tuple(data.get("modules_to_save") or ()),
            target_parameters=tuple(data.get("target_parameters") or ()),
        )
    except OSError as error:
        raise UnknownTargetsError(f"lora_model_dir: {path} cannot be read here") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnknownTargetsError(f"lora_model_dir: {path} is no adapter: {error}") from error


def _kernels(placement: TrainPlacement) -> tuple[str, ...]:
    """On a GPU, where "auto" means all whose weights are there."""
    wanted = placement.kernels if placement.sharding.tensor_parallel_size == 1 else "off"
    if isinstance(wanted, str):
        wanted = KERNELS if wanted == "auto" else ()
    apart = placement.sharding.kernels_apart
    return tuple(name for name in KERNELS if name in wanted and name not in apart)


def division_of(sharding: Sharding, processes: int) -> Division:
    """How a model is laid over so many processes.

    Raises:
        StageError: when they cannot be divided so.
    """
    context = sharding.context_parallel_size
    if processes % context:
        raise StageError(
            f"context_parallel_size: {processes} processes are no groups of {context}; lower it, "
            "or change num_processes"
        )
    if sharding.tensor_parallel_size > 1:  # as `regrow.tasks.train.parallel` has it
        return _cut(sharding, processes)
    if sharding.fsdp is not None and processes > 1:
        return _fsdp(sharding, processes)
    if processes == 1 or sharding.deepspeed is None:
        return Division(processes, context=context)
    zero = _mapping(sharding.deepspeed.get("zero_optimization"), "zero_optimization")
    stage = zero_stage(sharding.deepspeed)
    if stage not in (0, 1, 2, 3):
        raise StageError(f"deepspeed: zero_optimization.stage is {stage!r}; it is 0, 1, 2 or 3")
    return Division(
        processes,
        processes if stage else 1,
        f"zero{stage}" if stage else "ddp",
        offloads_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offloads_weights=_is_offloaded(zero, "offload_param"),
        context=context,
    )


def _cut(sharding: Sharding, processes: int) -> Division:
    """One copy over all processes, by tensor parallelism alone or with FSDP2 over groups of it."""
    cut = sharding.tensor_parallel_size
    if sharding.shards_of_layers(processes) == 1:
        return Division(processes, processes, "tp", cut=processes)
    if processes % cut:
        raise StageError(
            f"tensor_parallel_size: {processes} processes are no groups of {cut}; change one"
        )
    assert sharding.fsdp is not None
    gathered = not sharding.fsdp["reshard_after_forward"]
    return Division(processes, processes, "fsdp2", gathered, cut=cut)


def _fsdp(sharding: Sharding, processes: int) -> Division:
    """As `regrow.tasks.train.parallel` lays it out."""
    copies, context = sharding.dp_replicate_size, sharding.context_parallel_size
    shards = processes // copies
    if sharding.dp_shard_size:
        shards = sharding.dp_shard_size * context
    if shards < 1 or processes % shards or (processes // shards) % copies:
        raise StageError(
            f"dp_replicate_size: {processes} processes cannot be {copies} copies of a model"
            + (f" over {shards} each" if shards else "")
            + "; change num_processes, dp_replicate_size or dp_shard_size"
        )
    assert sharding.fsdp is not None
    gathered = not sharding.fsdp["reshard_after_forward"]
    offloads = bool(sharding.fsdp["cpu_offload"])
    return Division(processes, shards, "fsdp2", gathered, offloads, offloads, context)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if value is None or value is False:
        return {}
    if not isinstance(value, Mapping):
        raise StageError(f"deepspeed: {name} is {value!r}, not a mapping such as {{stage: 2}}")
    return value


def _is_offloaded(zero: Mapping[str, Any], name: str) -> bool:
    option = _mapping(zero.get(name), f"zero_optimization.{name}")
    return bool(option) and option.get("device", "none") != "none"

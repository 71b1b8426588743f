"""Placement on many processes in the words of Transformers' `TrainingArguments` and Accelerate."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from regrow.configs.optimizers import BY_ELEMENT
from regrow.infra.launch import world_size
from regrow.tasks.modeling.context_parallel import ContextGroup, check_divides
from regrow.tasks.modeling.tensor_parallel import check_accumulation
from regrow.tasks.stage import StageError
from regrow.tasks.train.gathering import rounds_before_sending
from regrow.tasks.train.optimizers import divides_parameters
from regrow.tasks.train.order import choose_split
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.spec import TrainPlacement, TrainSpec


def parallel_settings(spec: TrainSpec, placement: TrainPlacement) -> dict[str, Any]:
    """Arguments that say how the model is laid over the processes.

    Raises:
        StageError: when the processes do not divide as the recipe says.
    """
    sharding, processes = placement.sharding, world_size()
    check_divides(processes, sharding.context_parallel_size)
    _check_tensor_parallel(spec, placement, processes)
    groups = processes // sharding.context_parallel_size // sharding.tensor_parallel_size
    split = choose_split(spec.global_batch_size, placement.micro_batch_size, groups)
    settings: dict[str, Any] = {
        # DeepSpeed reads them while the arguments are built.
        "per_device_train_batch_size": split.micro_batch_size,
        "gradient_accumulation_steps": split.accumulation,
    }
    if sharding.deepspeed is not None:
        settings["deepspeed"] = _copied(sharding.deepspeed)
        # DeepSpeed computes in the type of its weights, and keeps float32 ones for the optimizer.
        settings["bf16"] = spec.dtype == "bfloat16"
    elif sharding.fsdp is not None and processes > 1 and sharding.tensor_parallel_size == 1:
        # Autocast computes as it does on one GPU; FSDP2 gets no precision for the whole model, as
        # norms and the sums between layers would then be rounded too (H200 x2, 8 layers of
        # Llama-3.1-8B's shape: loss 11.27 after 12 steps, where one GPU had 11.14). Matrices alone
        # travel rounded, in groups of their own: see `regrow.tasks.train.gathering`.
        settings |= {"fsdp": True, "fsdp_config": _copied(sharding.fsdp)}
        if rounds_before_sending(spec, sharding):
            settings["accelerator_config"] = _copied(_REDUCES_EACH)
        config = _mesh(sharding, processes)
        if config is not None:
            settings["parallelism_config"] = config
    return settings


_REDUCES_EACH = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
"""Gradients are added up over processes after each micro-batch, behind its backward pass. Else each
process would keep those of all weights whole, in float32, until the last one: 4 bytes of each
weight on every GPU (30 GiB for 8e9), which FSDP is there to avoid, read and written each time."""


def _check_tensor_parallel(spec: TrainSpec, placement: TrainPlacement, processes: int) -> None:
    """Raises StageError for what Transformers' tensor parallelism cannot be combined with."""
    size = placement.sharding.tensor_parallel_size
    if size == 1:
        return
    _check_copy(placement.sharding, processes)
    if placement.sharding.shards_of_layers(processes) > 1:
        _check_shards(spec, placement.sharding)
    if spec.quantization and (spec.quantization.bits == 8 or spec.quantization.experts):
        raise StageError(
            "tensor_parallel_size: of quantized bases linear layers in 4 bits alone are divided; "
            "use `load_in_4bit` without `quantize_moe_experts`, or DDP"
        )
    others = _not_divided(spec)
    if others:
        raise StageError(
            f"tensor_parallel_size: with divided layers there is no {', '.join(others)}; remove "
            "it, or use `fsdp_config`"
        )
    if not _accelerate_takes_it(placement.device):
        raise StageError(
            "tensor_parallel_size: Accelerate's ParallelismConfig takes it on GPUs only; use "
            "`fsdp_config` on the CPU"
        )


def _check_copy(sharding: Sharding, processes: int) -> None:
    """Raises StageError for processes that are not one copy of the model."""
    size, shards = sharding.tensor_parallel_size, sharding.dp_shard_size
    if sharding.fsdp is None and size != processes:
        raise StageError(
            f"tensor_parallel_size: {size} of {processes} training processes: a model divided this "
            "way is one copy over all of them; set it to their number, or add `fsdp_config`, "
            "which shards it over groups of them"
        )
    if processes % size or (shards is not None and shards * size != processes):
        wanted = f" * dp_shard_size {shards}" if shards else ""
        raise StageError(
            f"tensor_parallel_size: {size}{wanted} does not make {processes} training processes; "
            "change one of them"
        )


def _check_shards(spec: TrainSpec, sharding: Sharding) -> None:
    """Raises StageError for what FSDP2 cannot do beside divided layers, as Transformers has it."""
    fsdp = sharding.fsdp or {}
    asked = {
        "quantized base": spec.quantization,
        "dp_replicate_size": sharding.dp_replicate_size > 1,
        "fsdp_config.offload_params": fsdp.get("cpu_offload"),
        "SIZE_BASED_WRAP": fsdp.get("auto_wrap_policy") == "SIZE_BASED_WRAP",
    }
    others = [name for name, value in asked.items() if value]
    if others:
        raise StageError(
            f"tensor_parallel_size: beside fsdp_config there is no {', '.join(others)}; remove it, "
            "or one of the two"
        )


def _not_divided(spec: TrainSpec) -> list[str]:
    """What of a spec needs whole layers, or one kind of tensors in a group of the optimizer."""
    asked = {
        f"optimizer: {spec.optimizer}": spec.optimizer not in BY_ELEMENT,
        "learning rate for some layers": divides_parameters(spec),
        "unfrozen_parameters": spec.unfrozen,
        "reinit_weights": spec.reinit_weights,
        "relora": spec.relora,
        "output_router_logits": spec.router_aux_loss,
        "lora_model_dir": spec.adapter and spec.adapter.start,
    }
    return [name for name, value in asked.items() if value]


def _accelerate_takes_it(device: str) -> bool:
    """`ParallelismConfig._validate_accelerator` refuses processes on the CPU (accelerate 1.15)."""
    return device != "cpu" and torch.cuda.is_available()


def _mesh(sharding: Sharding, processes: int) -> ParallelismConfig | None:
    """Copies of the model and the processes of each; None where there is one copy.

    Those that share a row are among those that share a copy, as in Accelerate's own layout. Its
    `cp_size` is not used: it would take torch's ring attention, which mixes packed examples.
    """
    shards = processes // sharding.dp_replicate_size
    if sharding.dp_shard_size:
        shards = sharding.dp_shard_size * sharding.context_parallel_size
    copies = processes // max(shards, 1)
    if copies * shards != processes or copies % sharding.dp_replicate_size:
        raise StageError(
            f"dp_shard_size: {processes} processes cannot be {sharding.dp_replicate_size} copies "
            f"of a model over {shards} each; remove dp_shard_size or change num_processes"
        )
    if copies == 1:
        return None
    return ParallelismConfig(dp_replicate_size=copies, dp_shard_size=shards)


def share_rows(model: Any, sharding: Sharding, accumulation: int) -> None:
    """Let the model's attention reach the processes that share rows with this one, if any do.

    Raises:
        StageError: for a model whose rows cannot be cut, or whose layers could not be trained
            divided with so many micro-batches in a step.
    """
    if sharding.tensor_parallel_size > 1 and accumulation > 1:
        check_accumulation(model)
    if sharding.context_parallel_size > 1:
        ContextGroup.of(sharding.context_parallel_size).attach(model)


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    """Transformers fills these maps in, in place."""
    return copy.deepcopy(dict(options))


@contextlib.contextmanager
def whole_model_loading(args: TrainingArguments) -> Iterator[None]:
    """Inside, a model is loaded whole into the host's memory although DeepSpeed will divide it.

    Transformers would divide it while loading, which neither adapters nor a growing vocabulary can
    stand; DeepSpeed divides a whole one just as well, parameter by parameter, when it starts.
    """
    config = getattr(args, "hf_deepspeed_config", None)  # absent without DeepSpeed
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)

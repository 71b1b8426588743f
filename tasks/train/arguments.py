"""Spec and placement in the words of Transformers' `TrainingArguments`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from regrow.tasks.stage import StageError
from regrow.tasks.train.devices import check_devices, devices_here
from regrow.tasks.train.optimizers import check_optimizer, transformers_arguments
from regrow.tasks.train.parallel import parallel_settings
from regrow.tasks.train.spec import TrainPlacement, TrainSpec


def use_cpu(device: str) -> bool:
    """Whether to train on the CPU.

    Raises:
        StageError: CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise StageError('device "cuda" is asked for, but torch sees no CUDA device')
    return device == "cpu" or not torch.cuda.is_available()


def training_arguments(
    spec: TrainSpec,
    placement: TrainPlacement,
    *,
    scratch: Path,
) -> TrainingArguments:
    """The arguments known before the ranks have met; see `with_steps`. Joins the process group.

    Reports, evaluations and saves are off here: `FollowSchedule` asks for them.

    Raises:
        StageError: for a setting that Transformers refuses.
    """
    check_devices(spec, placement, devices_here())
    check_optimizer(spec)
    if spec.quantization:
        spec.quantization.config()  # its package is missed now, not after the model is read
    settings: dict[str, Any] = {
        "output_dir": str(scratch),
        "seed": spec.seed,
        **transformers_arguments(spec),
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",  # the real one: `Optimization.create_scheduler`
        "metric_for_best_model": "loss",  # what a plateau is looked for in
        "weight_decay": spec.weight_decay,
        # torch takes no whole number beside a fraction, and JSON has written 0.0 as 0.
        "adam_beta1": float(spec.adam_beta1),
        "adam_beta2": float(spec.adam_beta2),
        "adam_epsilon": spec.adam_epsilon,
        "max_grad_norm": spec.max_grad_norm,
        "average_tokens_across_devices": True,
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "save_only_model": True,  # the rest is saved by `SaveCheckpoints`
        "logging_nan_inf_filter": False,
        **placement.reporters.settings(_known()),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": use_cpu(placement.device),
        "ddp_find_unused_parameters": False,
        "dataloader_num_workers": placement.dataloader_num_workers,
        **parallel_settings(spec, placement),
    }
    try:
        return TrainingArguments(**settings)
    except (ValueError, TypeError, ImportError) as error:
        raise StageError(f"Transformers refuses the training settings: {error}") from error


def with_steps(
    args: TrainingArguments, *, total: int, warmup: int, micro_batch_size: int, accumulation: int
) -> TrainingArguments:
    """The arguments with what follows from the data and the number of ranks.

    All epochs are one "epoch" to the Trainer: our data order counts steps through all of them.
    """
    changes = {
        "max_steps": total,
        "warmup_steps": warmup,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def _known() -> set[str]:
    """Names of the arguments that this Transformers has."""
    return {field.name for field in dataclasses.fields(TrainingArguments)}

"""FSDP2 on processes that train on the CPU: Accelerate knows it on devices only.

(Accelerate 1.15 takes no notice of FSDP's options there: without a word, each process has a copy of
the whole model. A mesh of several copies it refuses.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import TrainingArguments


@contextlib.contextmanager
def mesh_kept_back(args: TrainingArguments) -> Iterator[None]:
    """Inside, an accelerator may be made on the CPU: `shard_on_cpu` gives it the mesh."""
    mesh = args.parallelism_config
    if _asks_for_fsdp(args) and args.device.type == "cpu":
        args.parallelism_config = None
    try:
        yield
    finally:
        args.parallelism_config = mesh


def shard_on_cpu(accelerator: Any, args: TrainingArguments) -> bool:
    """Have the accelerator lay models out by FSDP2, if the arguments ask for it and it would not.

    Returns:
        Whether it does now and did not before.
    """
    state = accelerator.state
    if not _asks_for_fsdp(args) or state.distributed_type != DistributedType.MULTI_CPU:
        return False
    # What `AcceleratorState` does itself for processes with a device.
    plugin = FullyShardedDataParallelPlugin(**_plugin_args(args))
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # memory is pinned for a device
    state.fsdp_plugin = plugin
    state.distributed_type = DistributedType.FSDP
    # And the accelerator, where a model has several copies.
    if args.parallelism_config is not None:
        state.parallelism_config = args.parallelism_config
        state.device_mesh = args.parallelism_config.get_device_mesh("cpu")
    return True


def _asks_for_fsdp(args: TrainingArguments) -> bool:
    return bool(_plugin_args(args))


def _plugin_args(args: TrainingArguments) -> Any:
    return getattr(args, "fsdp_plugin_args", None)  # absent without FSDP

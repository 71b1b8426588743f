"""What the GPUs of this machine can do, against what the recipe asks of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from regrow.infra.launch import local_rank
from regrow.tasks.stage import StageError
from regrow.tasks.train.spec import TrainPlacement, TrainSpec

logger = logging.getLogger(__name__)

_BFLOAT16_SINCE = (8, 0)  # compute capability: Ampere (CUDA C++ Programming Guide, table of types)


@dataclass(frozen=True)
class DeviceFacts:
    """The CUDA devices that training runs on."""

    count: int
    name: str
    capability: tuple[int, int]


def devices_here() -> DeviceFacts | None:
    """Facts of this machine's GPUs, by the first of them; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    return DeviceFacts(torch.cuda.device_count(), properties.name, capability)


def check_devices(spec: TrainSpec, placement: TrainPlacement, facts: DeviceFacts | None) -> None:
    """Log what will be slow.

    Raises:
        StageError: for more processes than GPUs, which NCCL would refuse in words of its own.
    """
    if facts is None or placement.device == "cpu":
        return
    if placement.num_processes > facts.count:
        raise StageError(
            f"num_processes: {placement.num_processes} processes need as many GPUs, and this "
            f"machine has {facts.count}. Remove it, for one process on each GPU"
        )
    if spec.dtype == "bfloat16" and facts.capability < _BFLOAT16_SINCE:
        logger.warning(
            "%s computes bfloat16 slowly, without units for it; `bf16: false` computes in float32",
            facts.name,
        )


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Let torch take no more of the process's GPU; before anything large is put there.

    What is chosen by the memory that there is (`regrow.tasks.train.fitting`) then keeps to it, and
    what would go beyond it is out of memory.
    """
    if gib is None:
        return
    level = logging.DEBUG if local_rank() else logging.WARNING  # one line for each machine
    if device.type != "cuda":
        words = "gpu_memory_limit does nothing here: training is on the %s"
        logger.log(level, words, device.type)
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    share = gib * 2**30 / whole
    if share > 1:
        logger.log(level, "gpu_memory_limit: the GPU has only %.1f GiB", whole / 2**30)
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)


def device_name(device: torch.device) -> str:
    """What the result calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

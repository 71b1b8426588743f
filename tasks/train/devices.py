"""What the GPUs of this machine can do, against what the recipe asks of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

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


def device_name(device: torch.device) -> str:
    """What the result calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

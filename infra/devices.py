"""The GPUs of this machine: names and memory, asked of the driver without loading torch."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass

_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory: int
    """Bytes."""


@functools.cache
def local_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()  # no NVIDIA driver here: nothing to name
    return tuple(gpu for line in done.stdout.splitlines() if (gpu := _read(line)))


def _read(line: str) -> Gpu | None:
    name, _, memory = line.rpartition(",")
    # A partition of a GPU may not tell its memory: "[N/A]".
    return Gpu(name.strip(), int(memory) * _MIB) if memory.strip().isdigit() else None

"""Where and with what something was made: for the record, never for a key."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import socket
import subprocess
from typing import Any

_PACKAGES = (
    "regrow",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "pyarrow",
    "mlflow",
    "prefect",
)


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that a result can depend on; absent ones are left out."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def gpus() -> list[str]:
    """Name and driver of each NVIDIA GPU of this machine; none without a driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # no NVIDIA driver here: nothing to name
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def collect() -> dict[str, Any]:
    """Host, platform, Python, package versions and GPUs of this machine. Holds no secret."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "gpus": gpus(),
    }

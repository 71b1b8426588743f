"""Placement: on how many processes training runs and where artifacts are kept; never in a key."""

from __future__ import annotations

from typing import Any

from regrow.configs.sections.section import Count, Section, Texts


class ParallelSection(Section):
    """Where and how fast, never what."""

    num_processes: Count | None = None
    """Training processes on each machine. Default: one for each GPU, or 1."""

    store: str | None = None
    """Root URL of the artifact store: a directory, `s3://`, `gs://`, `az://`, ... Default: the
    setting of the installation."""

    deepspeed: str | dict[str, Any] | None = None
    """DeepSpeed configuration, as a path to a JSON file or in place (not yet)."""

    fsdp: Texts = ()
    """FSDP options of old recipes (not yet)."""

    fsdp_version: Count | None = None
    """Version of FSDP (not yet)."""

    fsdp_config: dict[str, Any] = {}
    """FSDP configuration (not yet)."""

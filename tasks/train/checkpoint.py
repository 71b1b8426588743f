"""Durable checkpoints in the artifact store: complete or invisible, found again, pruned.

A checkpoint is the artifact `<key>/step-00000020`. Every machine uploads its own ranks' files; the
record, written last, makes them one checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainingArguments

from regrow.infra.artifacts import ArtifactDamaged, FileEntry, Record

logger = logging.getLogger(__name__)

TOTALS_FILE = "totals.json"
METRICS_FILE = "metrics.jsonl"


class Store(Protocol):
    """The part of `regrow.infra.artifacts.ArtifactStore` that checkpoints need."""

    def lookup(self, key: str) -> Record | None: ...
    def fetch(self, record: Record) -> Path: ...
    def children(self, prefix: str) -> list[str]: ...
    def remove(self, key: str) -> None: ...
    def upload(self, key: str, attempt: str, local_dir: Path) -> dict[str, FileEntry]: ...
    def seal(
        self,
        key: str,
        attempt: str,
        files: Mapping[str, FileEntry],
        *,
        stage: str,
        spec: Any,
        inputs: Mapping[str, str],
        result: Mapping[str, Any],
    ) -> Record: ...


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint on this machine."""

    step: int
    directory: Path


class Checkpoints:
    """The checkpoints of one training, in a store."""

    def __init__(self, store: Store, prefix: str, keep: int | None) -> None:
        """`keep`: how many of the newest stay; None keeps all."""
        self._store, self._prefix, self._keep = store, prefix, keep

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete and undamaged; others are named in the log."""
        for key in reversed(self._store.children(self._prefix)):
            found = self._open(key)
            if found is not None:
                return found
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of that step, which another rank has found to be whole."""
        record = self._store.lookup(self._key(step))
        assert record is not None, step
        return Checkpoint(step, self._store.fetch(record))

    def upload(self, step: int, attempt: str, directory: Path) -> dict[str, FileEntry]:
        """Store one rank's files of a checkpoint; invisible until `seal`."""
        return self._store.upload(self._key(step), attempt, directory)

    def seal(self, step: int, attempt: str, files: Mapping[str, FileEntry], spec: Any) -> None:
        """Make the ranks' files a checkpoint; prune what is older than the newest few."""
        self._store.seal(
            self._key(step),
            attempt,
            files,
            stage="checkpoint",
            spec=spec,
            inputs={},
            result={"step": step},
        )
        if self._keep is not None:
            for key in self._store.children(self._prefix)[: -self._keep]:
                self._store.remove(key)

    def _open(self, key: str) -> Checkpoint | None:
        try:
            record = self._store.lookup(key)
            if record is None:
                logger.info("checkpoint %s was not finished and is passed over", key)
                return None
            return Checkpoint(int(key.rpartition("-")[2]), self._store.fetch(record))
        except ArtifactDamaged as damage:
            logger.warning("checkpoint passed over: %s", damage)
            return None

    def _key(self, step: int) -> str:
        return f"{self._prefix}/step-{step:08d}"


def agree_on_newest(checkpoints: Checkpoints, args: TrainingArguments) -> Checkpoint | None:
    """The checkpoint that rank 0 chose, fetched once on each machine; None: start afresh."""
    if args.world_size == 1:
        return checkpoints.newest()
    chosen = checkpoints.newest() if args.process_index == 0 else None
    answer = [chosen.step if chosen else None]
    torch.distributed.broadcast_object_list(answer, src=0)
    if answer[0] is None:
        return None
    if args.local_process_index == 0:
        checkpoints.at(answer[0])
    torch.distributed.barrier()
    return checkpoints.at(answer[0])

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
from regrow.tasks.stage import canonical

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

    def __init__(self, store: Store, prefix: str, keep: int | None, spec: Any = None) -> None:
        """
        Args:
            keep: how many of the newest stay; None keeps all.
            spec: what they are of, as plain JSON data.
        """
        self._store, self._prefix, self._keep = store, prefix, keep
        self._spec = canonical(spec)
        self._passed_over: set[str] = set()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete and undamaged; others are named in the log."""
        for key in reversed(self._store.children(self._prefix)):
            found = self._open(key)
            if found is not None:
                return found
            self._passed_over.add(key)
        return None

    def make_room(self, step: int) -> None:
        """Before a step is saved: remove what was found there and could not be used, or it would
        stand in the way of the good one."""
        if self._key(step) in self._passed_over:
            self._store.remove(self._key(step))
            self._passed_over.remove(self._key(step))

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of that step, which another rank has found to be whole."""
        record = self._store.lookup(self._key(step))
        assert record is not None, step
        return Checkpoint(step, self._store.fetch(record))

    def upload(self, step: int, attempt: str, directory: Path) -> dict[str, FileEntry]:
        """Store one rank's files of a checkpoint; invisible until `seal`."""
        return self._store.upload(self._key(step), attempt, directory)

    def seal(self, step: int, attempt: str, files: Mapping[str, FileEntry]) -> None:
        """Make the ranks' files a checkpoint; prune what is older than the newest few."""
        self._store.seal(
            self._key(step),
            attempt,
            files,
            stage="checkpoint",
            spec=self._spec,
            inputs={},
            result={"step": step},
        )
        if self._keep is not None:
            self._prune(step, self._keep)

    def _prune(self, step: int, keep: int) -> None:
        """Only complete ones count, and none of a later step, which an earlier run has left:
        otherwise what is of no use would push out what is."""
        kept = 0
        for key in reversed(self._store.children(self._prefix)):
            if key > self._key(step):
                continue
            if kept < keep and key not in self._passed_over and self._is_complete(key):
                kept += 1
            else:
                self._store.remove(key)

    def _is_complete(self, key: str) -> bool:
        try:
            return self._store.lookup(key) is not None
        except ArtifactDamaged:
            return False

    def _open(self, key: str) -> Checkpoint | None:
        try:
            record = self._store.lookup(key)
            if record is None:
                logger.info("checkpoint %s was not finished and is passed over", key)
                return None
            if record.spec != self._spec:
                logger.warning("checkpoint %s passed over: it is of another spec", key)
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

"""Durable checkpoints: published whole into the artifact store, found again and resumed from.

The Trainer writes a checkpoint into a local scratch directory that nothing ever reads back; what
counts is the artifact `<key>/step-00000020`, which is complete or invisible.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.infra.artifacts import ArtifactDamaged, Record
from regrow.tasks.train.metrics import Meter, MetricsFile

logger = logging.getLogger(__name__)

TOTALS_FILE = "totals.json"
METRICS_FILE = "metrics.jsonl"

# What Transformers and PEFT add and no resume reads: pickled settings with paths, a model card.
_NOT_KEPT = ("training_args.bin", "README.md")


class Store(Protocol):
    """The part of `regrow.infra.artifacts.ArtifactStore` that checkpoints need."""

    def lookup(self, key: str) -> Record | None: ...
    def fetch(self, record: Record) -> Path: ...
    def children(self, prefix: str) -> list[str]: ...
    def remove(self, key: str) -> None: ...
    def publish(
        self,
        key: str,
        local_dir: Path,
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

    def publish(self, step: int, directory: Path, spec: Any) -> None:
        """Store a finished local directory; prune what is older than the newest few."""
        self._store.publish(
            self._key(step),
            directory,
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


class PublishCheckpoints(TrainerCallback):
    """Publishes each checkpoint that the Trainer has written, and removes the local files."""

    def __init__(
        self, checkpoints: Checkpoints, meter: Meter, metrics: MetricsFile | None, spec: Any
    ) -> None:
        """`metrics` is the metrics file on rank 0, None on the others."""
        self._checkpoints, self._meter, self._metrics = checkpoints, meter, metrics
        self._spec = spec

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Called on all ranks after the Trainer's own files are written."""
        directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        with self._meter.paused():
            self._meter.settle(args.device)
            if args.world_size > 1:
                _bring_random_states_together(directory, args)
            if self._metrics is not None:
                self._meter.totals.write(directory / TOTALS_FILE)
                shutil.copyfile(self._metrics.path, directory / METRICS_FILE)
                for name in _NOT_KEPT:
                    (directory / name).unlink(missing_ok=True)
                self._checkpoints.publish(state.global_step, directory, self._spec)
                logger.info("checkpoint of step %d is safe", state.global_step)
            if args.world_size > 1:
                torch.distributed.barrier()
            if args.local_process_index == 0:
                shutil.rmtree(directory)


def _bring_random_states_together(directory: Path, args: TrainingArguments) -> None:
    """Each rank writes its random state on its own machine; rank 0 publishes from its own."""
    name = f"rng_state_{args.process_index}.pth"
    states: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(states, (name, (directory / name).read_bytes()))
    if args.process_index == 0:
        for other, data in states:
            (directory / other).write_bytes(data)

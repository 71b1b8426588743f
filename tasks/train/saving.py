"""Saves the state of a training in the background, and puts a saved one back.

The loop waits only while the state is copied into the host's memory; a thread then writes and
publishes it. One save runs at a time: the next one waits for it.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.infra.artifacts import FileEntry, new_attempt
from regrow.tasks.stage import StageError
from regrow.tasks.train.checkpoint import METRICS_FILE, TOTALS_FILE, Checkpoints
from regrow.tasks.train.files import SavedState, write_state
from regrow.tasks.train.metrics import Meter
from regrow.tasks.train.state import Staging, State, random_states, set_random_states
from regrow.tasks.train.trainers.loop import StepLoop

logger = logging.getLogger(__name__)

# A store may be away for a moment; when it stays away, going on would mean losing all that follows.
_FAILURES = 2


@dataclass(frozen=True)
class Ranks:
    """Who saves together."""

    rank: int = 0
    world_size: int = 1
    group: ProcessGroup | None = None
    """Of all ranks, on the CPU, for the saving thread alone; None for a single process."""
    control: ProcessGroup | None = None
    """The same for the main thread."""

    @classmethod
    def of(cls, args: TrainingArguments) -> Ranks:
        """All ranks of this training; each rank must call it."""
        if args.world_size == 1:
            return cls()
        groups: list[Any] = [torch.distributed.new_group(backend="gloo") for _ in range(2)]
        return cls(args.process_index, args.world_size, *groups)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; for the saving thread."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values


class BackgroundSaver:
    """Writes states to scratch and publishes them as checkpoints, in a thread."""

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks, scratch: Path) -> None:
        """`scratch`: a directory of this rank alone."""
        self._checkpoints, self._ranks, self._scratch = checkpoints, ranks, scratch
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[str | None] | None = None
        self._failures = 0
        self._saved = 0
        self.staging = Staging()
        """Makes the copies that are saved."""

    def submit(
        self,
        step: int,
        state: State,
        random: Mapping[str, Any],
        extras: Mapping[str, bytes],
        waited: float = 0.0,
    ) -> None:
        """Publish copies of a state; all ranks call it for the same step.

        Args:
            extras: further files by name, of rank 0.
            waited: seconds for which training has waited, for people to know.

        Raises:
            StageError: when saving has failed several times in a row.
        """
        self.wait()
        self._running = self._thread.submit(self._save, step, state, random, extras, waited)

    def wait(self) -> None:
        """Wait for the save that runs, if one does.

        Raises:
            StageError: as `submit`.
        """
        if self._running is None:
            return
        fault = self._running.result()
        self._running = None
        self._failures = self._failures + 1 if fault else 0
        if fault and self._failures >= _FAILURES:
            raise StageError(
                f"checkpoints could not be saved {_FAILURES} times in a row, the last time: "
                f"{fault}. Check the store, its free space and the permissions; the next run goes "
                "on from the newest checkpoint"
            )

    def finish(self) -> None:
        """Wait for the last save, which must have succeeded.

        Raises:
            StageError: when it failed.
        """
        self._failures = _FAILURES - 1
        self.wait()

    def close(self) -> None:
        """Let the save that runs come to its end, whatever it is; gives its memory back."""
        self._thread.shutdown(wait=True)
        self.staging.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _save(
        self,
        step: int,
        state: State,
        random: Mapping[str, Any],
        extras: Mapping[str, bytes],
        waited: float,
    ) -> str | None:
        """None, or what went wrong, the same on all ranks."""
        directory = self._scratch / f"step-{step:08d}"
        # Of a killed worker: the store may hold the same files by another name (hard links).
        shutil.rmtree(directory, ignore_errors=True)
        files: dict[str, FileEntry] = {}
        fault = self._make_room(step) if self._ranks.rank == 0 else None
        attempt = self._ranks.gather(new_attempt())[0]
        try:
            write_state(state, directory, random, self._ranks.rank, self._ranks.group)
            for name, data in extras.items():
                (directory / name).write_bytes(data)
            files = self._checkpoints.upload(step, attempt, directory)
        except Exception as error:  # noqa: BLE001 (told to all ranks below, whatever it is)
            fault = f"rank {self._ranks.rank}: {_described(error)}"
        outcomes = self._ranks.gather((fault, files))
        fault = next((found for found, _ in outcomes if found), None)
        if self._ranks.rank == 0 and not fault:
            parts = {n: e for _, part in outcomes for n, e in part.items()}
            fault = self._seal(step, attempt, parts, waited)
        fault = self._ranks.gather(fault)[0]
        if fault and self._ranks.rank == 0:
            logger.warning("the checkpoint of step %d could not be saved: %s", step, fault)
        shutil.rmtree(directory, ignore_errors=True)
        return fault

    def _make_room(self, step: int) -> str | None:
        try:
            self._checkpoints.make_room(step)
        except Exception as error:  # noqa: BLE001 (becomes the outcome on all ranks)
            return _described(error)
        return None

    def _seal(
        self, step: int, attempt: str, files: Mapping[str, FileEntry], waited: float
    ) -> str | None:
        try:
            self._checkpoints.seal(step, attempt, files)
        except Exception as error:  # noqa: BLE001 (becomes the outcome on all ranks)
            return _described(error)
        logger.info("checkpoint of step %d is safe (training waited %.2f s)", step, waited)
        return None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class SaveCheckpoints(TrainerCallback):
    """Copies the state when the Trainer says it is time, and hands it to the background."""

    def __init__(
        self,
        saver: BackgroundSaver,
        trainer: StepLoop,
        meter: Meter,
        due: Set[int],
        metrics: Path | None,
        others: Sequence[Path] = (),
    ) -> None:
        """`due`: the steps after which a save may come by plan.

        `metrics` is the metrics file on rank 0, None on the others; `others` are the files that
        other callbacks write, to be saved where they are there.
        """
        self._saver, self._trainer, self._meter, self._metrics = saver, trainer, meter, metrics
        self._others, self._last_due = others, max(due, default=0)
        self._prepared = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """After the first step the optimizer's states are there, too: make room for a copy.

        Not where no save is to come, nor where DeepSpeed makes copies of its own, nor on the CPU,
        whose memory needs no pinning.
        """
        if self._prepared or state.global_step > self._last_due:
            return
        self._prepared = True
        if args.device.type == "cuda" and not self._trainer.is_deepspeed_enabled:
            self._saver.staging.prepare(self._trainer.capture())

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Called on all ranks, after this step's report and evaluation."""
        if args.should_save:  # the Trainer's own, which is empty
            shutil.rmtree(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        self._trainer.check_losses()
        self._meter.settle(args.device)
        begin = time.perf_counter()
        with self._meter.paused():
            self._saver.wait()  # before copying: two copies may not fit the host's memory
            copies = self._saver.staging.copy(self._trainer.capture())
            waited = time.perf_counter() - begin
            self._meter.totals.saving_seconds += waited
            extras = self._extras()
            random = random_states(args.device)
            self._saver.submit(state.global_step, copies, random, extras, waited)

    def _extras(self) -> dict[str, bytes]:
        """The files of rank 0 beside the state."""
        if self._metrics is None:
            return {}
        found = {
            TOTALS_FILE: self._meter.totals.to_json().encode(),
            METRICS_FILE: self._metrics.read_bytes(),
        }
        return found | {path.name: path.read_bytes() for path in self._others if path.is_file()}


class Resume(TrainerCallback):
    """Puts a saved state back when model and optimizer stand where they will train."""

    def __init__(self, saved: SavedState, trainer: StepLoop) -> None:
        self._saved, self._trainer = saved, trainer
        self._random_is_set = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weights, optimizer, schedule, other callbacks."""
        self._trainer.restore(self._saved)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Random states last, right before the first step."""
        if self._random_is_set:
            return
        self._random_is_set = True
        if self._saved.ranks != args.world_size and args.process_index == 0:
            logger.warning(
                "the checkpoint is of %d processes and there are %d now: the data goes on as it "
                "was, but dropout and noise, if there are any, draw other numbers",
                self._saved.ranks,
                args.world_size,
            )
        states = self._saved.random(args.process_index) or self._saved.random(0)
        assert states is not None
        set_random_states(states, args.device)

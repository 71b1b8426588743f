"""The worker as tests start it, with a fault: a rank that stands still, or too small a device."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from regrow.tasks.train import worker
from regrow.tasks.train.job import WorkerJob

FAULT = "TEST_FAULT"
"""Variable: a name in `FAULTS`."""
STEP = 8
"""Before it the fault comes; a checkpoint is due after step 6."""
STOPPED = "stopped-rank"
"""File in the job's work: the process id of the rank that stands still."""


class StandStill(TrainerCallback):
    """SIGSTOP of rank 1 by itself, once, when the checkpoint before is there."""

    def __init__(self, job: WorkerJob) -> None:
        self._once = job.work / STOPPED
        assert job.checkpoints is not None
        store = Path(job.checkpoints.url.removeprefix("file://"))
        self._saved = store / job.checkpoints.key / "step-00000006" / "record.json"

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The other rank comes to the next exchange between them, and waits."""
        if args.process_index != 1 or state.global_step + 1 != STEP or self._once.exists():
            return
        end = time.monotonic() + 60
        while not self._saved.is_file():
            assert time.monotonic() < end, f"no {self._saved}"
            time.sleep(0.01)
        self._once.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)


class SmallDevice(TrainerCallback):
    """From STEP on there is memory for micro-batches of one row only."""

    def __init__(self, job: WorkerJob) -> None:
        self._step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What needs memory is the forward pass."""
        if args.per_device_train_batch_size > 1:
            kwargs["model"].get_input_embeddings().register_forward_pre_hook(self._allocate)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count."""
        self._step = state.global_step + 1

    def _allocate(self, module: torch.nn.Module, inputs: Any) -> None:
        if module.training and self._step >= STEP:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


FAULTS = {"stands still": StandStill, "small device": SmallDevice}


def main(argv: Sequence[str] | None = None) -> None:
    """The worker's own entry, with the fault."""
    train = worker.train

    def faulty(job: WorkerJob) -> dict[str, Any]:
        return train(job, [FAULTS[os.environ[FAULT]](job)])

    worker.train = faulty
    worker.main(argv)


if __name__ == "__main__":
    main()

"""The worker as tests start it: ranks write down what each of them holds, and one can end itself.

A way of many GPUs that does not divide trains to the same numbers: no curve tells (Accelerate 1.15
takes no notice of FSDP on the CPU, and every test passed).
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from regrow.tasks.train import worker
from regrow.tasks.train.job import WorkerJob


@dataclass(frozen=True)
class Held:
    """What one rank had after its first step; numbers of weights."""

    weights: int
    """In its memory, frozen ones too."""
    all_weights: int
    """Of the whole model."""
    stepped: int
    """Those for which it has states of the optimizer."""
    all_stepped: int
    """All that are trained."""
    forwards: int = 0
    """Micro-batches of the step."""
    tokens: int = 0
    """Of these micro-batches."""

    @classmethod
    def read(cls, directory: Path) -> list[Held]:
        """Of each rank."""
        found = sorted(directory.glob("held-*.json"))
        return [cls(**json.loads(path.read_text())) for path in found]


class Weigh(TrainerCallback):
    """Writes the rank's `Held` into a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._forwards, self._tokens, self._done = 0, 0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen to what goes into the embedding."""
        kwargs["model"].get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and not self._done:
            self._forwards += 1
            self._tokens += inputs[0].numel()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has its states after the first step."""
        self._write(args.process_index, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where a checkpoint left no step to take."""
        self._write(args.process_index, **kwargs)

    def _write(self, rank: int, model: Any, optimizer: Any, **kwargs: Any) -> None:
        if self._done:
            return
        self._done = True
        weights = list(model.parameters())
        held = Held(
            _here(weights),
            _in_all(weights),
            _here(_stepped(optimizer)),
            _in_all(p for p in weights if p.requires_grad),
            self._forwards,
            self._tokens,
        )
        path = self._directory / f"held-{rank}.json"
        path.write_text(json.dumps(dataclasses.asdict(held)))


def _stepped(optimizer: Any) -> list[Tensor]:
    while hasattr(optimizer, "optimizer"):  # Accelerate and DeepSpeed put their own around it
        optimizer = optimizer.optimizer
    return [parameter for parameter, state in optimizer.state.items() if state]


def _here(tensors: Iterable[Any]) -> int:
    """Of divided ones this rank's; ZeRO-3 leaves nothing in a parameter that it has divided, and
    the rank's part beside it."""
    found = 0
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found += local.numel() or getattr(tensor, "ds_tensor", local).numel()
    return found


def _in_all(tensors: Iterable[Tensor]) -> int:
    return sum(getattr(t, "ds_numel", t.numel()) for t in tensors)


KILL = "TEST_KILL"
"""Variable: "rank step" of the kill."""


class KillItself(TrainerCallback):
    """SIGKILL after a step, when the checkpoint that was due before it is there."""

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        self._step, self._checkpoint = step, checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The others wait for this rank in the next step, or have ended."""
        if state.global_step != self._step:
            return
        end = time.monotonic() + 120
        while self._checkpoint and not self._checkpoint.is_file():
            assert time.monotonic() < end, f"no {self._checkpoint}"
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def _killer(job: WorkerJob) -> list[TrainerCallback]:
    rank, step = (int(number) for number in os.environ[KILL].split())
    if rank != int(os.environ["RANK"]):
        return []
    checkpoint, every = None, int(job.placement.saving.steps or 0)
    if job.checkpoints and every and step > every:
        name = f"step-{(step - 1) // every * every:08d}"
        store = Path(job.checkpoints.url.removeprefix("file://"))
        checkpoint = store / job.checkpoints.key / name / "record.json"
    return [KillItself(step, checkpoint)]


def main(argv: Sequence[str] | None = None) -> None:
    """The worker's own entry, with these callbacks."""
    train = worker.train

    def watched(job: WorkerJob) -> dict[str, Any]:
        return train(job, [Weigh(job.work), *(_killer(job) if KILL in os.environ else [])])

    worker.train = watched
    worker.main(argv)


if __name__ == "__main__":
    main()

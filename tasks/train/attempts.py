"""What follows when a worker ends before its work is done: go on, go on otherwise, or give up."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from regrow.infra.launch import WorkerFailed
from regrow.tasks.stage import Reporter, StageError
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.part import EVIDENCE, PEER_LOST

_SAVED = re.compile(r".*checkpoint of step (\d+) is safe.*")
_FALLBACK = re.compile(r".*should memory run out, it goes on with gradient_checkpointing: (\w+)")
# Masks are drawn for each micro-batch, and for each slice of an MLP's tokens.
_SAME = "the result is the same, but for dropout's masks"


class Preempted(StageError):  # noqa: N818 (the name says what is the matter)
    """Training stopped in good order before its end; the next run goes on from its checkpoint."""


class Attempts:
    """Decides after each worker's end, from what it left behind."""

    def __init__(self, job: WorkerJob, report: Reporter, logs: Path) -> None:
        self.job = job
        """What the next worker is to do."""
        self._report, self._logs = report, logs
        self._begin = time.monotonic()
        self._limit = job.placement.time_limit
        self._left = job.placement.max_restarts
        self._saved = -1
        self._fallback: str | None = None

    def hear(self, line: str) -> None:
        """Look at a line of the worker's output: a new checkpoint is progress.

        What takes less memory is for the worker to say: it knows the device and its host.
        """
        found = _SAVED.fullmatch(line)
        if found and int(found[1]) > self._saved:
            self._saved = int(found[1])
            self._left = self.job.placement.max_restarts
        found = _FALLBACK.fullmatch(line)
        if found:
            self._fallback = found[1]

    def after(self, failure: WorkerFailed) -> None:
        """Choose how to go on; `job` then says it.

        Raises:
            Preempted: when the time is up and the state is saved.
            StageError: for what the user can mend.
            WorkerFailed: for any other failure of the worker.
        """
        hung = self._keep_evidence()
        if self.job.preempted_path.exists():
            self._after_preemption()
        elif failure.message.startswith("StageError"):
            raise explained(failure) from failure
        elif ran_out_of_memory(failure):
            self._after_memory(failure)
        elif hung:
            self._again(f"no step came for {self.job.placement.hang_timeout:g} s", failure)
        elif failure.signal:
            self._again(f"it was ended by {failure.signal}", failure)
        elif re.search(PEER_LOST, failure.message):
            self._again("it lost the connection to another rank", failure)
        else:
            raise explained(failure) from failure
        if self._limit is not None:
            left = max(1.0, self._limit - (time.monotonic() - self._begin))
            self._change(time_limit=left)
        self._fallback = None  # the next worker has its own

    def _after_preemption(self) -> None:
        left = json.loads(self.job.preempted_path.read_text())
        self.job.preempted_path.unlink()
        saved = f"after step {left['step']}"
        if self.job.checkpoints is None:
            saved += ", without a checkpoint, since save_strategy keeps none"
        if left["preempted"] == "deadline":
            raise Preempted(f"time_limit: training stopped {saved}; run again to go on")
        self._report.log(f"the worker was told to stop and did so {saved}; it goes on")

    def _after_memory(self, failure: WorkerFailed) -> None:
        place = self.job.placement
        if self._fallback is not None:  # the memory model was wrong
            what = "whole layers computed again"
            if self._fallback == "offload":
                what = "all layers' inputs in the host's memory"
            self._report.log(
                "the device has too little memory: going on with gradient_checkpointing: "
                f"{self._fallback}, {what} ({_SAME})"
            )
            self._change(fallback=self._fallback)
            return
        if not place.retry_on_oom or place.micro_batch_size == 1:
            raise StageError(memory_advice(failure, self.job)) from failure
        half = place.micro_batch_size // 2
        self._report.log(
            f"the device has too little memory for micro_batch_size {place.micro_batch_size}: "
            f"going on with {half} and more accumulation ({_SAME})"
        )
        self._change(micro_batch_size=half)

    def _again(self, why: str, failure: WorkerFailed) -> None:
        if self._left == 0:
            raise StageError(
                f"the worker failed {self.job.placement.max_restarts + 1} times in a row without "
                f"a new checkpoint, the last time because {why}. Its output: {failure.log_path}. "
                "SIGKILL without a reason is most often the machine running out of memory"
            ) from failure
        self._left -= 1
        self._report.log(f"the worker is started again: {why}; its output: {failure.log_path}")

    def _change(self, **changes: Any) -> None:
        placement = dataclasses.replace(self.job.placement, **changes)
        self.job = dataclasses.replace(self.job, placement=placement)

    def _keep_evidence(self) -> bool:
        """Move what a failed worker wrote for people to the logs; whether a rank hung."""
        hung = False
        for pattern in EVIDENCE:
            for path in sorted(self.job.work.glob(pattern)):
                if path.stat().st_size:
                    hung = hung or path.name.startswith("stacks")
                    self._logs.mkdir(parents=True, exist_ok=True)
                    kept = self._logs / path.name
                    shutil.copyfile(path, kept)
                    self._report.log(f"see {kept}")
                path.unlink()
        return hung


def ran_out_of_memory(failure: WorkerFailed) -> bool:
    """Whether the device's memory was too small."""
    return "OutOfMemoryError" in failure.message or "out of memory" in failure.message


def memory_advice(failure: WorkerFailed, job: WorkerJob) -> str:
    """What would fit instead."""
    place, ways = job.placement, []
    if place.micro_batch_size > 1:
        ways.append(
            "lower micro_batch_size and raise gradient_accumulation_steps by the same factor (the "
            "result stays the same)"
        )
    policy = place.fallback or place.gradient_checkpointing
    if not policy:
        ways.append("set gradient_checkpointing: true")
    elif policy != "offload":
        ways.append("set gradient_checkpointing: offload, if the host has memory for it")
    ways.append("lower sequence_len")
    if place.gpu_memory_limit:
        ways.append("raise gpu_memory_limit")
    if job.spec.adapter is None:
        ways.append("train an adapter (adapter: lora)")
    if place.num_processes > 1 and not place.sharding.shards:
        ways.append("share the model out with fsdp_config: {} or deepspeed: zero3_bf16.json")
    first = failure.message.splitlines()[0]
    return f"the GPU has too little memory ({first}). One of: {'; '.join(ways)}"


def explained(failure: WorkerFailed) -> Exception:
    """A fault the user can mend as StageError; anything else as it is."""
    name, _, message = failure.message.partition(": ")
    if name == "StageError":
        return StageError(message)
    if "No space left" in failure.message or "os error 28" in failure.message:
        return StageError(
            "training: there is no space left for its checkpoints or result; free some, set "
            "REGROW_HOME to another disk, or lower save_total_limit"
        )
    if "bitsandbytes" in failure.message:
        return StageError(
            "optimizer: this one needs the package bitsandbytes: pip install 'regrow[gpu]' where "
            "training runs, or choose another, such as adamw_torch_fused"
        )
    return failure

"""The train stage: starts the worker, passes on how far it is, keeps its result."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from regrow.infra import hub
from regrow.infra.launch import WorkerFailed, run_workers
from regrow.tasks.stage import Reporter, StageError, StageJob
from regrow.tasks.train.job import CheckpointPlace, WorkerJob
from regrow.tasks.train.metrics import thin
from regrow.tasks.train.spec import TrainPlacement

_WORKER = "regrow.tasks.train.worker"
_MOST_POINTS = 500  # of the curves in a result: enough for a plot, some 50 kB of JSON
_MODEL_FILES = ("*.safetensors", "*.json", "*.py", "*.model")  # no pickles, no second formats
# A failing rank's own traceback: it is in the log, and its last line becomes the stage's error.
_TRACEBACK = re.compile(
    r"\[rank\d+\]:|Traceback |  |\w+(\.\w+)*(Error|Exception): |E\d{4} |[=-]{20}"
)
_PROGRESS = re.compile(r"step (\d+)/(\d+) \| (.*)")


def run(job: StageJob) -> dict[str, Any]:
    """Train on the input "prepare"; `job.out` gets the adapter, or the weights and config.

    Returns steps, epochs, tokens, supervised_tokens, parameters, trainable_parameters, train_loss
    (the last reported), eval_losses [{step, loss}], history [{step, loss, ...}], and timing
    {seconds, tokens_per_second, peak_memory_gib, world_size, micro_batch_size, accumulation,
    device}.

    Raises:
        StageError: for what the user can mend.
        WorkerFailed: for any other failure of the worker.
    """
    placement: TrainPlacement = job.placement
    work = job.scratch / "train"
    work.mkdir(parents=True)
    worker_job = WorkerJob(
        spec=job.spec,
        placement=placement,
        prepared=job.inputs["prepare"],
        base_model=hub.local_directory(placement.base_model, "model", _MODEL_FILES),
        out=work / "final",
        work=work,
        checkpoints=_checkpoint_place(job),
        tracking=job.tracking,
    )
    worker_job.write(work / "job.json")
    log = (job.logs or work) / f"train-{job.stage.key[:12]}.log"
    _launch(work / "job.json", log, placement.num_processes, job.report)
    for path in sorted(worker_job.out.iterdir()):
        shutil.move(path, job.out / path.name)
    result = json.loads(worker_job.result_path.read_text())
    return result | {"history": thin(result["history"], _MOST_POINTS)}


def _checkpoint_place(job: StageJob) -> CheckpointPlace | None:
    if job.checkpoints is None:
        return None
    return CheckpointPlace(job.checkpoints, f"checkpoints/{job.stage.key}")


def _launch(path: Path, log: Path, num_processes: int, report: Reporter) -> None:
    def tell(line: str) -> None:
        progress = _PROGRESS.fullmatch(line)
        if progress:
            done, total, note = progress.groups()
            report.progress(int(done), int(total), "steps", note)
        elif line.strip() and not _TRACEBACK.match(line):
            report.log(line)

    try:
        run_workers(_WORKER, [str(path)], num_processes=num_processes, on_line=tell, log_path=log)
    except WorkerFailed as failure:
        raise _explained(failure) from failure


def _explained(failure: WorkerFailed) -> Exception:
    """A fault the user can mend as StageError; anything else as it is."""
    name, _, message = failure.message.partition(": ")
    if name == "StageError":
        return StageError(message)
    if "OutOfMemoryError" in failure.message or "out of memory" in failure.message:
        return StageError(
            f"the GPU has too little memory ({message.splitlines()[0]}). Lower micro_batch_size "
            "and raise gradient_accumulation_steps by the same factor (the result stays the same), "
            "set gradient_checkpointing: true, lower sequence_len, or train an adapter"
        )
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

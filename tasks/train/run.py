"""The train stage: starts the worker, passes on how far it is, keeps its result."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from regrow.infra import hub
from regrow.infra.launch import WorkerFailed, run_workers
from regrow.tasks.stage import Reporter, StageJob
from regrow.tasks.train.attempts import Attempts
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

    A worker that dies, hangs or runs out of memory is followed by another one that goes on from the
    newest checkpoint; see `Attempts`.

    Raises:
        Preempted: when the recipe's time is up; the next run goes on.
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
        start_adapter=_start_adapter(placement),
        tracking=job.tracking,
    )
    logs = job.logs or work
    attempts = Attempts(worker_job, job.report, logs / f"train-{job.stage.key[:12]}")
    while not _launch(attempts, logs / f"train-{job.stage.key[:12]}.log", job.report):
        pass
    for path in sorted(worker_job.out.iterdir()):
        shutil.move(path, job.out / path.name)
    result = json.loads(worker_job.result_path.read_text())
    return result | {"history": thin(result["history"], _MOST_POINTS)}


def _start_adapter(placement: TrainPlacement) -> Path | None:
    if placement.start_adapter is None:
        return None
    return hub.local_directory(placement.start_adapter, "model", ("adapter_*",))


def _checkpoint_place(job: StageJob) -> CheckpointPlace | None:
    if job.checkpoints is None:
        return None
    return CheckpointPlace(job.checkpoints, f"checkpoints/{job.stage.key}")


def _launch(attempts: Attempts, log: Path, report: Reporter) -> bool:
    """One worker; False when another one is to go on where it ended."""

    def tell(line: str) -> None:
        attempts.hear(line)
        progress = _PROGRESS.fullmatch(line)
        if progress:
            done, total, note = progress.groups()
            report.progress(int(done), int(total), "steps", note)
        elif line.strip() and not _TRACEBACK.match(line):
            report.log(line)

    job = attempts.job
    path = job.work / "job.json"
    job.write(path)
    try:
        run_workers(
            _WORKER,
            [str(path)],
            num_processes=job.placement.num_processes,
            on_line=tell,
            log_path=log,
        )
    except WorkerFailed as failure:
        attempts.after(failure)
        return False
    return True

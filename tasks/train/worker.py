"""The process that trains: `torchrun ... -m regrow.tasks.train.worker job.json`, one for each rank.

Also by hand as `python -m regrow.tasks.train.worker job.json`, on one rank. Needs neither Prefect
nor, unless live metrics are asked for, MLflow.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from regrow.infra.artifacts import ArtifactStore
from regrow.tasks.modeling.adapter import add_adapter, embedding_names
from regrow.tasks.modeling.ends import align_special_ids
from regrow.tasks.modeling.load import DTYPES, grow_embeddings, load_model, load_tokenizer
from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.stage import StageError, canonical
from regrow.tasks.train.arguments import training_arguments, with_steps
from regrow.tasks.train.callbacks import FollowSchedule, LiveReporter, RecordMetrics
from regrow.tasks.train.checkpoint import (
    METRICS_FILE,
    TOTALS_FILE,
    Checkpoint,
    Checkpoints,
    PublishCheckpoints,
    agree_on_newest,
)
from regrow.tasks.train.export import save_adapter, save_model
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.loader import FileOrder, MicroBatches
from regrow.tasks.train.metrics import Meter, MetricsFile, Totals, peak_memory_gib, read_metrics
from regrow.tasks.train.noise import EmbeddingNoise
from regrow.tasks.train.order import DataOrder, Split, choose_split
from regrow.tasks.train.schedule import total_steps, warmup_steps
from regrow.tasks.train.trainers.sft import SftTrainer

logger = logging.getLogger("regrow.tasks.train.worker")  # __name__ is __main__ when launched


@dataclass(frozen=True)
class Course:
    """The training in numbers: which rows, in how many steps, split how."""

    order: DataOrder
    split: Split
    total_steps: int
    warmup_steps: int


def train(job: WorkerJob, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train as the job says, from the newest checkpoint if there is one; returns the result.

    Call it on every rank. Rank 0 writes the model to `job.out` and the result to
    `job.result_path`.

    Raises:
        StageError: for what the user can mend.
    """
    args = training_arguments(job.spec, job.placement, scratch=job.work / "unfinished")
    if args.process_index != 0:
        logging.getLogger("regrow").setLevel(logging.WARNING)  # rank 0 says it for all
    if args.device.type == "cuda" and job.placement.tf32:
        torch.set_float32_matmul_precision("high")
    rows = PackedRows(job.prepared, "train")
    course = _plot_course(job, len(rows), args.world_size)
    args = with_steps(
        args,
        total=course.total_steps,
        warmup=course.warmup_steps,
        micro_batch_size=course.split.micro_batch_size,
        accumulation=course.split.accumulation,
    )
    checkpoints = _open_checkpoints(job)
    start = agree_on_newest(checkpoints, args) if checkpoints else None
    if start:
        logger.info("resuming after step %d of %d", start.step, course.total_steps)
    meter = Meter(Totals.read(start.directory / TOTALS_FILE) if start else Totals())
    model, use_cache = _build_model(job)
    recorder = _Recorder.open(job, course, start) if args.process_index == 0 else None
    trainer = _build_trainer(job, args, course, model, meter, rows)
    for callback in (*_callbacks(job, course, checkpoints, meter, recorder), *callbacks):
        trainer.add_callback(callback)
    try:
        meter.start()
        trainer.train(resume_from_checkpoint=str(start.directory) if start else None)
    finally:
        if recorder:
            recorder.close()
    return _finish(job, trainer, course, meter, use_cache)


# ---- before ----


def _plot_course(job: WorkerJob, num_rows: int, world_size: int) -> Course:
    if num_rows == 0:
        raise StageError("the prepared data holds no training rows")
    spec, wanted = job.spec, job.placement.micro_batch_size
    order = DataOrder(num_rows, spec.global_batch_size, spec.seed)
    split = choose_split(spec.global_batch_size, wanted, world_size)
    if split.micro_batch_size != wanted:
        logger.warning(
            "micro_batch_size %d does not divide the global batch of %d rows on %d processes: %d "
            "is used, with %d accumulation steps",
            wanted,
            spec.global_batch_size,
            world_size,
            split.micro_batch_size,
            split.accumulation,
        )
    total = total_steps(order.steps_per_epoch, spec.num_epochs, spec.max_steps)
    return Course(order, split, total, warmup_steps(total, spec.warmup_steps, spec.warmup_ratio))


def _open_checkpoints(job: WorkerJob) -> Checkpoints | None:
    if job.checkpoints is None:
        return None
    store = ArtifactStore.open_url(job.checkpoints.url)
    return Checkpoints(store, job.checkpoints.key, job.placement.save_total_limit)


def _build_model(job: WorkerJob) -> tuple[Any, bool]:
    """(the model to train, with or without an adapter; the base config's `use_cache`)."""
    spec = job.spec
    model = load_model(
        job.base_model,
        # What is trained is float32: in bfloat16 most small updates round to nothing.
        dtype=spec.dtype if spec.adapter else "float32",
        trust_remote_code=job.placement.trust_remote_code,
    )
    use_cache = bool(getattr(model.config, "use_cache", True))
    _fit_vocabulary(model, job)
    set_seed(spec.seed)
    trained = add_adapter(model, **vars(spec.adapter)) if spec.adapter else model
    if spec.neftune_noise_alpha:
        EmbeddingNoise(spec.neftune_noise_alpha).attach(trained)
    return trained, use_cache


def _fit_vocabulary(model: Any, job: WorkerJob) -> None:
    new = grow_embeddings(model, len(load_tokenizer(job.prepared / "tokenizer")))
    if not new:
        return
    logger.info("the vocabulary has %d new tokens; the embedding grew", new)
    if not job.spec.adapter:
        return
    needed = embedding_names(model)
    if not needed <= set(job.spec.adapter.modules_to_save):
        raise StageError(
            f"the tokenizer has {new} tokens that the base model does not know, and an adapter "
            f"alone cannot learn them: set lora_modules_to_save: [{', '.join(sorted(needed))}]"
        )


@dataclass(frozen=True)
class _Recorder:
    """Rank 0's metrics: the file, and the live reporter if metrics are tracked."""

    file: MetricsFile
    callback: RecordMetrics
    live: LiveReporter | None

    @classmethod
    def open(cls, job: WorkerJob, course: Course, start: Checkpoint | None) -> _Recorder:
        file = MetricsFile(job.metrics_path, start.directory / METRICS_FILE if start else None)
        live = None
        if job.tracking:
            from regrow.infra.tracking import MetricsReporter  # imports MLflow

            live = MetricsReporter(job.tracking["uri"], job.tracking["run_id"])
        return cls(file, RecordMetrics(file, course.order.steps_per_epoch, live), live)

    def close(self) -> None:
        if self.live:
            self.live.close()


def _callbacks(
    job: WorkerJob,
    course: Course,
    checkpoints: Checkpoints | None,
    meter: Meter,
    recorder: _Recorder | None,
) -> list[TrainerCallback]:
    """In the order in which they run at one event."""
    place, total, per_epoch = job.placement, course.total_steps, course.order.steps_per_epoch
    found: list[TrainerCallback] = [
        FollowSchedule(
            report=frozenset({1, total, *range(place.logging_steps, total, place.logging_steps)}),
            evaluate=place.evaluation.due(total, per_epoch) if _validates(job) else frozenset(),
            save=place.saving.due(total, per_epoch) if checkpoints else frozenset(),
        )
    ]
    if recorder:
        found.append(recorder.callback)
    if checkpoints:
        file = recorder.file if recorder else None
        found.append(PublishCheckpoints(checkpoints, meter, file, canonical(job.spec)))
    return found


def _validates(job: WorkerJob) -> bool:
    splits = json.loads((job.prepared / "index.json").read_text())["splits"]
    return bool(splits.get("validation", {}).get("rows"))


def _build_trainer(
    job: WorkerJob,
    args: TrainingArguments,
    course: Course,
    model: Any,
    meter: Meter,
    rows: PackedRows,
) -> SftTrainer:
    rank, pad_to = args.process_index, job.placement.pad_to
    batches = MicroBatches(rows, course.order, course.split, rank, course.total_steps, pad_to)
    validation = None
    if _validates(job):
        held_out = PackedRows(job.prepared, "validation")
        micro = job.placement.eval_batch_size or course.split.micro_batch_size
        order = FileOrder(len(held_out), micro * args.world_size)
        split = Split(args.world_size, micro, accumulation=1)
        validation = MicroBatches(held_out, order, split, rank, order.steps, pad_to)
    trainer = SftTrainer(
        model=model,
        args=args,
        batches=batches,
        validation=validation,
        meter=meter,
        autocast=None if job.spec.dtype == "float32" else DTYPES[job.spec.dtype],
    )
    trainer.remove_callback(PrinterCallback)  # our own line says it
    return trainer


# ---- after ----


def _finish(
    job: WorkerJob, trainer: SftTrainer, course: Course, meter: Meter, use_cache: bool
) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    result = _result(trainer, course, meter, model)
    if trainer.args.process_index == 0:
        result |= _curves(read_metrics(job.metrics_path))
        job.out.mkdir(parents=True, exist_ok=True)
        _save(model, job, use_cache)
        job.result_path.write_text(json.dumps(result, indent=1, sort_keys=True))
    if trainer.args.world_size > 1:
        torch.distributed.barrier()
    return result


def _save(model: Any, job: WorkerJob, use_cache: bool) -> None:
    if isinstance(model, PeftModel):
        save_adapter(model, job.out)
    else:
        align_special_ids(model, load_tokenizer(job.prepared / "tokenizer"))
        save_model(model, job.out, DTYPES[job.spec.dtype], use_cache)


def _result(trainer: Trainer, course: Course, meter: Meter, model: Any) -> dict[str, Any]:
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    totals = meter.totals
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.global_step / course.order.steps_per_epoch,
        "tokens": totals.tokens,
        "supervised_tokens": totals.supervised_tokens,
        "parameters": sum(n for n, _ in counts),
        "trainable_parameters": sum(n for n, trains in counts if trains),
        "timing": {
            "seconds": totals.seconds,
            "tokens_per_second": totals.tokens / max(totals.seconds, 1e-9),
            "peak_memory_gib": peak_memory_gib(trainer.args.device),
            "world_size": trainer.args.world_size,
            "micro_batch_size": course.split.micro_batch_size,
            "accumulation": course.split.accumulation,
            "device": _device_name(trainer.args.device),
        },
    }


def _curves(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses by step, without times."""
    curve = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    history = [{name: r[name] for name in curve if name in r} for r in records]
    losses = [r["loss"] for r in history if "loss" in r]
    evals = [{"step": r["step"], "loss": r["eval_loss"]} for r in history if "eval_loss" in r]
    return {
        "train_loss": losses[-1] if losses else None,
        "eval_losses": evals,
        "history": history,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the process; the one argument is the path of `job.json`."""
    (path,) = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("regrow").setLevel(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)  # libraries telling each other of renames
    disable_progress_bar()
    try:
        train(WorkerJob.read(Path(path)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

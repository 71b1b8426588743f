"""Trains as a job says, as one of its ranks, and writes the result; `rank` starts the process."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from regrow.infra.artifacts import ArtifactStore
from regrow.infra.freed_memory import keep_freed_memory
from regrow.infra.launch import end_with_agent, local_rank
from regrow.tasks.modeling.load import DTYPES
from regrow.tasks.modeling.recompute import recompute_layers
from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.stage import StageError
from regrow.tasks.train.arguments import training_arguments, use_cpu, with_steps
from regrow.tasks.train.callbacks import FollowSchedule, LiveReporter, RecordMetrics
from regrow.tasks.train.checkpoint import (
    METRICS_FILE,
    TOTALS_FILE,
    Checkpoint,
    Checkpoints,
    agree_on_newest,
)
from regrow.tasks.train.choosing import BEST_FILE, KeepBest, LossWatchdog, has_stopped
from regrow.tasks.train.consolidation import save_trained
from regrow.tasks.train.costs import row_costs, row_lengths
from regrow.tasks.train.devices import device_name, limit_memory
from regrow.tasks.train.files import SavedState
from regrow.tasks.train.fitting import Fit, fit
from regrow.tasks.train.gathering import gather_rounded
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.loader import CUDA_MULTIPLE
from regrow.tasks.train.metrics import Meter, MetricsFile, Totals, peak_memory_gib, read_metrics
from regrow.tasks.train.model import TrainedModel, build_model
from regrow.tasks.train.order import DataOrder, Split, choose_split
from regrow.tasks.train.parallel import share_rows, whole_model_loading
from regrow.tasks.train.preemption import EXIT_CODE, StopEarly
from regrow.tasks.train.readers import Reader, validates
from regrow.tasks.train.relora import ROUNDS_FILE, Pruning, ReLoRA
from regrow.tasks.train.saving import BackgroundSaver, Ranks, Resume, SaveCheckpoints
from regrow.tasks.train.schedule import total_steps, warmup_steps
from regrow.tasks.train.trainers.sft import SftTrainer
from regrow.tasks.train.undivided import keep_undivided
from regrow.tasks.train.watchdog import Watchdog, stacks_name

logger = logging.getLogger(__name__)


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
    `job.result_path`. When training was asked to stop early the result is
    {"preempted": why, "step": n}, the state is in a checkpoint, and nothing else is written.

    Raises:
        StageError: for what the user can mend.
    """
    begin = time.monotonic()
    args = _arguments(job)
    rows = PackedRows(job.prepared, "train")
    reader = _reader(job, args)
    course = _plot_course(job, len(rows), reader.count)
    args = _with_course(args, course)
    checkpoints = _open_checkpoints(job)
    start = agree_on_newest(checkpoints, args) if checkpoints else None
    if start:
        course = _resumed(job, args, course, start)
    meter = Meter(Totals.read(start.directory / TOTALS_FILE) if start else Totals())
    trained = _model(job, args, course.split)
    fitted = fit(job, trained.model, trained.kernels, course.split, args)
    recompute_layers(trained.model, fitted.policy, job.placement.use_reentrant)
    trainer = _build_trainer(job, args, course, trained, fitted, meter, rows, start, reader)
    best = _keep_best(job, start, trainer, args.process_index)
    relora = _relora(job, start, trained, args.process_index)
    ranks = Ranks.of(args)
    limit = begin + job.placement.time_limit if job.placement.time_limit else None
    stop = StopEarly(ranks, limit, checkpoints is not None)
    with ExitStack() as stack:
        recorder = _open_recorder(job, args, course, start, stack)
        saver = _open_saver(job, ranks, checkpoints, stack)
        for callback in (
            *_early_callbacks(job, args, start, trainer, ranks, stack),
            *(callback for callback in (best, relora) if callback),
            *_callbacks(job, course, trainer, saver, meter, recorder),
            stop,
            *callbacks,
        ):
            trainer.add_callback(callback)
        stack.enter_context(stop.listening())
        meter.start()
        trainer.train()
        if saver:
            saver.finish() if stop.reason else saver.wait()
    if stop.reason:
        return {"preempted": stop.reason, "step": trainer.state.global_step}
    return _finish(job, trainer, course, meter, trained, fitted, best)


# ---- before ----


def _model(job: WorkerJob, args: TrainingArguments, split: Split) -> TrainedModel:
    with whole_model_loading(args):
        trained = build_model(job)
    share_rows(trained.model, job.placement.sharding, split.accumulation)
    return trained


def _arguments(job: WorkerJob) -> TrainingArguments:
    args = training_arguments(job.spec, job.placement, scratch=job.work / "unfinished")
    if args.process_index != 0:
        logging.getLogger("regrow").setLevel(logging.WARNING)  # rank 0 says it for all
    limit_memory(args.device, job.placement.gpu_memory_limit)
    if args.device.type == "cuda" and job.placement.tf32:
        torch.set_float32_matmul_precision("high")
    return args


def _with_course(args: TrainingArguments, course: Course) -> TrainingArguments:
    return with_steps(
        args,
        total=course.total_steps,
        warmup=course.warmup_steps,
        micro_batch_size=course.split.micro_batch_size,
        accumulation=course.split.accumulation,
    )


def _resumed(job: WorkerJob, args: TrainingArguments, course: Course, start: Checkpoint) -> Course:
    """The course from a checkpoint on; one that had come to its end early has no steps left."""
    if _has_stopped(job, start):
        course = replace(course, total_steps=start.step)  # nothing is left but to write the result
        args.max_steps = start.step
    logger.info("resuming after step %d of %d", start.step, course.total_steps)
    return course


def _open_recorder(
    job: WorkerJob,
    args: TrainingArguments,
    course: Course,
    start: Checkpoint | None,
    stack: ExitStack,
) -> _Recorder | None:
    """Rank 0's recorder, closed with the stack."""
    if args.process_index != 0:
        return None
    recorder = _Recorder.open(job, course, start)
    stack.callback(recorder.close)
    return recorder


def _open_saver(
    job: WorkerJob, ranks: Ranks, checkpoints: Checkpoints | None, stack: ExitStack
) -> BackgroundSaver | None:
    if not checkpoints:
        return None
    # Of each rank its own: one that ends early must not take away what another still reads.
    scratch = job.work / f"saving-{ranks.rank:05d}"
    saver = BackgroundSaver(checkpoints, ranks, scratch)
    stack.callback(saver.close)
    return saver


def _reader(job: WorkerJob, args: TrainingArguments) -> Reader:
    multiple = CUDA_MULTIPLE if args.device.type == "cuda" else 1
    return Reader.of(job.placement.sharding, args.process_index, args.world_size, multiple)


def _plot_course(job: WorkerJob, num_rows: int, readers: int) -> Course:
    if num_rows == 0:
        raise StageError("the prepared data holds no training rows")
    spec, wanted = job.spec, job.placement.micro_batch_size
    lengths = row_lengths(job.prepared) if spec.row_order == "by_length" else None
    order = DataOrder(num_rows, spec.global_batch_size, spec.seed, spec.row_order, lengths)
    costs = row_costs(job.prepared, job.base_model) if readers > 1 else None
    split = choose_split(spec.global_batch_size, wanted, readers, costs)
    if split.micro_batch_size != wanted:
        logger.warning(
            "micro_batch_size %d does not divide the global batch of %d rows on %d processes: %d "
            "is used, with %d accumulation steps",
            wanted,
            spec.global_batch_size,
            readers,
            split.micro_batch_size,
            split.accumulation,
        )
    total = total_steps(order.steps_per_epoch, spec.num_epochs, spec.max_steps)
    return Course(order, split, total, warmup_steps(total, spec.warmup_steps, spec.warmup_ratio))


def _open_checkpoints(job: WorkerJob) -> Checkpoints | None:
    if job.checkpoints is None:
        return None
    store = ArtifactStore.open_url(job.checkpoints.url)
    keep = job.placement.save_total_limit
    return Checkpoints(store, job.checkpoints.key, keep, job.spec)


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


def _early_callbacks(
    job: WorkerJob,
    args: TrainingArguments,
    start: Checkpoint | None,
    trainer: SftTrainer,
    ranks: Ranks,
    stack: ExitStack,
) -> list[TrainerCallback]:
    """What comes before all else at one event."""
    found: list[TrainerCallback] = []
    if job.placement.hang_timeout:
        path = job.work / stacks_name(args.process_index)
        watchdog = Watchdog(job.placement.hang_timeout, path)
        stack.callback(watchdog.close)
        found.append(watchdog)
    if start:
        found.append(Resume(SavedState(start.directory, ranks.control), trainer))
    return found


def _callbacks(
    job: WorkerJob,
    course: Course,
    trainer: SftTrainer,
    saver: BackgroundSaver | None,
    meter: Meter,
    recorder: _Recorder | None,
) -> list[TrainerCallback]:
    """In the order in which they run at one event."""
    place, total, per_epoch = job.placement, course.total_steps, course.order.steps_per_epoch
    evaluation = job.spec.validation or place.evaluation
    report = frozenset({1, total, *range(place.logging_steps, total, place.logging_steps)})
    evaluate = evaluation.due(total, per_epoch) if validates(job.prepared) else frozenset()
    save = place.saving.due(total, per_epoch) if saver else frozenset()
    found: list[TrainerCallback] = [FollowSchedule(report, evaluate, save)]
    if recorder:
        found.append(recorder.callback)
    if saver:
        metrics = recorder.file.path if recorder else None
        others = [job.work / name for name in (BEST_FILE, ROUNDS_FILE)]
        due = save | (evaluate if place.save_at_best else frozenset())
        found.append(SaveCheckpoints(saver, trainer, meter, due, metrics, others))
    if place.loss_watchdog_threshold:
        found.append(LossWatchdog(place.loss_watchdog_threshold, place.loss_watchdog_patience))
    return found


def _has_stopped(job: WorkerJob, start: Checkpoint) -> bool:
    patience = job.spec.early_stopping_patience
    return patience is not None and has_stopped(SavedState(start.directory).values, patience)


def _keep_best(
    job: WorkerJob, start: Checkpoint | None, trainer: SftTrainer, rank: int
) -> KeepBest | None:
    """What looks at validations, where the result or a checkpoint depends on them."""
    spec = job.spec
    if not (spec.keep_best or job.placement.save_at_best):
        return None
    return KeepBest(
        job.work / BEST_FILE,
        spec.early_stopping_patience,
        save=job.placement.save_at_best,
        kept=start.directory / BEST_FILE if start else None,
        writes=spec.keep_best and rank == 0,
        weights=lambda: trainer.engine.whole_weights(),
    )


def _relora(
    job: WorkerJob, start: Checkpoint | None, trained: TrainedModel, rank: int
) -> ReLoRA | None:
    """What makes the adapter's rounds, if there are to be any."""
    wanted, restarts = job.spec.relora, job.spec.restarts
    if wanted is None:
        return None
    assert trained.rounds is not None
    assert restarts is not None
    return ReLoRA(
        trained.rounds,
        restarts.steps,
        Pruning(wanted.prune_method, wanted.prune_ratio),
        job.spec.seed,
        job.work / ROUNDS_FILE,
        kept=start.directory / ROUNDS_FILE if start else None,
        writes=rank == 0,
    )


def _build_trainer(
    job: WorkerJob,
    args: TrainingArguments,
    course: Course,
    trained: TrainedModel,
    fitted: Fit,
    meter: Meter,
    rows: PackedRows,
    start: Checkpoint | None,
    reader: Reader,
) -> SftTrainer:
    pad_to, done = job.placement.pad_to, start.step if start else 0
    batches = reader.training(rows, course.order, course.split, course.total_steps, pad_to, done)
    validation = None
    if validates(job.prepared):
        micro = job.placement.eval_batch_size or course.split.micro_batch_size
        validation = reader.validation(job.prepared, micro, pad_to)
    trainer = SftTrainer(
        model=trained.model,
        args=args,
        spec=job.spec,
        partly_trained=trained.partly_trained,
        model_has_loss=trained.kernels.head is not None,
        offloads=fitted.policy == "offload",
        stays=fitted.stays,
        roomy=fitted.roomy,
        routers=trained.routers,
        batches=batches,
        validation=validation,
        meter=meter,
        autocast=None if job.spec.dtype == "float32" else DTYPES[job.spec.dtype],
    )
    keep_undivided(trained.model, trainer.accelerator)
    gather_rounded(trained.model, trainer, job.spec, job.placement.sharding)
    trainer.remove_callback(PrinterCallback)  # our own line says it
    return trainer


# ---- after ----


def _finish(
    job: WorkerJob,
    trainer: SftTrainer,
    course: Course,
    meter: Meter,
    trained: TrainedModel,
    fitted: Fit,
    best: KeepBest | None,
) -> dict[str, Any]:
    trainer.use_final_weights()
    model = trainer.accelerator.unwrap_model(trainer.model)
    result = _result(trainer, course, meter, model)
    result["timing"] |= {"kernels": trained.kernels.record(), **fitted.record()}
    save_trained(job, trainer, trained, best if job.spec.keep_best else None)
    if trainer.args.process_index == 0:
        result |= _curves(read_metrics(job.metrics_path))
        job.result_path.write_text(json.dumps(result, indent=1, sort_keys=True))
    if trainer.args.world_size > 1:
        torch.distributed.barrier()
    return result


def _result(trainer: Trainer, course: Course, meter: Meter, model: Any) -> dict[str, Any]:
    # A parameter that DeepSpeed has divided says its size elsewhere.
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
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
            "saving_seconds": totals.saving_seconds,
            "world_size": trainer.args.world_size,
            "micro_batch_size": course.split.micro_batch_size,
            "accumulation": course.split.accumulation,
            "device": device_name(trainer.args.device),
        },
    }


def _curves(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses by step, without times."""
    curve = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "router_aux_loss")
    history = [{name: r[name] for name in curve if name in r} for r in records]
    losses = [r["loss"] for r in history if "loss" in r]
    evals = [{"step": r["step"], "loss": r["eval_loss"]} for r in history if "eval_loss" in r]
    return {
        "train_loss": losses[-1] if losses else None,
        "eval_losses": evals,
        "history": history,
    }


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the process; the one argument is the path of `job.json`."""
    end_with_agent()
    (path,) = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("regrow").setLevel(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)  # libraries telling each other of renames
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant
    disable_progress_bar()
    job = WorkerJob.read(Path(path))
    if use_cpu(job.placement.device):
        keep_freed_memory()
    try:
        result = train(job)
        if "preempted" in result:
            _tell_preempted(job, result)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if "preempted" in result:
        sys.exit(EXIT_CODE)


def _tell_preempted(job: WorkerJob, result: Mapping[str, Any]) -> None:
    """One rank of each machine writes it, and before any exits: torchrun then ends the others."""
    if local_rank() == 0:
        job.preempted_path.write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()

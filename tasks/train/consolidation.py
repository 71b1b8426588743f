"""Brings what training divided over its processes together into the files of its result."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regrow.tasks.modeling.ends import align_special_ids
from regrow.tasks.modeling.load import DTYPES, load_tokenizer
from regrow.tasks.train.choosing import KeepBest
from regrow.tasks.train.export import save_adapter, save_model, save_rounds
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.model import TrainedModel, build_model
from regrow.tasks.train.parallel import whole_model_loading
from regrow.tasks.train.state import Engine, all_parameters
from regrow.tasks.train.streamed import save_streamed, why_not_streamed
from regrow.tasks.train.trainers.sft import SftTrainer

logger = logging.getLogger(__name__)


def save_trained(
    job: WorkerJob, trainer: SftTrainer, trained: TrainedModel, best: KeepBest | None
) -> None:
    """Write the trained adapter, or all weights. Call it on every rank; the first one writes.

    Args:
        best: what was kept of the best validation, where that is the result.
    """
    engine, is_first = trainer.engine, trainer.args.process_index == 0
    if is_first:
        job.out.mkdir(parents=True, exist_ok=True)
    with whole_model_loading(trainer.args):
        weights = engine.whole_weights(frozen=job.spec.adapter is None)
        if not is_first:
            _only_gather(weights, engine)
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        save = _save_adapter if job.spec.adapter else _save_model
        save(_Result(job, model, weights, engine.is_sharded(), trained, best))


@dataclass(frozen=True)
class _Result:
    """What the first rank has at the end."""

    job: WorkerJob
    model: Any
    weights: Iterable[tuple[str, Tensor]]
    """Whole ones; gathered as they are asked for."""
    sharded: bool
    trained: TrainedModel
    best: KeepBest | None

    def whole_model(self) -> Any:
        """The trained model, or the best, in the host's memory if it was divided."""
        model = _built_anew(self.job, self.weights) if self.sharded else self.model
        if self.best:
            self.best.restore(model)
        return model


def _save_adapter(result: _Result) -> None:
    model, trained, out = result.whole_model(), result.trained, result.job.out
    if trained.rounds:
        trained.rounds.finish()
        save_rounds(trained.rounds, out)
    else:
        save_adapter(model, out, trained.first_values)


def _save_model(result: _Result) -> None:
    """One weight after the other, where the model's files allow that."""
    job, model, best = result.job, result.model, result.best
    why_not = why_not_streamed(model)
    if why_not:
        logger.info("all weights are put together in memory before they are stored: %s", why_not)
        model = result.whole_model()
    align_special_ids(model, load_tokenizer(job.prepared / "tokenizer"))
    if why_not:
        save_model(model, job.out, DTYPES[job.spec.dtype], result.trained.use_cache)
    else:
        model.config.use_cache = result.trained.use_cache
        weights = best.in_place_of(result.weights) if best else result.weights
        save_streamed(model, weights, job.out, job.spec.dtype)


def _only_gather(weights: Iterable[tuple[str, Tensor]], engine: Engine) -> None:
    """A rank that writes nothing has a part of each weight."""
    if engine.is_sharded():
        for _ in weights:
            pass


def _built_anew(job: WorkerJob, weights: Iterable[tuple[str, Tensor]]) -> Any:
    """The trained model whole in the host's memory."""
    model = build_model(job, whole=True).model
    parameters = all_parameters(model)
    for name, weight in weights:
        parameters[name].data.copy_(weight)
    return model

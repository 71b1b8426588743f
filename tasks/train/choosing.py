"""Which model of a training is its result: the best one seen in validations, and when to stop."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from regrow.tasks.stage import StageError

logger = logging.getLogger(__name__)

BEST_FILE = "best.safetensors"
"""Of a checkpoint: what was trained, as it was in the best validation so far."""


class KeepBest(TrainerCallback, ExportableState):
    """Keeps the trained parameters of the lowest validation loss; stops where none comes lower."""

    def __init__(
        self,
        path: Path,
        patience: int | None = None,
        *,
        save: bool = False,
        kept: Path | None = None,
        writes: bool = True,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
    ) -> None:
        """`path`: the file it keeps them in, beginning with what a checkpoint had (`kept`).

        Args:
            patience: validations without a lower loss that end the training; None: no number.
            save: ask for a checkpoint after each validation that brings a lower loss.
            writes: whether this rank writes the file.
            weights: what is trained, each in full; all ranks ask for it together.
        """
        self.path, self._patience, self._save, self._writes = path, patience, save, writes
        self._weights = weights
        self.misses = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if kept is not None and kept.is_file() and writes:
            shutil.copyfile(kept, path)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the lowest loss itself is in `TrainerState`."""
        return {"args": {}, "attributes": {"misses": self.misses}}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called on all ranks, with the same loss."""
        loss = (metrics or {})["eval_loss"]
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, state.global_step
            self.misses = 0
            control.should_save = control.should_save or self._save
            best = {n: w.cpu() for n, w in self._weights() if self._writes}
            if self._writes:
                save_file({name: weight.contiguous() for name, weight in best.items()}, self.path)
            return
        self.misses += 1
        if self._patience is not None and self.misses >= self._patience:
            logger.info("no lower validation loss in %d validations: training stops", self.misses)
            control.should_training_stop = True

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """Put the best parameters into the model; without any validation it stays as it is."""
        if not self.path.is_file():
            return
        best = load_file(self.path)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(best[name])

    def in_place_of(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights one after the other, those that were kept from the best validation."""
        if not self.path.is_file():
            yield from weights
            return
        with safe_open(self.path, "pt") as best:
            kept = set(best.keys())
            for name, weight in weights:
                yield name, best.get_tensor(name) if name in kept else weight


def has_stopped(values: Mapping[str, Any], patience: int) -> bool:
    """Whether a saved state is of a training that had stopped early."""
    kept = values.get("callbacks", {}).get("KeepBest", {})
    return kept.get("misses", 0) >= patience


class LossWatchdog(TrainerCallback):
    """Ends a training whose loss stays high: what would come of it is of no use."""

    def __init__(self, threshold: float, patience: int) -> None:
        self._threshold, self._patience, self._high = threshold, patience, 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Raises StageError at the report that is one too many."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self._high = self._high + 1 if loss > self._threshold else 0
        if self._high >= self._patience:
            raise StageError(
                f"the loss was above loss_watchdog_threshold {self._threshold} in {self._high} "
                f"reports in a row (now {loss:.4g}, at step {state.global_step}): training has "
                "diverged. Lower learning_rate, raise warmup_steps, or raise the threshold"
            )

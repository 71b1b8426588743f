"""What happens between steps: the schedule of reports, evaluations and saves, and the reports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.tasks.train.metrics import MetricsFile

# What of the Trainer's log goes into metrics.jsonl; the rest is of no use (total_flos, ...).
_KEPT = (
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "router_aux_loss",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "tokens",
    "supervised_tokens",
    "memory_gib",
    "seconds",
)


class LiveReporter(Protocol):
    """The part of `regrow.infra.tracking.MetricsReporter` that training needs."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class FollowSchedule(TrainerCallback):
    """Says after which steps (counted from 1) to report, evaluate and save."""

    report: frozenset[int]
    evaluate: frozenset[int]
    save: frozenset[int]

    def on_step_end(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Set the flags that the Trainer reads next."""
        control.should_log = state.global_step in self.report
        control.should_evaluate = state.global_step in self.evaluate
        control.should_save = state.global_step in self.save
        return control


class RecordMetrics(TrainerCallback):
    """On rank 0: metrics to their file, to a live reporter if there is one, a line to people."""

    def __init__(
        self,
        file: MetricsFile,
        steps_per_epoch: int,
        live: LiveReporter | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._file, self._steps_per_epoch, self._live = file, steps_per_epoch, live
        self._say = say or _print
        self._first: tuple[int, float] | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by `Trainer.log` on every rank; this callback is on rank 0 only."""
        metrics = {name: logs[name] for name in _KEPT if name in logs} if logs else {}
        if not metrics:
            return  # the Trainer's own summary at the end
        step = state.global_step
        metrics["epoch"] = step / self._steps_per_epoch
        self._file.append({"step": step, **metrics})
        if self._live is not None:
            self._live.log({name: float(value) for name, value in metrics.items()}, step)
        self._say(self._line(metrics, step, state.max_steps))

    def _line(self, metrics: Mapping[str, float], step: int, total: int) -> str:
        if "eval_loss" in metrics:
            return f"step {step}/{total} | validation loss {metrics['eval_loss']:.4f}"
        return " | ".join(
            (
                f"step {step}/{total}",
                f"loss {metrics['loss']:.4f}",
                f"lr {metrics['learning_rate']:.2e}",
                f"{metrics['tokens_per_second']:,.0f} tok/s",
                f"{metrics['memory_gib']:.1f} GiB",
                f"{self._left(metrics['seconds'], step, total)} left",
            )
        )

    def _left(self, seconds: float, step: int, total: int) -> str:
        """Time left at the pace since this process's first report (before it: since step 0)."""
        step0, seconds0 = self._first or (0, 0.0)
        if self._first is None:
            self._first = (step, seconds)
        left = (seconds - seconds0) / (step - step0) * (total - step)
        return str(timedelta(seconds=round(left)))


def _print(line: str) -> None:
    """To standard output at once: a person or the launching process waits for it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()

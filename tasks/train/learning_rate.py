"""The learning rate's course: Transformers' schedules, and those of Axolotl that it lacks.

Each curve is a factor of the highest rate, as a function of the steps taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from transformers import get_scheduler

from regrow.tasks.stage import StageError
from regrow.tasks.train.spec import Restarts, TrainSpec

Curve = Callable[[int], float]

_REX = 0.1
"""How long REX stays high: Axolotl's value (0.5 in Chen et al. 2021, arXiv 2107.04197)."""

_LOWEST_AT_RESTART = 1e-3
"""Share of the rate that is left at a jagged restart: Axolotl's value."""


def make_scheduler(optimizer: Optimizer, spec: TrainSpec, warmup: int, total: int) -> Any:
    """The scheduler of a training of `total` steps, the first `warmup` of them rising.

    Raises:
        StageError: for arguments that the schedule does not take.
    """
    try:
        scheduler = _plain_scheduler(optimizer, spec, warmup, total)
    except (TypeError, ValueError) as error:
        raise StageError(f"lr_scheduler_kwargs: {spec.lr_scheduler}: {error}") from error
    if spec.restarts is None:
        return scheduler
    if not isinstance(scheduler, LambdaLR):
        raise StageError(f"jagged_restart_steps: {spec.lr_scheduler} cannot restart")
    curves = [functools.partial(_jagged, curve, spec.restarts) for curve in scheduler.lr_lambdas]
    return LambdaLR(optimizer, curves)


def _plain_scheduler(optimizer: Optimizer, spec: TrainSpec, warmup: int, total: int) -> LRScheduler:
    name, kwargs = spec.lr_scheduler, dict(spec.lr_scheduler_kwargs)
    if name == "reduce_lr_on_plateau":
        return ReduceLROnPlateau(optimizer, **kwargs)
    if name == "one_cycle":
        return _one_cycle(optimizer, kwargs, warmup, total)
    if name in _CURVES:
        curve = functools.partial(_CURVES[name], warmup=warmup, total=total, **kwargs)
        curve(step=0)  # arguments it does not take show now
        return LambdaLR(optimizer, lambda step: curve(step=step))
    return get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)


def _one_cycle(optimizer: Optimizer, kwargs: dict[str, Any], warmup: int, total: int) -> OneCycleLR:
    """Smith 2018 (arXiv 1803.09820): up to the highest rate in the warm-up, then far below.

    The betas stay as the recipe says: not every optimizer has some to be cycled.
    """
    highest = [group["lr"] for group in optimizer.param_groups]
    settings = {"pct_start": max(warmup, 1) / total, "cycle_momentum": False} | kwargs
    return OneCycleLR(optimizer, highest, total_steps=total + 1, **settings)


def _rising(step: int, warmup: int, power: int = 1) -> float | None:
    """The factor during the warm-up; None after it."""
    return (step / warmup) ** power if step < warmup else None


def _rex(step: int, warmup: int, total: int, min_lr_rate: float = 0.0) -> float:
    """Reflected exponential: high for long, then falling fast."""
    rising = _rising(step, warmup)
    if rising is not None:
        return rising
    left = max(total - step, 0) / max(total - warmup, 1)
    return min_lr_rate + (1 - min_lr_rate) * left / (_REX + (1 - _REX) * left)


def _cosine_until(
    step: int,
    warmup: int,
    total: int,
    min_lr_rate: float = 0.0,
    until: float = 1.0,
    quadratic: bool = False,
) -> float:
    """Half a cosine down to the lowest rate, reached after the share `until` of all steps."""
    rising = _rising(step, warmup, 2 if quadratic else 1)
    if rising is not None:
        return rising
    last = total * until
    share = min(1.0, (step - warmup) / max(last - warmup, 1))
    return min_lr_rate + (1 - min_lr_rate) * (1 + math.cos(math.pi * share)) / 2


_CURVES: dict[str, Callable[..., float]] = {"rex": _rex, "cosine_until": _cosine_until}


def _jagged(curve: Curve, restarts: Restarts, step: int) -> float:
    """The curve, falling before each restart and rising after it; the first cycle starts plain."""
    cycle, place = divmod(step, restarts.steps)
    low, left = _LOWEST_AT_RESTART, restarts.steps - place
    scale = 1.0
    if cycle > 0 and place < restarts.warmup:
        scale = low + (1 - low) * place / restarts.warmup
    if restarts.anneal and left <= restarts.anneal:
        scale = min(scale, low + (1 - low) * (left - 1) / restarts.anneal)
    return curve(step) * scale

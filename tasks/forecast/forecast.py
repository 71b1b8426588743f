"""What a run will need, before a GPU is touched: data, parameters, memory, time and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from regrow.configs.recipe import Recipe
from regrow.infra.devices import local_gpus
from regrow.tasks.forecast import devices
from regrow.tasks.forecast.data import Amount
from regrow.tasks.forecast.fit import Choice, Room, Wish, advice, choose
from regrow.tasks.forecast.memory import CONTEXT, GIB, Memory, Setting, host_bytes, memory
from regrow.tasks.forecast.recipe_setting import Model, careful, read_model, wish_of
from regrow.tasks.forecast.setting import OFFLOAD
from regrow.tasks.forecast.trainable import Trainable, UnknownTargetsError
from regrow.tasks.stage import StageError
from regrow.tasks.train.schedule import total_steps

_SMALLEST_MODEL, _FEWEST_TOKENS = 1e9, 4096
"""Rates were measured from a 1B model and 4,096 tokens in a micro-batch on; what is smaller leaves
a GPU idle for a share that nobody measured."""


@dataclass(frozen=True)
class Course:
    """The training in numbers."""

    amount: Amount
    steps: int
    tokens: int
    """Over all epochs."""


@dataclass(frozen=True)
class Hours:
    """How long training takes, between two measured rates."""

    shortest: float
    longest: float
    gpus: int
    source: str


@dataclass(frozen=True)
class Forecast:
    """All of it; what is not known is None, and says why."""

    model: Model
    trainable: Trainable | None
    choice: Choice
    course: Course | None
    memory: Memory | None
    device: devices.Device | None
    hours: Hours | None
    lines: tuple[str, ...]
    """Advice, and what is not known."""
    host: float = 0.0
    """Bytes of the host's memory, for each GPU, in which activations wait."""


def local_device() -> devices.Device | None:
    """The GPU of this machine with the least memory; None where there is none."""
    found = [devices.device_of(gpu.name, gpu.memory) for gpu in local_gpus()]
    return min(found, key=lambda device: device.memory, default=None)


def placement_of(
    recipe: Recipe, place: str, device: devices.Device | None, processes: int
) -> Choice:
    """What the recipe's `auto` means on a device; its own values where it has none."""
    asked = careful(recipe)
    if "auto" not in (recipe.micro_batch_size, recipe.gradient_checkpointing):
        return asked
    model = read_model(place)
    device = _limited(device, recipe.gpu_memory_limit)
    wish = _wish(recipe, model, processes)
    return choose(wish, _room(device), _least(recipe, asked))


def _limited(device: devices.Device | None, gib: float | None) -> devices.Device | None:
    """What training may fill of a GPU, which need not be known; CUDA's own memory is beside it."""
    if gib is None:
        return device
    most = round(gib * GIB + CONTEXT)
    if device is None:
        return devices.Device("GPU", most)
    return replace(device, memory=min(device.memory, most))


def _room(device: devices.Device | None) -> Room | None:
    return Room.of_device(device.memory) if device else None


def _least(recipe: Recipe, asked: Choice) -> Choice:
    if recipe.gradient_checkpointing == "auto":
        return replace(asked, checkpointing=True)
    return asked


def _wish(recipe: Recipe, model: Model, processes: int) -> Wish | None:
    if model.shape is None:
        return None
    try:
        return wish_of(recipe, model.shape, processes)
    except (UnknownTargetsError, StageError):
        return None


def forecast(
    recipe: Recipe,
    place: str,
    amount: Amount | None,
    device: devices.Device | None,
    processes: int,
) -> Forecast:
    """What a run of the recipe needs.

    Args:
        place: of the base model.
        amount: of training data; None where it is not known.
        device: the GPU it runs on; None where it is not known.
        processes: training processes, one on each GPU.
    """
    model = read_model(place)
    known, device = device, _limited(device, recipe.gpu_memory_limit)
    choice = careful(recipe)
    course = _course(recipe, amount) if amount else None
    beside = _side_by_side(model)
    if model.shape is None:
        lines = (f"memory: {model.why_unknown}", *beside)
        return Forecast(model, None, choice, course, None, device, None, lines)
    try:
        wish = wish_of(recipe, model.shape, processes)
    except (UnknownTargetsError, StageError) as error:
        lines = (f"memory: {error}", *beside)
        return Forecast(model, None, choice, course, None, device, None, lines)
    if "auto" in (recipe.micro_batch_size, recipe.gradient_checkpointing):
        choice = choose(wish, _room(device), _least(recipe, choice))
    wish = replace(wish, micro_batch=choice.micro_batch, checkpointing=choice.checkpointing)
    setting = wish.at(choice.micro_batch, choice.checkpointing)
    found = memory(setting)
    lines = [*(f"note: {note}" for note in found.notes), *beside]
    if device is not None:
        lines += advice(wish, found, device.memory)
    hours, why = _hours(setting, course, known)
    lines += [why] if why else []
    waiting = host_bytes(setting)
    if setting.policy == OFFLOAD:
        lines.append(
            f"note: activations of {waiting / GIB:.0f} GiB wait in the host's memory, less what "
            "the GPU has room for"
        )
    told = (model, setting.trainable, choice, course, found, device, hours, tuple(lines))
    return Forecast(*told, waiting)


def _side_by_side(model: Model) -> tuple[str, ...]:
    """What the figures leave out for models that packed attention is not enough for."""
    if not model.apart:
        return ()
    why = f"the model's layers ({', '.join(model.apart)}) compute the examples of a row side by "
    what = "side, each padded to the longest, without packed attention"
    return (f"note: {why}{what}: it takes more memory and time than packed rows",)


def _course(recipe: Recipe, amount: Amount) -> Course:
    per_epoch = math.ceil(amount.rows / recipe.global_batch_size)
    steps = total_steps(per_epoch, recipe.num_epochs, recipe.max_steps)
    return Course(amount, steps, round(amount.tokens * steps / per_epoch))


def step_flops(setting: Setting, mean_length: float) -> float:
    """Useful operations a token: forward and backward, the head, adapters, causal attention.

    Weights cost 2 forward and 2 for the gradient of what they read; 2 more where they are trained
    themselves. Attention over an example of n tokens costs 6 n d_q a token and layer. Recomputation
    counts as nothing, nor does padding.
    """
    shape, trainable = setting.shape, setting.trainable
    weights = shape.active_matrix_parameters + shape.vocabulary * shape.hidden
    each = 4 if trainable.has_adapter else 6
    queries = shape.attention.query_heads * shape.attention.head_size
    attention = 6 * shape.layers * queries * mean_length
    return each * weights + 6 * trainable.adapter + attention


def _hours(
    setting: Setting, course: Course | None, device: devices.Device | None
) -> tuple[Hours | None, str]:
    """(time, why there is none)."""
    if course is None or device is None:
        return None, ""
    method = "full"
    if setting.trainable.has_adapter:
        method = "lora" if setting.bits == 16 else "qlora" if setting.bits == 4 else "int8"
    if setting.shape.family.experts is not None:
        method = "experts"
    if setting.shape.parameters < _SMALLEST_MODEL or setting.tokens < _FEWEST_TOKENS:
        size = f"{setting.shape.parameters / 1e9:.2f} billion parameters"
        return None, f"time: no measured rate for {size} and micro-batches of {setting.tokens:,}"
    found = devices.rate(device.name, method, setting.policy)
    gpus = setting.division.processes
    share = devices.scaling(setting.division.way, gpus)
    if found is None or share is None:
        what = f"{gpus} GPUs" if found else f"{method} on {device.name}"
        return None, f"time: no measured rate for {what} with recomputing {setting.policy!r}"
    work = step_flops(setting, course.amount.mean_length) * course.tokens
    full = devices.peak(device.name) * gpus * share * 3600
    return Hours(work / full / found.highest, work / full / found.lowest, gpus, found.source), ""


def as_json(found: Forecast, price_per_hour: float | None) -> dict[str, Any]:
    """For machines."""
    from regrow.tasks.forecast.memory import as_json as memory_json

    shape, trainable, hours = found.model.shape, found.trainable, found.hours
    return {
        "data": found.course
        and {
            "tokens": found.course.amount.tokens,
            "rows": found.course.amount.rows,
            "examples": found.course.amount.examples,
            "source": found.course.amount.source,
            "steps": found.course.steps,
            "trained_tokens": found.course.tokens,
        },
        "parameters": {
            "total": shape.parameters if shape else found.model.stored,
            "trainable": trainable.total if trainable else None,
        },
        "placement": {
            "micro_batch_size": found.choice.micro_batch,
            "gradient_checkpointing": found.choice.checkpointing,
            "host_memory": round(found.host),
            "why": found.choice.why,
        },
        "memory": memory_json(found.memory) if found.memory else None,
        "device": found.device and {"name": found.device.name, "memory": found.device.memory},
        "time": hours
        and {
            "hours": [hours.shortest, hours.longest],
            "gpus": hours.gpus,
            "source": hours.source,
            "cost": costs(hours, price_per_hour),
        },
        "advice": list(found.lines),
    }


def costs(hours: Hours, price_per_hour: float | None) -> list[float] | None:
    """Lowest and highest price of the training; a price is for one GPU."""
    if price_per_hour is None:
        return None
    return [time * hours.gpus * price_per_hour for time in (hours.shortest, hours.longest)]

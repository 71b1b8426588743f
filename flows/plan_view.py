"""`regrow plan`: the stages and why they run, then data, parameters, memory, time and advice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from regrow.configs.load import Loaded
from regrow.flows import show
from regrow.flows.workplace import Workplace
from regrow.infra.artifacts import ArtifactDamaged
from regrow.tasks.build import stage_key
from regrow.tasks.forecast import devices
from regrow.tasks.forecast.data import Amount, prepared_amount, sampled_amount
from regrow.tasks.forecast.forecast import Forecast, Hours, as_json, costs, forecast, local_device
from regrow.tasks.forecast.memory import CONTEXT, GIB, Memory
from regrow.tasks.plan import Plan


@dataclass(frozen=True)
class Question:
    """What the command line asks beside the recipe."""

    device: str | None = None
    """A name in `devices.DEVICES`; None: this machine's GPU."""
    price_per_hour: float | None = None
    """Of one GPU."""
    json: bool = False


def plan_text(loaded: Loaded, workplace: Workplace, plan: Plan, question: Question) -> str:
    """All that is known before anything runs.

    Raises:
        StageError: for a device that is not known.
    """
    device = devices.device_named(question.device) if question.device else local_device()
    train = plan.train.placement
    found = forecast(
        loaded.recipe,
        train.base_model,
        _amount(workplace, plan),
        device,
        train.num_processes,
    )
    if question.json:
        stages = show.plan_rows(workplace, plan)
        data = {"recipe": str(loaded.path), "store": workplace.store_url, "stages": stages}
        return json.dumps(data | as_json(found, question.price_per_hour), indent=1)
    table = show.plan_table(loaded, workplace, plan)
    return "\n".join([table, "", *_lines(found, question.price_per_hour)])


def _amount(workplace: Workplace, plan: Plan) -> Amount | None:
    """From the record of the prepared data, which may be another run's, or from the sources."""
    try:
        record = workplace.artifacts.lookup(stage_key(plan.prepare))
    except ArtifactDamaged:
        record = None
    if record is not None:
        return prepared_amount(record.result)
    return sampled_amount(plan.prepare.spec, plan.prepare.placement)


def _lines(found: Forecast, price_per_hour: float | None) -> Iterator[str]:
    yield _row("data", _data(found))
    yield _row("parameters", _parameters(found))
    if found.memory is not None:
        yield _row("memory", _total(found.memory, found))
        yield from (_row("", line) for line in _parts(found.memory))
    if found.hours is not None:
        yield _row("time", _time(found.hours))
        price = costs(found.hours, price_per_hour)
        if price:
            gpus = f"{found.hours.gpus} GPU" + ("s" if found.hours.gpus > 1 else "")
            yield _row("cost", f"{_range(*price)}, for {gpus} at {price_per_hour:g} an hour each")
    for line in found.lines:
        yield _row("advice" if line.startswith("it ") else "", line)


def _row(name: str, text: str) -> str:
    return f"{name:<11}{text}"


def _data(found: Forecast) -> str:
    if found.course is None:
        return (
            "not known before `regrow preprocess` (only JSON Lines on this machine are looked at)"
        )
    amount, about = found.course.amount, "about " if found.course.amount.is_estimate else ""
    return (
        f"{about}{amount.tokens:,} tokens, {amount.examples:,} examples in {amount.rows:,} rows "
        f"({amount.source}); {about}{found.course.steps:,} steps"
    )


def _parameters(found: Forecast) -> str:
    shape, trainable = found.model.shape, found.trainable
    if shape is None:
        stored = found.model.stored
        return f"{stored:,} in the files" if stored else "not known"
    if trainable is None:
        return f"{shape.parameters:,}"
    total = shape.parameters + trainable.adapter + trainable.whole
    share = trainable.total / total
    return f"{total:,}, of which {trainable.total:,} are trained ({share:.2%})"


_RECOMPUTING = {
    "False": "no checkpointing",
    "none": "no checkpointing",
    "True": "with checkpointing",
    "full": "with checkpointing",
    "selective": "with selective checkpointing",
    "offload": "with checkpoints in the host's memory",
}


def _total(memory: Memory, found: Forecast) -> str:
    choice = found.choice
    how = f"micro_batch_size {choice.micro_batch}, {_RECOMPUTING[str(choice.checkpointing)]}"
    why = f" ({choice.why})" if choice.why else ""
    device = f" of {found.device.memory / GIB:.1f} on {found.device.name}" if found.device else ""
    return (
        f"{memory.total / GIB:.1f} GiB{device} for each GPU; {how}{why}; fullest: {memory.moment}"
    )


def _parts(memory: Memory) -> Iterator[str]:
    parts = {
        **memory.parts,
        "CUDA context (assumed)": CONTEXT,
        "fragmentation (assumed)": memory.fragmentation,
    }
    for name, size in parts.items():
        yield f"{name:<24}{size / GIB:8.2f} GiB"


def _time(hours: Hours) -> str:
    return f"{_range(hours.shortest, hours.longest)} hours, at rates measured with {hours.source}"


def _range(low: float, high: float) -> str:
    first, last = _short(low), _short(high)
    return first if first == last else f"{first} to {last}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"

"""Which activations are computed again on the device that is there: one answer for all ranks.

The memory model of `regrow plan` gives it (`regrow.tasks.forecast`), told what only the worker
knows: the memory that is free, the kernels that were put in, the longest row.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from regrow.tasks.forecast.fit import Choice, Room, Wish, choose, host_lacks, staying
from regrow.tasks.forecast.job_setting import Facts, wish_of_job
from regrow.tasks.forecast.memory import GIB, Memory, host_bytes, memory
from regrow.tasks.forecast.model_shape import UnknownArchitectureError, model_shape
from regrow.tasks.forecast.setting import FULL_LAYERS, NONE, OFFLOAD, SELECTIVE
from regrow.tasks.forecast.trainable import UnknownTargetsError
from regrow.tasks.modeling.kernels import Swapped
from regrow.tasks.modeling.row_sizes import read_sizes
from regrow.tasks.modeling.side_by_side import is_attached
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.order import Split

logger = logging.getLogger(__name__)

_HOLES = 2 * GIB
"""Weights that were laid anew left 1.1 GiB between others (LoRA on Llama-3.1-8B's shape, H100,
2026-11-22)."""


@dataclass(frozen=True)
class Fit:
    """How much is computed again, and what that is expected to take."""

    policy: str
    """One of `regrow.tasks.modeling.recompute.POLICIES`."""
    why: str = ""
    forecast: Memory | None = None
    """Of one GPU; None where the model's shape is not known, or on a CPU."""
    room: Room | None = None
    """Of the rank that has the least."""
    stays: float = 0.0
    """Bytes of activations that stay on the device although others wait on the host."""
    fits: bool = True
    """False where "auto" found nothing that does, or the host has too little memory."""
    fallback: str | None = None
    """What takes less of the device, should its memory run out, if there is something."""

    @property
    def roomy(self) -> bool:
        """Whether the device has room for holes between tensors; not where nobody knows."""
        if self.room is None:  # on a CPU
            return True
        if self.policy == OFFLOAD or self.forecast is None:
            return False
        return self.room.device - self.forecast.reserved > _HOLES

    def record(self) -> dict[str, Any]:
        """As the train stage's result names it."""
        found: dict[str, Any] = {"recomputes": self.policy}
        if self.why:
            found["recomputes_why"] = self.why
        if self.forecast is not None:
            found["forecast_memory_gib"] = self.forecast.allocated / GIB
        if self.room is not None:
            found["free_memory_gib"] = self.room.device / GIB
            if self.room.host is not None:
                found["free_host_memory_gib"] = self.room.host / GIB
        return found


def fit(job: WorkerJob, model: Any, kernels: Swapped, split: Split, args: TrainingArguments) -> Fit:
    """What the placement's gradient checkpointing means here; every rank must call it.

    Args:
        model: as it is trained.
    """
    room = smallest_room(args) if args.device.type == "cuda" else None
    asked, fallback = job.placement.gradient_checkpointing, job.placement.fallback
    if is_attached(model):
        wish, unknown = None, "it computes examples side by side, which is not counted yet"
        if asked == OFFLOAD:
            logger.warning("gradient_checkpointing: offload is for packed rows; here it is true")
            asked = True
    else:
        wish, unknown = _wish(job, model.config, kernels, split, args.world_size)
    found = [decide(asked, wish, unknown, room, fallback)]
    if args.world_size > 1:  # one for all, though their libraries might differ
        torch.distributed.broadcast_object_list(found, src=0, device=args.device)
    if found[0].why:
        level = logging.INFO if found[0].fits else logging.WARNING
        logger.log(level, "gradient_checkpointing: %s, %s", found[0].policy, found[0].why)
    if found[0].fallback:  # `regrow.tasks.train.attempts` listens
        policy = found[0].fallback
        logger.info("should memory run out, it goes on with gradient_checkpointing: %s", policy)
    return found[0]


def decide(
    asked: bool | str,
    wish: Wish | None,
    unknown: str,
    room: Room | None,
    fallback: str | None = None,
) -> Fit:
    """The answer from the facts.

    Args:
        asked: true, false, a policy or "auto".
        unknown: why there is no wish.
        room: None on a CPU, where nothing is computed again unless it is asked for.
        fallback: the policy that takes its place, now that memory has run out.
    """
    is_auto = asked == "auto"
    if fallback is not None:
        found = _expected(fallback, wish, room, fills=False)
    elif is_auto:
        found = _chosen(wish, unknown, room)
    else:
        policy = {True: FULL_LAYERS, False: NONE}.get(asked) if isinstance(asked, bool) else asked
        assert policy is not None
        found = _expected(policy, wish, room)
    return dataclasses.replace(found, fallback=_fallback(found, is_auto, wish))


def _chosen(wish: Wish | None, unknown: str, room: Room | None) -> Fit:
    """What "auto" means."""
    if room is None:
        return Fit(NONE)
    if wish is None:
        return Fit(FULL_LAYERS, f"since {unknown}", None, room)
    chosen = choose(wish, room, Choice(wish.micro_batch or 1, FULL_LAYERS))
    policy = chosen.checkpointing or NONE
    assert isinstance(policy, str)
    found = _expected(policy, wish, room)
    assert found.forecast is not None
    why = (
        f"for micro-batches of {wish.row_tokens * chosen.micro_batch:,} tokens, which take about "
        f"{found.forecast.reserved / GIB:.1f} of {room.device / GIB:.1f} GiB"
    )
    if not chosen.fits:
        why += f"; {chosen.why}"
    return dataclasses.replace(found, why=why, fits=chosen.fits)


def _expected(policy: str, wish: Wish | None, room: Room | None, fills: bool = True) -> Fit:
    """With what the memory model says of it.

    Args:
        fills: whether offloaded activations may fill what the device has to spare.
    """
    if wish is None or room is None:
        return Fit(policy, room=room)
    setting = wish.at(wish.micro_batch or 1, policy)
    stays = staying(setting, room) if fills else 0.0
    lacks = host_lacks(host_bytes(setting) - stays, room)
    forecast = memory(dataclasses.replace(setting, stays=stays))
    return Fit(policy, lacks, forecast, room, stays, fits=not lacks)


def _fallback(found: Fit, is_auto: bool, wish: Wish | None) -> str | None:
    """What takes less of the device than what was found, as far as it is ours to choose."""
    if is_auto and found.policy in (NONE, SELECTIVE):
        return FULL_LAYERS
    if wish is None or found.room is None:
        return None
    inputs = host_bytes(wish.at(wish.micro_batch or 1, OFFLOAD))
    less = is_auto
    if found.policy == OFFLOAD:
        less = found.stays >= 2 * inputs / wish.setting.shape.layers  # one stays in any case
    return OFFLOAD if less and not host_lacks(inputs, found.room) else None


def _wish(
    job: WorkerJob, config: Any, kernels: Swapped, split: Split, processes: int
) -> tuple[Wish | None, str]:
    """(what the memory model needs, why there is none)."""
    placement = dataclasses.replace(job.placement, micro_batch_size=split.micro_batch_size)
    sizes = read_sizes(job.prepared, "train")
    if sizes is None:
        return None, "the prepared data does not say how long its rows are"
    longest = max(int(sizes[:, 0].max()), placement.pad_to or 0)
    try:
        text = config.get_text_config()
        facts = Facts(
            model_shape(text.to_dict()),
            longest,
            processes,
            tuple(kernels.modules),
            str(job.start_adapter) if job.start_adapter else None,
        )
        return wish_of_job(job.spec, placement, facts), ""
    except (UnknownArchitectureError, UnknownTargetsError) as error:
        return None, str(error)


def smallest_room(args: TrainingArguments) -> Room:
    """The room of the rank that has the least, on every rank."""
    free, whole = torch.cuda.mem_get_info(args.device)
    # What torch holds already, such as a quantized base, is counted by the memory model too.
    mine = free + torch.cuda.memory_reserved(args.device)
    mine = min(mine, whole * torch.cuda.get_per_process_memory_fraction(args.device))
    host = _host_memory() / max(1, torch.cuda.device_count())
    rooms = torch.tensor([mine, host], dtype=torch.float64, device=args.device)
    if args.world_size > 1:
        torch.distributed.all_reduce(rooms, op=torch.distributed.ReduceOp.MIN)
    device, host = rooms.tolist()
    return Room(device, host)


def _host_memory(groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process may still take: what the host has free, and its container's limit."""
    left = [_left_of(*(groups / name for name in names)) for names in _LIMITS]
    return min([_available(), *left])


def _available(table: Path = Path("/proc/meminfo")) -> float:
    """Bytes that the host can give: files that are cached and can go count as free."""
    lines = table.read_text().splitlines() if table.is_file() else []
    known = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    if known:
        return 1024.0 * int(known[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


# Control groups of Linux, version 2 and 1: (limit, what is used of it, where cached files stand).
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_CACHED = ("inactive_file", "total_inactive_file")


def _left_of(limit: Path, used: Path, table: Path) -> float:
    """The rest of a limit in bytes; files that are cached and can go count as free."""
    if not (limit.is_file() and used.is_file()):
        return math.inf
    text = limit.read_text().strip()
    if text == "max":
        return math.inf
    lines = table.read_text().splitlines() if table.is_file() else []
    # Version 1 names a group's own files, and those of all below it, which `usage` counts.
    cached = [
        int(words[1]) for line in lines if (words := line.split())[:1] and words[0] in _CACHED
    ]
    return float(text) - float(used.read_text()) + max(cached, default=0)

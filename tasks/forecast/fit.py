"""What fits a GPU: how to run a recipe that says `auto`, and what to change where it is full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from regrow.tasks.forecast.memory import CONTEXT, GIB, Memory, Setting, host_bytes, memory
from regrow.tasks.forecast.setting import NONE, OFFLOAD, POLICIES

_MOST_TOKENS = 16_384
"""In one micro-batch that is chosen: more brings no speed. The peers' best rates on an H100 were at
8,192 (8B) and 16,384 (1B) tokens, 2026-11-21."""
_SPARE = 0.05
"""Of what comes and goes, the share that is left free by what is chosen: what stays is counted
exactly, and the rest was within half a percent in the nine trainings that an H100 measured with
today's code (`tests/bench/memory-h100.md`). None of them was LoRA with recomputing: there only a
count of tensors backs the share (`tests/bench/fake_gpu.py`)."""
_LEAST_SPARE = 0.25 * GIB
"""Left free at least, where little comes and goes: torch held 16.55 GiB of LoRA with offloading
(8B, one row of 4,096) where this model says 16.34: 0.21 more, or 23 % of what comes and goes (same
file; before its MLP went in slices, and not measured since)."""
_SHARED = 1 * GIB
"""Left free as well where there are several processes. Assumed: NCCL's buffers."""
_STAYING = 0.8
"""Of what the device has to spare, the share that activations fill which could be offloaded."""
_HOST_SHARE = 0.9
"""Of the host's free memory that activations may wait in: training needs some beside."""


@dataclass(frozen=True)
class Room:
    """The memory that a training process may fill."""

    device: float
    """Bytes that torch may still take of the GPU: without CUDA's own and what others hold."""
    host: float | None = None
    """Bytes of the host's memory for this process; None: not known, taken to be enough."""

    @classmethod
    def of_device(cls, total: int) -> Room:
        """On an empty GPU of so many bytes."""
        return cls(total - CONTEXT)


@dataclass(frozen=True)
class Wish:
    """A recipe's placement, as far as memory goes; None leaves it to be chosen."""

    setting: Setting
    """For micro-batches of one row, without checkpointing."""
    row_tokens: int
    global_batch: int
    micro_batch: int | None
    checkpointing: bool | str | None

    def at(self, micro_batch: int, checkpointing: bool | str) -> Setting:
        """The setting of one choice."""
        division = self.setting.division
        return replace(
            self.setting,
            tokens=-(-micro_batch * self.row_tokens // division.context),
            accumulates=self.global_batch > micro_batch * division.readers,
            checkpointing=checkpointing,
        )


@dataclass(frozen=True)
class Choice:
    """How a recipe is run."""

    micro_batch: int
    checkpointing: bool | str
    why: str = ""
    fits: bool = True
    """False where nothing does."""


def choose(wish: Wish | None, room: Room | None, asked: Choice) -> Choice:
    """What `auto` means: the fastest placement that fits, without changing the global batch.

    Args:
        wish: None where the model's shape is not known.
        room: None where no GPU is known.
        asked: the recipe's values where they are given, the careful ones elsewhere.
    """
    if wish is None:
        return replace(asked, why="the model's shape is not known")
    if wish.micro_batch is not None and wish.checkpointing is not None:
        return asked
    if room is None:
        return replace(asked, why="no GPU is known here, so the most careful choice")
    for micro_batch, checkpointing in _choices(wish, room):
        setting = wish.at(micro_batch, checkpointing)
        if left(setting, room) >= 0:
            free = room.device - memory(setting).reserved
            why = f"it leaves {free / GIB:.{0 if free > GIB else 1}f} GiB free"
            return Choice(micro_batch, checkpointing, why)
    least = list(_choices(wish, room))[-1]
    return Choice(*least, _why_nothing(wish, room), fits=False)


def _why_nothing(wish: Wish, room: Room) -> str:
    if room.host is not None:
        for size, checkpointing in _choices(wish, replace(room, host=None)):
            setting = wish.at(size, checkpointing)
            if checkpointing == OFFLOAD and left(setting, room) >= 0:
                lacks = host_lacks(_waiting(setting, room), room)
                return f"nothing fits; {OFFLOAD} would, but {lacks}"
    return "nothing fits; this takes the least"


def _waiting(setting: Setting, room: Room) -> float:
    """Bytes that wait in the host's memory: what does not stay on the device."""
    return host_bytes(setting) - staying(setting, room)


def host_lacks(waiting: float, room: Room) -> str:
    """Why the host cannot hold so many bytes of activations; "" where it can, or nobody knows."""
    if room.host is None or waiting <= _HOST_SHARE * room.host:
        return ""
    return (
        f"{waiting / GIB:.1f} GiB would wait in the host's memory, and it has only "
        f"{room.host / GIB:.1f} GiB free"
    )


def staying(setting: Setting, room: Room) -> float:
    """Bytes of the offloaded activations for which the device has room after all."""
    if setting.policy != OFFLOAD:
        return 0.0
    return min(max(_STAYING * left(setting, room), 0.0), host_bytes(setting))


def left(setting: Setting, room: Room) -> float:
    """Bytes of the room that can be counted on beside the setting; below 0: it is too large."""
    found = memory(setting)
    others = _SHARED if setting.division.processes > 1 else 0.0
    spare = max(_SPARE * found.passing, _LEAST_SPARE)
    return room.device - others - found.reserved - spare


def _choices(wish: Wish, room: Room) -> Iterator[tuple[int, bool | str]]:
    """Fastest first: no recomputation if any micro-batch goes without, then the largest."""
    ways: tuple[bool | str, ...] = (False, *POLICIES[1:])
    if wish.checkpointing is not None:
        ways = (wish.checkpointing,)
    sizes = [wish.micro_batch] if wish.micro_batch else _micro_batches(wish)
    for checkpointing in ways:
        for size in sizes:
            chosen = checkpointing == OFFLOAD and wish.checkpointing is None
            if chosen and host_lacks(_waiting(wish.at(size, OFFLOAD), room), room):
                continue
            yield size, checkpointing


def _micro_batches(wish: Wish) -> list[int]:
    """Sizes that share the global batch evenly, largest first; one is always there."""
    share = max(1, wish.global_batch // wish.setting.division.readers)
    most = max(1, _MOST_TOKENS * wish.setting.division.context // wish.row_tokens)
    return [size for size in range(min(share, most), 0, -1) if share % size == 0]


def advice(wish: Wish, found: Memory, device_memory: int) -> list[str]:
    """What to change when it does not fit, mildest first; what room there is when it does."""
    spare = device_memory - found.total
    now = wish.at(wish.micro_batch or 1, wish.checkpointing or False)
    if spare >= 0:
        return [f"it fits with {spare / GIB:.1f} GiB to spare", *_faster(wish, device_memory)]
    lines = [f"it does not fit: {-spare / GIB:.1f} GiB too much"]
    for words, setting in _smaller(wish, now):
        free = device_memory - memory(setting).total
        if free >= 0:
            lines.append(f"{words} fits with {free / GIB:.1f} GiB to spare")
            if len(lines) > 3:
                break
    if len(lines) == 1:
        lines.append(
            "none of fewer rows, checkpointing, 8-bit AdamW and nf4 makes it fit one GPU; "
            "share it over several (`fsdp_config: {}`)"
        )
    return lines


def _smaller(wish: Wish, now: Setting) -> Iterator[tuple[str, Setting]]:
    micro = wish.micro_batch or 1
    least = micro
    while least > 1:
        least //= 2
        yield f"micro_batch_size {least}", wish.at(least, now.checkpointing)
    if not now.recomputes:
        yield "gradient_checkpointing: true", wish.at(micro, True)
        if micro > 1:
            yield "micro_batch_size 1 with gradient_checkpointing: true", wish.at(1, True)
    if now.policy != OFFLOAD:
        last = wish.at(1, OFFLOAD)
        words = "gradient_checkpointing: offload" + (" with micro_batch_size 1" * (micro > 1))
        yield f"{words} and {host_bytes(last) / GIB:.0f} GiB of the host's memory", last
    last = wish.at(1, True)
    if now.frozen and now.bits == 16:
        yield "adapter: qlora (checkpointed, one row)", replace(last, bits=4)
    if not now.frozen and not now.optimizer.endswith("8bit"):
        yield "optimizer: adamw_8bit (checkpointed, one row)", replace(last, optimizer="adamw_8bit")
    half = replace(last, tokens=last.tokens // 2)
    yield f"sequence_len {wish.row_tokens // 2} (checkpointed, one row)", half


def _faster(wish: Wish, device_memory: int) -> list[str]:
    micro = wish.micro_batch or 1
    if wish.checkpointing in (None, False, NONE):
        return []
    if left(wish.at(micro, False), Room.of_device(device_memory)) >= 0:
        return ["gradient_checkpointing: false would fit too, and saves recomputing"]
    return []

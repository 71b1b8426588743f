"""What fits a GPU: how to run a recipe that says `auto`, and what to change where it is full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from regrow.tasks.forecast.memory import GIB, Memory, Setting, memory

_MOST_TOKENS = 16_384
"""In one micro-batch that is chosen: more brings no speed. The peers' best rates on an H100 were at
8,192 (8B) and 16,384 (1B) tokens, 2026-11-21."""
_SPARE = 0.05
"""Share of a GPU left free by what is chosen: the model is within 10 % and mostly too high."""


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
        share = self.global_batch / self.setting.division.processes
        return replace(
            self.setting,
            tokens=micro_batch * self.row_tokens,
            accumulates=share > micro_batch,
            checkpointing=checkpointing,
        )


@dataclass(frozen=True)
class Choice:
    """How a recipe is run."""

    micro_batch: int
    checkpointing: bool | str
    why: str = ""


def choose(wish: Wish | None, device_memory: int | None, asked: Choice) -> Choice:
    """What `auto` means: the fastest placement that fits, without changing the global batch.

    Args:
        wish: None where the model's shape is not known.
        device_memory: bytes; None where no GPU is known.
        asked: the recipe's values where they are given, the careful ones elsewhere.
    """
    if wish is None or (wish.micro_batch is not None and wish.checkpointing is not None):
        return replace(asked, why="the model's shape is not known" if wish is None else "")
    if device_memory is None:
        return replace(asked, why="no GPU is known here, so the most careful choice")
    room = device_memory * (1 - _SPARE)
    for micro_batch, checkpointing in _choices(wish):
        found = memory(wish.at(micro_batch, checkpointing))
        if found.total <= room:
            free = (device_memory - found.total) / GIB
            return Choice(micro_batch, checkpointing, f"it leaves {free:.0f} GiB free")
    return replace(asked, why="nothing fits; this takes the least")


def _choices(wish: Wish) -> Iterator[tuple[int, bool | str]]:
    """Fastest first: no recomputation if any micro-batch goes without, then the largest."""
    ways: tuple[bool | str, ...] = (False, True)
    if wish.checkpointing is not None:
        ways = (wish.checkpointing,)
    sizes = [wish.micro_batch] if wish.micro_batch else _micro_batches(wish)
    for checkpointing in ways:
        for size in sizes:
            yield size, checkpointing


def _micro_batches(wish: Wish) -> list[int]:
    """Sizes that share the global batch evenly, largest first; one is always there."""
    share = max(1, wish.global_batch // wish.setting.division.processes)
    most = max(1, _MOST_TOKENS // wish.row_tokens)
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
    if not now.checkpointing:
        yield "gradient_checkpointing: true", wish.at(micro, True)
        if micro > 1:
            yield "micro_batch_size 1 with gradient_checkpointing: true", wish.at(1, True)
    last = wish.at(1, True)
    if now.trainable.has_adapter and now.bits == 16:
        yield "adapter: qlora (checkpointed, one row)", replace(last, bits=4)
    if not now.trainable.has_adapter and not now.optimizer.endswith("8bit"):
        yield "optimizer: adamw_8bit (checkpointed, one row)", replace(last, optimizer="adamw_8bit")
    half = replace(last, tokens=wish.row_tokens // 2)
    yield f"sequence_len {wish.row_tokens // 2} (checkpointed, one row)", half


def _faster(wish: Wish, device_memory: int) -> list[str]:
    micro = wish.micro_batch or 1
    if wish.checkpointing and memory(wish.at(micro, False)).total <= device_memory * (1 - _SPARE):
        return ["gradient_checkpointing: false would fit too, and saves recomputing"]
    return []

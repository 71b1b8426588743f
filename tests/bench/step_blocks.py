"""What lies on the device when it holds the most: blocks of its memory by the lines that made them.

Recording costs time, so such a run measures no speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_EVENTS = 2_000_000  # of a run of a few steps of a large model
_OURS = ("/regrow/", "/tasks/", "/kernels/")
_SHOWN = 25


@contextmanager
def recorded_blocks(wanted: bool) -> Iterator[None]:
    """Prints the largest groups of blocks at the peak, also when memory runs out inside."""
    if not wanted:
        yield
        return
    import torch

    memory = torch.cuda.memory
    memory._record_memory_history(context="alloc", stacks="python", max_entries=_EVENTS)
    try:
        yield
    finally:
        for line in at_peak(memory._snapshot()["device_traces"][0]):
            print("BLOCKS " + line, flush=True)
        memory._record_memory_history(enabled=None)


def at_peak(trace: Sequence[dict[str, Any]]) -> list[str]:
    """Lines "GiB, blocks, where" of the moment when the most was held, the largest first.

    Args:
        trace: the allocator's events, as `torch.cuda.memory._snapshot` gives them.
    """
    end = _peak(trace)
    live: dict[int, dict[str, Any]] = {}
    for event in trace[: end + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for event in live.values():
        where = _where(event.get("frames", []))
        sizes[where] += event["size"]
        numbers[where] += 1
    total = sum(sizes.values())
    lines = [f"{total / 2**30:.3f} GiB in all, after event {end} of {len(trace)}"]
    for where, size in sizes.most_common(_SHOWN):
        lines.append(f"{size / 2**30:.3f} GiB, {numbers[where]}, {where}")
    return lines


def _peak(trace: Sequence[dict[str, Any]]) -> int:
    """The index of the event after which the most is held."""
    held, most, found = 0, 0, 0
    known: dict[int, int] = {}  # the trace may begin after a block was made
    for index, event in enumerate(trace):
        if event["action"] == "alloc":
            known[event["addr"]] = event["size"]
            held += event["size"]
        elif event["action"] == "free_completed":
            held -= known.pop(event["addr"], 0)
        if held > most:
            most, found = held, index
    return found


def _where(frames: Sequence[dict[str, Any]]) -> str:
    """The two innermost lines of ours; else the innermost of anyone's."""
    ours = [f for f in frames if any(part in f["filename"] for part in _OURS)]
    shown = (ours or list(frames))[:2]
    named = [f"{f['filename'].rpartition('/')[2]}:{f['line']} {f['name']}" for f in shown]
    return " < ".join(named) or "no line of Python (the backward pass)"

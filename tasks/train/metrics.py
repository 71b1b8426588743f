"""What training measures: counts of tokens, time, memory, and the file that keeps them.

`metrics.jsonl` holds one JSON object a line, in order of steps: for a training step `step`,
`epoch`, `loss`, `learning_rate`, `grad_norm`, `tokens_per_second`,
`supervised_tokens_per_second`, `tokens`, `supervised_tokens` (since step 0), `memory_gib`,
`seconds`; for an evaluation `step`, `epoch`, `eval_loss`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_GIB = 2**30


@dataclass
class Totals:
    """Counts since step 0, over all ranks and all resumptions."""

    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    """Time spent on steps; evaluations and checkpoints are not in it."""
    saving_seconds: float = 0.0
    """Time in which training waited for checkpoints to be copied."""

    def to_json(self) -> str:
        """As one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, path: Path) -> Totals:
        """Parse a file of what `to_json` gave."""
        return cls(**json.loads(path.read_text()))


class Meter:
    """Counts this rank's tokens and the time, and brings the ranks' counts together."""

    def __init__(self, totals: Totals) -> None:
        self.totals = totals
        self._tokens = self._supervised = 0
        self._paused = 0.0
        self._begin = time.perf_counter()

    def start(self) -> None:
        """Start the clock: call it when the first step begins."""
        self._begin, self._paused = time.perf_counter(), 0.0

    def add(self, tokens: int, supervised: int) -> None:
        """Count a micro-batch of this rank."""
        self._tokens += tokens
        self._supervised += supervised

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def settle(self, device: torch.device) -> dict[str, float]:
        """Add what came since the last call to the totals; return rates and totals.

        Every rank must call it at the same point.
        """
        now = time.perf_counter()
        seconds = max(now - self._begin - self._paused, 1e-9)
        tokens, supervised = _sum_over_ranks(self._tokens, self._supervised, device)
        self.totals.tokens += tokens
        self.totals.supervised_tokens += supervised
        self.totals.seconds += seconds
        self._tokens = self._supervised = 0
        self._begin, self._paused = now, 0.0
        return {
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "tokens": self.totals.tokens,
            "supervised_tokens": self.totals.supervised_tokens,
            "memory_gib": peak_memory_gib(device),
            "seconds": self.totals.seconds,
        }


def _sum_over_ranks(tokens: int, supervised: int, device: torch.device) -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return tokens, supervised
    counts = torch.tensor([tokens, supervised], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(counts)
    tokens, supervised = counts.tolist()
    return tokens, supervised


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: allocated on the GPU, or resident in this process (2**30 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB  # Linux counts in KiB


class MetricsFile:
    """`metrics.jsonl`: append-only, but cut back to the step training resumes from."""

    def __init__(self, path: Path, kept: Path | None = None) -> None:
        """`kept` is the file as it was at the step resumed from, or None at the start."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kept.read_bytes() if kept else b"")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line; it is on disk when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def thin(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` of the records, evenly spaced, first and last among them."""
    if len(records) <= most:
        return records
    last = len(records) - 1
    return [records[round(index * last / (most - 1))] for index in range(most)]

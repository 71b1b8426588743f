"""What the train stage is given, and a reporter that remembers what it was told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from regrow.tasks.stage import Reporter, Stage, StageJob
from regrow.tasks.train.job import WorkerJob


class Notes:
    """A reporter; `at_step[n]()` is called once at step n."""

    def __init__(self, at_step: Mapping[float, Callable[[], None]] | None = None) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[float, float | None, str]] = []
        self._at_step = dict(at_step or {})

    def progress(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        """See `Reporter.progress`."""
        self.steps.append((done, total, unit))
        self._at_step.pop(done, lambda: None)()

    def log(self, message: str) -> None:
        """See `Reporter.log`."""
        self.lines.append(message)


def stage_job(
    job: WorkerJob, place: Path, report: Reporter | None = None, **placement: Any
) -> StageJob:
    """What the train stage would be given for a worker's job.

    In `place` lie `stage-out`, `stage-scratch`, `logs`, and the `store` that `make_job` uses too.

    Args:
        placement: other values of the job's placement.
    """
    out, scratch = place / "stage-out", place / "stage-scratch"
    out.mkdir()
    scratch.mkdir()
    stage = Stage(
        "train",
        1,
        job.spec,
        "regrow.tasks.train.run:run",
        inputs={"prepare": Stage("prepare", 1, {}, "")},
        placement=dataclasses.replace(job.placement, **placement),
    )
    return StageJob(
        stage,
        {"prepare": job.prepared},
        {},
        out,
        scratch,
        report or Notes(),
        units=None,  # pyright: ignore[reportArgumentType] (training makes none)
        checkpoints=(place / "store").as_uri(),
        logs=place / "logs",
    )

"""What the worker is told: `job.json`, written by the stage (or by hand), read by every rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.tasks.stage import canonical
from regrow.tasks.train.spec import TrainPlacement, TrainSpec


@dataclass(frozen=True)
class CheckpointPlace:
    """Where durable checkpoints are: below `key` in the artifact store at `url`."""

    url: str
    key: str


@dataclass(frozen=True)
class WorkerJob:
    """One training run."""

    spec: TrainSpec
    placement: TrainPlacement
    prepared: Path
    """Directory of the prepared artifact."""
    base_model: Path
    """Local directory of the base model."""
    out: Path
    """Directory for the adapter or the weights; only finished files of the result go there."""
    work: Path
    """Directory of this attempt: metrics.jsonl, result.json, unfinished checkpoints."""
    checkpoints: CheckpointPlace | None = None
    """None: nothing is saved before the end."""
    start_adapter: Path | None = None
    """Local directory of the adapter to go on from, where the spec names one."""
    tracking: Mapping[str, str] | None = None
    """{"uri", "run_id"} of an MLflow run for live metrics, or None."""

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line; see `regrow.tasks.train.metrics`."""
        return self.work / "metrics.jsonl"

    @property
    def result_path(self) -> Path:
        """What the worker found, written last."""
        return self.work / "result.json"

    @property
    def preempted_path(self) -> Path:
        """Why and after which step training stopped before its end, when it did."""
        return self.work / "preempted.json"

    def write(self, path: Path) -> None:
        """Store as JSON, paths as text."""
        path.write_text(json.dumps(self.to_json(), indent=1, sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data, paths as text."""
        return {
            "spec": canonical(self.spec),
            "placement": canonical(self.placement),
            "prepared": str(self.prepared),
            "base_model": str(self.base_model),
            "out": str(self.out),
            "work": str(self.work),
            "checkpoints": canonical(self.checkpoints),
            "start_adapter": str(self.start_adapter) if self.start_adapter else None,
            "tracking": dict(self.tracking) if self.tracking else None,
        }

    @classmethod
    def read(cls, path: Path) -> WorkerJob:
        """Parse what `write` wrote."""
        return cls.from_json(json.loads(path.read_text()))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WorkerJob:
        """The inverse of `to_json`."""
        place = data.get("checkpoints")
        return cls(
            spec=TrainSpec.from_json(data["spec"]),
            placement=TrainPlacement.from_json(data["placement"]),
            prepared=Path(data["prepared"]),
            base_model=Path(data["base_model"]),
            out=Path(data["out"]),
            work=Path(data["work"]),
            checkpoints=CheckpointPlace(**place) if place else None,
            start_adapter=Path(data["start_adapter"]) if data.get("start_adapter") else None,
            tracking=data.get("tracking"),
        )

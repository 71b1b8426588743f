"""What a stage is: a name, a version, a spec and inputs, and the key that follows from them.

A key is the sha256 of canonical JSON {stage, version, spec, input keys}. It is the same on every
machine, so a key found in a store is the work already done. What cannot be written as canonical
JSON (a float that is not finite, an object, a set) cannot be part of an identity and raises.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from regrow.infra.device_files import Devices
from regrow.infra.imports import uncollected


def canonical(value: Any) -> Any:
    """`value` as plain JSON data: dataclasses and enums opened, tuples as lists.

    Raises:
        TypeError: for a type that has no canonical form.
        ValueError: for a float that is NaN or infinite.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return canonical(value.value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"a key of a canonical mapping must be a string, not {name!r}")
        return {name: canonical(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no canonical JSON form")
        # 1.0 and 1 mean the same in a recipe and must give the same key.
        return int(value) if value.is_integer() else value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a key: {value!r}")


def canonical_json(value: Any) -> str:
    """`value` as JSON text with sorted names and no white space: equal values, equal bytes."""
    return json.dumps(
        canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def fingerprint(value: Any) -> str:
    """sha256 (64 hex digits) of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Stage:
    """One step of a plan.

    `spec` decides the result and enters the key; `placement` decides only where and how fast and
    never does. `runner` names the function that does the work as "module:function" and is imported
    only when the stage really runs, so that a plan is made without torch.
    """

    name: str
    version: int
    spec: Any
    runner: str
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    placement: Any = None
    label: str = ""
    """What people see; differs from `name` where a plan holds two stages of one kind."""

    @cached_property
    def key(self) -> str:
        """The stage's identity, 64 hex digits."""
        return fingerprint(
            {
                "stage": self.name,
                "version": self.version,
                "spec": self.spec,
                "inputs": {name: stage.key for name, stage in self.inputs.items()},
            }
        )

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name

    def function(self) -> Callable[[StageJob], dict[str, Any]]:
        """The runner, imported now."""
        module, _, name = self.runner.partition(":")
        with uncollected():  # merge's imports take 4.9 s of a processor instead of 6.8
            return getattr(importlib.import_module(module), name)


class Reporter(Protocol):
    """Where a running stage tells how far it is. All calls are cheap and never raise."""

    def progress(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        """`done` of `total` `unit`s ("rows", "steps"); rates and time left are derived."""
        ...

    def log(self, message: str) -> None:
        """One line for people."""
        ...


class UnitCache(Protocol):
    """Artifacts smaller than a stage: built once, found again by key, as whole stages are."""

    def get_or_build(
        self, name: str, version: int, spec: Any, build: Callable[[Path], dict[str, Any]]
    ) -> tuple[Path, dict[str, Any], bool]:
        """(local directory, result, built now?) of the unit {name, version, spec}.

        `build(out)` fills the empty directory `out` and returns a JSON result.
        """
        ...


@dataclass(frozen=True)
class StageJob:
    """All that a stage's function gets: it reads nothing else (no environment, no clock)."""

    stage: Stage
    inputs: Mapping[str, Path]
    """Local, verified directory of each input artifact, brought here when first asked for."""
    input_results: Mapping[str, Mapping[str, Any]]
    """What each input stage returned (`record.result`)."""
    out: Path
    """Empty directory; what is in it when the function returns is the artifact."""
    scratch: Path
    """A directory for this attempt, removed afterwards."""
    report: Reporter
    units: UnitCache
    checkpoints: str | None = None
    """Root URL under which a training stage keeps durable checkpoints."""
    logs: Path | None = None
    """A directory for what should outlive the attempt, a failed one above all; None: none."""
    tracking: Mapping[str, str] | None = None
    """For live metrics: {"uri": MLflow tracking URI, "run_id": ...}; None when not tracked."""
    fetch: Callable[[str, Sequence[str]], Path] | None = None
    """See `part`; None: all of an input is brought."""
    devices: Devices | None = None
    """GPUs that are this stage's alone; None: all that there are, or none."""

    def part(self, name: str, *patterns: str) -> Path:
        """An input's directory in which the files of these patterns are there and verified; the
        others may not have been brought here.
        """
        return self.inputs[name] if self.fetch is None else self.fetch(name, patterns)

    @property
    def spec(self) -> Any:
        """The stage's typed spec."""
        return self.stage.spec

    @property
    def placement(self) -> Any:
        """The stage's typed placement."""
        return self.stage.placement


class StageError(ValueError):
    """A stage cannot be done for a reason the user can mend; the message says what to do."""

"""What a store holds, and what of it no pinned artifact needs any more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from regrow.infra.artifacts import ArtifactDamaged, ArtifactStore, Record
from regrow.infra.listing import Entry
from regrow.infra.store import StoreError

UNITS = "units"
"""What a lease's holder needs that uses units, whichever."""

_FAMILIES = ("stages", UNITS, "checkpoints")
"""Folders of a store below which artifacts lie; checkpoints one level deeper."""

UNFINISHED_AGE = timedelta(days=14)
"""How long checkpoints stay whose training is not finished: days of many GPUs' work may lie in
them, and between an interruption and its resumption a queue, a weekend or a holiday."""

_NEVER = datetime.min.replace(tzinfo=UTC)

Inputs = Callable[[str], Collection[str]]
"""The keys that an artifact was made from; none where it is not there."""


@dataclass(frozen=True)
class Holding:
    """One artifact, complete or not, as it lies in the store; or a leftover beside it."""

    key: str
    record: Record | None
    """None: unfinished, or damaged."""
    files: dict[str, Entry]
    """What lies there, leftovers of killed builders included, by name below the key."""
    damage: str = ""
    attempt: str = ""
    """Not the artifact, which is complete, but this attempt of a killed builder beside it."""
    resumable: bool = False
    """A whole checkpoint of a training that is not finished: it goes on from there."""

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(entry.size for entry in self.files.values())

    @property
    def changed(self) -> datetime:
        """When something of it was last written."""
        return max((entry.changed for entry in self.files.values()), default=_NEVER)

    @property
    def stage(self) -> str:
        """The key of the stage whose lease rules over it; "" for a unit, which has none."""
        family, _, rest = self.key.partition("/")
        return "" if family == UNITS else f"stages/{rest.partition('/')[0]}"

    @property
    def leftovers(self) -> list[Holding]:
        """The attempts of killed builders beside a complete artifact, or builders still at work."""
        if self.record is None or self.attempt:
            return []
        names = {name.partition("/")[0] for name in self.files}
        others = sorted(n for n in names if n.startswith("attempt-") and n != self.record.attempt)
        return [self._only(attempt) for attempt in others]

    def _only(self, attempt: str) -> Holding:
        files = {n: entry for n, entry in self.files.items() if n.startswith(f"{attempt}/")}
        return Holding(self.key, None, files, "left by a killed builder", attempt)


def holdings(artifacts: ArtifactStore, families: Iterable[str] = _FAMILIES) -> Iterator[Holding]:
    """All artifacts of some families, by key."""
    for family in families:
        for key in artifacts.children(family):
            inner = artifacts.children(key) if family == "checkpoints" else [key]
            for each in inner:
                yield holding(artifacts, each)


def holding(artifacts: ArtifactStore, key: str) -> Holding:
    """What lies below one key now."""
    files = artifacts.store.entries(key)
    try:
        found = Holding(key, artifacts.lookup(key), files)
    except ArtifactDamaged as damage:
        return Holding(key, None, files, f"{damage.file}: {damage.why}")
    resumable = found.stage not in ("", key) and found.record is not None
    return replace(found, resumable=resumable and not _is_built(artifacts, found.stage))


def _is_built(artifacts: ArtifactStore, stage: str) -> bool:
    try:
        return artifacts.lookup(stage) is not None
    except ArtifactDamaged:
        return False


def inputs_in(artifacts: ArtifactStore) -> Inputs:
    """Gives the inputs of artifacts; a record is read once, since its key decides its inputs."""
    known: dict[str, list[str]] = {}

    def inputs(key: str) -> list[str]:
        if key not in known:
            record = _readable(artifacts, key)
            if record is None:
                return []
            folder = key.rpartition("/")[0]
            known[key] = [f"{folder}/{name}" for name in record.inputs.values()]
        return known[key]

    return inputs


def _readable(artifacts: ArtifactStore, key: str) -> Record | None:
    try:
        return artifacts.lookup(key)
    except ArtifactDamaged as damage:
        raise StoreError(
            f"{key} must stay, but its record cannot be read ({damage.why}), so what it was "
            "made from is not known. Build it again or unpin it first"
        ) from damage


def reached(inputs: Inputs, keys: Iterable[str]) -> set[str]:
    """The keys themselves and those of all artifacts that they were made from."""
    found: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting += inputs(key)
    return found


def stays(found: Holding, kept: Collection[str], busy: Collection[str], before: datetime) -> bool:
    """Whether a holding must stay.

    Args:
        kept: what pins and builders reach.
        busy: what is being built or read now (`UNITS`: units are).
        before: what was made, or last written, after this stays; of what is `resumable`, also what
            is younger than `UNFINISHED_AGE`.
    """
    if (found.stage or UNITS) in busy:
        return True
    if not found.attempt and found.stage in kept:
        return True
    made = datetime.fromisoformat(found.record.created) if found.record else found.changed
    if found.resumable:
        before = min(before, datetime.now(UTC) - UNFINISHED_AGE)
    return made > before

"""What a store holds, what of it is pinned, and what no pinned artifact needs any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from regrow.infra.artifacts import ArtifactDamaged, ArtifactStore, Record
from regrow.infra.store import StoreError

_FAMILIES = ("stages", "units", "checkpoints")
"""Folders of a store below which artifacts lie; checkpoints one level deeper."""


@dataclass(frozen=True)
class Holding:
    """One artifact, complete or not, as it lies in the store."""

    key: str
    record: Record | None
    """None: unfinished, or damaged."""
    size: int
    """Bytes that it takes, leftovers of killed builders included."""
    damage: str = ""


def holdings(artifacts: ArtifactStore, families: Sequence[str] = _FAMILIES) -> Iterator[Holding]:
    """All artifacts of some families, by key."""
    for family in families:
        for key in artifacts.children(family):
            inner = artifacts.children(key) if family == "checkpoints" else [key]
            for each in inner:
                yield _holding(artifacts, each)


def _holding(artifacts: ArtifactStore, key: str) -> Holding:
    size = sum(artifacts.store.sizes(key).values())
    try:
        return Holding(key, artifacts.lookup(key), size)
    except ArtifactDamaged as damage:
        return Holding(key, None, size, f"{damage.file}: {damage.why}")


def reached(artifacts: ArtifactStore, keys: Sequence[str]) -> set[str]:
    """The keys themselves and those of all artifacts that they were made from."""
    found: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key in found:
            continue
        found.add(key)
        try:
            record = artifacts.lookup(key)
        except ArtifactDamaged as damage:
            raise StoreError(
                f"{key} must stay, but its record cannot be read ({damage.why}), so what it was "
                "made from is not known. Build it again or unpin it first"
            ) from damage
        folder = key.rpartition("/")[0]
        waiting += [f"{folder}/{name}" for name in (record.inputs.values() if record else ())]
    return found


def unneeded(
    artifacts: ArtifactStore,
    pinned: Mapping[str, str],
    busy: Sequence[str],
    min_age: timedelta,
    now: datetime | None = None,
) -> list[Holding]:
    """What may go: reached from no pin, older than `min_age`, and not being built.

    Args:
        pinned: {name: key}, see `pins.pinned`.
        busy: keys that are leased now; they and what they are made from stay.
        min_age: younger artifacts stay, since a run may be about to use them.
    """
    kept = reached(artifacts, [*pinned.values(), *busy])
    before = (now or datetime.now(UTC)) - min_age
    return [h for h in holdings(artifacts) if not _stays(h, kept, before)]


def _stays(holding: Holding, kept: set[str], before: datetime) -> bool:
    family, _, rest = holding.key.partition("/")
    stage = f"stages/{rest.partition('/')[0]}" if family == "checkpoints" else holding.key
    if stage in kept:
        return True
    if holding.record is None:
        # Unfinished, so somebody may be at it: a stage's lease says who is, a unit has none.
        return family != "stages" and not holding.damage
    return datetime.fromisoformat(holding.record.created) > before

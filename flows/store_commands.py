"""`regrow store ls | verify | gc | pin | unpin`: what the artifact store holds and may lose."""

from __future__ import annotations

import argparse
import re
from datetime import timedelta

from regrow.flows import show
from regrow.flows.explained import explains
from regrow.flows.progress import say
from regrow.flows.workplace import Workplace
from regrow.infra.artifacts import ArtifactDamaged, ArtifactStore
from regrow.infra.collection import Collection
from regrow.infra.housekeeping import (
    UNFINISHED_AGE,
    Holding,
    holding,
    holdings,
    inputs_in,
    reached,
)
from regrow.infra.pins import pin, pinned, unpin
from regrow.infra.settings import load_settings
from regrow.infra.store import StoreError
from regrow.tasks.headline import headline_of
from regrow.tasks.stage import StageError

_SHORT = 12  # characters of a key in tables
_HEAD = ["artifact", "stage", "made (UTC)", "size", "pin", "what"]


@explains
def store_command(args: argparse.Namespace) -> int:
    """Run one action; 1 when `verify` found damage."""
    place = Workplace(load_settings(), args.store)
    actions = {"ls": _ls, "verify": _verify, "gc": _gc, "pin": _pin, "unpin": _unpin}
    return actions[args.action](args, place)


def _ls(args: argparse.Namespace, place: Workplace) -> int:
    pins = {key: name for name, key in pinned(place.artifacts.store).items()}
    families = ("stages", "units", "checkpoints") if args.all else ("stages",)
    found = list(holdings(place.artifacts, families))
    rows = [_row(each, pins.get(each.key, "")) for each in found]
    say(f"store    {place.store_url}\n")
    say(show.table([_HEAD, *rows]))
    say(f"\n{len(found)} artifacts, {_size(sum(h.size for h in found))}")
    return 0


def _row(found: Holding, pin: str) -> list[str]:
    record = found.record
    if record is None:
        why = found.damage or "unfinished"
        return [_short(found.key), "", "", _size(found.size), pin, why]
    made = record.created[:16].replace("T", " ")
    what = headline_of(record)
    if found.resumable:
        what += f" (of an unfinished training; gc keeps it for {UNFINISHED_AGE.days} days)"
    return [_short(found.key), record.stage, made, _size(found.size), pin, what]


def _verify(args: argparse.Namespace, place: Workplace) -> int:
    damaged = checked = 0
    for found in holdings(place.artifacts):
        why = _damage(place, found)
        checked += found.record is not None
        if why:
            damaged += 1
            say(f"damaged  {found.key}  {why}")
    say(f"{checked} artifacts read in {place.store_url}; {damaged} damaged")
    if damaged:
        say("A run that needs one of them builds it again by itself.")
    return 1 if damaged else 0


def _damage(place: Workplace, found: Holding) -> str:
    """What is wrong with it; "" also where it was removed or replaced while it was read."""
    why = found.damage
    if found.record is not None:
        try:
            place.artifacts.verify(found.record)
        except ArtifactDamaged as damage:
            why = f"{damage.file}: {damage.why}"
        except FileNotFoundError as error:
            why = f"{error.filename}: the file is missing"
    if not why:
        return ""
    now = holding(place.artifacts, found.key)
    if now.record is None or found.record is None:
        return now.damage
    return why if now.record.attempt == found.record.attempt else ""


def _gc(args: argparse.Namespace, place: Workplace) -> int:
    pins = pinned(place.artifacts.store)
    age, seconds = timedelta(hours=args.min_age), place.settings.lease_seconds
    collection = Collection(place.artifacts, age, seconds)
    found = collection.unneeded()
    kept = len(reached(inputs_in(place.artifacts), pins.values()))
    if not pins:
        say("Nothing is pinned: see `regrow store pin`.")
    say(show.table([_HEAD, *(_row(each, "") for each in found)]))
    total = _size(sum(h.size for h in found))
    if not args.delete:
        say(f"\n{len(found)} artifacts, {total}, could go; {kept} are reached from pins.")
        if left := len(collection.killed_runs()):
            say(f"{left} leases of killed runs could go too.")
        say("Nothing was removed. `regrow store gc --delete` removes them.")
        return 0
    removed = [each for each in found if collection.remove(each)]
    say(f"\nremoved {len(removed)} artifacts, {_size(sum(h.size for h in removed))}")
    left = collection.killed_runs()
    for key in left:
        collection.forget(key)
    if left:
        say(f"removed {len(left)} leases of killed runs")
    if len(removed) < len(found):
        say(f"{len(found) - len(removed)} stay: somebody has begun to use them meanwhile.")
    return 0


def _pin(args: argparse.Namespace, place: Workplace) -> int:
    record = place.one_record(args.artifact)
    name = args.name or _short(record.key)
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise StageError(f"--name: {name!r} cannot be a file's name; use letters, digits, - and _")
    count = _pinned_now(place.artifacts, name, record.key)
    say(f"pinned {_short(record.key)} as {name}: it and the {count - 1} artifacts below it stay")
    return 0


def _pinned_now(artifacts: ArtifactStore, name: str, key: str) -> int:
    """Pin an artifact; how many stay. First the pin and then the look: a `gc` at the same time
    either has removed something by then, or it sees the pin.

    Raises:
        StageError: when something of it is gone; the name then means what it meant before.
    """
    before = pinned(artifacts.store).get(name)
    pin(artifacts.store, name, key)
    try:
        keys = reached(inputs_in(artifacts), [key])
        gone = sorted(each for each in keys if artifacts.lookup(each) is None)
        if gone:
            raise StageError(
                f"{_short(key)} cannot be pinned: {', '.join(map(_short, gone))} is not in the "
                "store, removed by `regrow store gc` perhaps; run the recipe again, then pin"
            )
    except (StageError, StoreError, ArtifactDamaged):
        if before is None:
            unpin(artifacts.store, name)
        else:
            pin(artifacts.store, name, before)
        raise
    return len(keys)


def _unpin(args: argparse.Namespace, place: Workplace) -> int:
    if not unpin(place.artifacts.store, args.name):
        raise StageError(f"nothing is pinned as {args.name!r}; see `regrow store ls`")
    say(f"{args.name} is no longer pinned")
    return 0


def _short(key: str) -> str:
    family, _, rest = key.partition("/")
    return rest[:_SHORT] if family == "stages" else f"{family}/{rest[:_SHORT]}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"

"""`regrow store ls | verify | gc | pin | unpin`: what the artifact store holds and may lose."""

from __future__ import annotations

import argparse
from datetime import timedelta

from regrow.flows import show
from regrow.flows.commands import explains
from regrow.flows.progress import say
from regrow.flows.workplace import Workplace
from regrow.infra.artifacts import ArtifactDamaged
from regrow.infra.collection import Collection
from regrow.infra.housekeeping import Holding, holdings, inputs_in, reached
from regrow.infra.pins import pin, pinned, unpin
from regrow.infra.settings import load_settings
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
    rows = [_row(holding, pins.get(holding.key, "")) for holding in found]
    say(f"store    {place.store_url}\n")
    say(show.table([_HEAD, *rows]))
    say(f"\n{len(found)} artifacts, {_size(sum(h.size for h in found))}")
    return 0


def _row(holding: Holding, pin: str) -> list[str]:
    record = holding.record
    if record is None:
        why = holding.damage or "unfinished"
        return [_short(holding.key), "", "", _size(holding.size), pin, why]
    made = record.created[:16].replace("T", " ")
    what = headline_of(record)
    return [_short(holding.key), record.stage, made, _size(holding.size), pin, what]


def _verify(args: argparse.Namespace, place: Workplace) -> int:
    damaged = checked = 0
    for holding in holdings(place.artifacts):
        why = holding.damage
        if holding.record is not None:
            try:
                place.artifacts.verify(holding.record)
            except ArtifactDamaged as damage:
                why = f"{damage.file}: {damage.why}"
            checked += 1
        if why:
            damaged += 1
            say(f"damaged  {holding.key}  {why}")
    say(f"{checked} artifacts read in {place.store_url}; {damaged} damaged")
    if damaged:
        say("A run that needs one of them builds it again by itself.")
    return 1 if damaged else 0


def _gc(args: argparse.Namespace, place: Workplace) -> int:
    pins = pinned(place.artifacts.store)
    age, seconds = timedelta(hours=args.min_age), place.settings.lease_seconds
    collection = Collection(place.artifacts, age, seconds)
    found = collection.unneeded()
    kept = len(reached(inputs_in(place.artifacts), pins.values()))
    if not pins:
        say("Nothing is pinned: see `regrow store pin`.")
    say(show.table([_HEAD, *(_row(holding, "") for holding in found)]))
    total = _size(sum(h.size for h in found))
    if not args.delete:
        say(f"\n{len(found)} artifacts, {total}, could go; {kept} are reached from pins.")
        say("Nothing was removed. `regrow store gc --delete` removes them.")
        return 0
    removed = [holding for holding in found if collection.remove(holding)]
    say(f"\nremoved {len(removed)} artifacts, {_size(sum(h.size for h in removed))}")
    if len(removed) < len(found):
        say(f"{len(found) - len(removed)} stay: somebody has begun to use them meanwhile.")
    return 0


def _pin(args: argparse.Namespace, place: Workplace) -> int:
    record = place.one_record(args.artifact)
    name = args.name or _short(record.key)
    if "/" in name or not name.strip():
        raise StageError(f"--name: {name!r} cannot be a file's name; use letters, digits, - and _")
    pin(place.artifacts.store, name, record.key)
    count = len(reached(inputs_in(place.artifacts), [record.key]))
    say(f"pinned {_short(record.key)} as {name}: it and the {count - 1} artifacts below it stay")
    return 0


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

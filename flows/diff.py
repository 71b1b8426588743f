"""`regrow diff A B`: in which fields, data, or versions two artifacts' histories differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from regrow.flows.explained import explains
from regrow.flows.progress import say
from regrow.flows.show import differences
from regrow.flows.workplace import Workplace
from regrow.infra.artifacts import Record
from regrow.infra.settings import load_settings
from regrow.tasks import lineage
from regrow.tasks.headline import headline_of


@explains
def show_diff(one: str, other: str, store: str | None = None) -> int:
    """Print what differs, stage by stage; 0 whether or not anything does."""
    place = Workplace(load_settings(), store)
    first, second = (_history(place, key) for key in (one, other))
    lines = list(_lines(first, second))
    say("\n".join(lines) if lines else "nothing differs: they are one artifact")
    return 0


def _history(place: Workplace, key: str) -> dict[str, Record]:
    """{stage title: record} of an artifact and all that it was made from."""
    nodes = lineage.graph(place.one_record(key), place.artifacts.lookup)
    return {node.title: node.record for node in nodes if node.record is not None}


def _lines(first: Mapping[str, Record], second: Mapping[str, Record]) -> Iterator[str]:
    for title in dict.fromkeys([*first, *second]):
        a, b = first.get(title), second.get(title)
        if a is None or b is None:
            yield f"{title}: only the {'second' if a is None else 'first'} has it"
        elif a.key != b.key:
            yield from _stage(title, a, b)


def _stage(title: str, a: Record, b: Record) -> Iterator[str]:
    yield f"{title}  {_short(a)} -> {_short(b)}"
    found = differences(a.spec, b.spec)
    yield from (f"  {line}" for line in found)
    changed = [
        name for name in {**a.inputs, **b.inputs} if a.inputs.get(name) != b.inputs.get(name)
    ]
    if changed:
        yield f"  made from another {', another '.join(changed)}"
    if not found and not changed:
        yield "  the stage's own version"
    yield from (f"  {line}" for line in _versions(a.provenance, b.provenance))
    results = [headline_of(a), headline_of(b)]
    if results[0] != results[1]:
        yield f"  result: {results[0]} -> {results[1]}"


def _versions(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Differences between machines and packages; they decide no key but may explain a figure."""
    names = ("packages", "gpus", "platform", "python")
    return differences({n: a.get(n) for n in names}, {n: b.get(n) for n in names})


def _short(record: Record) -> str:
    return record.key.rpartition("/")[2][:12]

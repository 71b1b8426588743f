"""Where an artifact comes from: records followed back to the sources, as text or as a page."""

from __future__ import annotations

import html as markup
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from regrow.infra.artifacts import Record
from regrow.infra.secrets import mask_secrets
from regrow.tasks.headline import headline_of
from regrow.tasks.lineage_drawing import Box, svg

Lookup = Callable[[str], Record | None]
"""The record of a key, or None."""

_KEY_CHARACTERS = 12  # of a key or digest, as everywhere else in what people read


@dataclass(frozen=True)
class Node:
    """An artifact, or something from outside that artifacts were made of."""

    id: str
    title: str
    """The stage, or what kind of source it is."""
    key: str
    """Key or digest, in full; "" where none is known."""
    note: str
    """The stage's main figure, or the source's name."""
    inputs: tuple[str, ...] = ()
    """Ids of what it was made from."""
    record: Record | None = None
    place: str = ""
    """Where a source was read from, without passwords."""

    @property
    def short_key(self) -> str:
        """Enough of the key to find it by."""
        return self.key[:_KEY_CHARACTERS]


def graph(record: Record, lookup: Lookup) -> list[Node]:
    """The record's node last, each node after those that it was made from.

    An input whose record is gone is a node of its own that says so.
    """
    nodes: dict[str, Node] = {}
    _visit(record, record.stage, lookup, nodes)
    return _with_distinct_titles(list(nodes.values()))


def _visit(record: Record, role: str, lookup: Lookup, nodes: dict[str, Node]) -> None:
    inputs = []
    for name, key in record.inputs.items():
        full = _beside(record.key, key)
        if full not in nodes:
            found = lookup(full)
            if found is None:
                nodes[full] = Node(full, name, key, "its record is gone")
            else:
                _visit(found, name, lookup, nodes)
        inputs.append(full)
    for source in outside(record.spec, record.provenance.get("placement")):
        nodes.setdefault(source.id, source)
        inputs.append(source.id)
    key = record.key.rpartition("/")[2]
    title = f"{record.stage}/{role}"
    nodes[record.key] = Node(record.key, title, key, headline_of(record), tuple(inputs), record)


def _beside(place: str, key: str) -> str:
    """Where an input's record is: beside the record that names it."""
    folder = place.rpartition("/")[0]
    return f"{folder}/{key}" if folder and "/" not in key else key


def _with_distinct_titles(nodes: list[Node]) -> list[Node]:
    """Titles are stages; where a stage comes twice, the input that it was to others is added."""
    stages = [node.title.partition("/")[0] for node in nodes]
    named = []
    for node, stage in zip(nodes, stages, strict=True):
        role = node.title.partition("/")[2]
        twice = node.record is not None and stages.count(stage) > 1 and role != stage
        named.append(replace(node, title=f"{stage} ({role})" if twice else stage))
    return named


def outside(spec: Any, placement: Any) -> Iterator[Node]:
    """What a stage read that no stage made: source files, tokenizer, base model.

    Args:
        spec, placement: as a record holds them, plain data.
    """
    spec = spec if isinstance(spec, Mapping) else {}
    placement = placement if isinstance(placement, Mapping) else {}
    places = placement.get("locations") or {}
    files = (spec.get("datasets"), spec.get("test_datasets"))
    for digest in dict.fromkeys(_file_digests(files)):
        yield _source("data", digest, places.get(digest, ""))
    if spec.get("tokenizer"):
        yield _source("tokenizer", spec["tokenizer"], placement.get("tokenizer_path"))
    weights = spec.get("base_model_digest") or spec.get("model_digest")
    if weights:
        yield _source("base model", weights, placement.get("base_model"))


def _file_digests(value: Any) -> Iterator[str]:
    """The sha256 of every file that is named anywhere below: a dataset has parts with files."""
    if isinstance(value, Mapping):
        if isinstance(value.get("sha256"), str):
            yield value["sha256"]
        for item in value.values():
            yield from _file_digests(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _file_digests(item)


def _source(kind: str, digest: str, place: str | None) -> Node:
    place = mask_secrets(place) if place else ""
    name = PurePosixPath(place).name
    return Node(f"{kind}:{digest}", kind, digest, name, place=place)


def tree(record: Record, lookup: Lookup) -> str:
    """The lineage as an indented text; what was shown once is only named the next time."""
    nodes = {node.id: node for node in graph(record, lookup)}
    return "\n".join(_branch(nodes[record.key], nodes, "", "", set()))


def _branch(
    node: Node, nodes: Mapping[str, Node], head: str, indent: str, shown: set[str]
) -> Iterator[str]:
    seen = node.id in shown and bool(node.inputs)
    shown.add(node.id)
    words = [node.title, node.short_key, "(as above)" if seen else node.note]
    yield head + "  ".join(word for word in words if word)
    if seen:
        return
    for i, source in enumerate(node.inputs):
        last = i == len(node.inputs) - 1
        inner_head = indent + ("└─ " if last else "├─ ")
        inner_indent = indent + ("   " if last else "│  ")
        yield from _branch(nodes[source], nodes, inner_head, inner_indent, shown)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 24px; color: #1d2733; background: #fff }}
h1 {{ font-size: 20px }} code {{ font-size: 12px }}
.graph {{ overflow-x: auto }} .graph svg {{ width: 100%; min-width: 1000px; height: auto }}
table {{ border-collapse: collapse; margin-top: 16px }}
th, td {{ text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid #dde3ea;
  vertical-align: top }}
pre {{ white-space: pre-wrap; max-width: 60em; font-size: 12px }}
</style></head><body><h1>{title}</h1>
<p>From the sources on the left to the result on the right. A key is the sha256 of all that decided
an artifact: equal keys, equal results.</p>
<div class="graph">{svg}</div>
<table><tr><th>what</th><th>key or digest</th><th>result</th><th>size</th><th>made (UTC)</th>
<th></th></tr>
{rows}</table></body></html>
"""


def drawing(record: Record, lookup: Lookup) -> str:
    """The lineage as an `<svg>` element, which loads nothing."""
    return mask_secrets(svg(boxes(record, lookup)))


def boxes(record: Record, lookup: Lookup) -> list[Box]:
    """The lineage as boxes to draw."""
    return [_box(node) for node in graph(record, lookup)]


def html(record: Record, lookup: Lookup) -> str:
    """The lineage as one page with a drawn graph; it loads nothing and runs no script."""
    nodes = graph(record, lookup)
    page = _PAGE.format(
        title=markup.escape(f"Lineage of {nodes[-1].title} {nodes[-1].short_key}"),
        svg=svg([_box(node) for node in nodes]),
        rows="\n".join(_row(node) for node in nodes),
    )
    return mask_secrets(page)


def _box(node: Node) -> Box:
    lines = (node.title, node.short_key, node.note)
    hint = f"{node.title} {node.key} {node.note}"
    return Box(node.id, lines, hint, node.inputs, outside=node.record is None)


def _row(node: Node) -> str:
    cells = [node.title, node.short_key, node.note, "", "", ""]
    if node.record is not None:
        host = node.record.provenance.get("host", "")
        cells[3] = f"{node.record.size / 1e6:,.1f} MB"
        cells[4] = node.record.created[:16].replace("T", " ") + (f" on {host}" if host else "")
    title, key, *rest = [markup.escape(cell) for cell in cells]
    if node.record is not None:
        whole = {"key": node.key, "inputs": dict(node.record.inputs), "spec": node.record.spec}
        text = json.dumps(whole, indent=1, ensure_ascii=False)
        rest[-1] = f"<details><summary>spec</summary><pre>{markup.escape(text)}</pre></details>"
    tail = "".join(f"<td>{cell}</td>" for cell in rest)
    return f'<tr><td>{title}</td><td><code title="{node.key}">{key}</code></td>{tail}</tr>'

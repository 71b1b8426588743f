"""Draws a lineage as SVG: sources on the left, each stage to the right of what it was made from.

A line that passes a column goes through a lane of its own there, so that no box hides it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LANE = 210, 64, 8  # of a box, and the height of a lane, in pixels
_GAP_X, _GAP_Y, _MARGIN = 60, 20, 8
_NOTE_CHARACTERS = 34  # of 11 px text in a box of that width

BOX = (_WIDTH, _HEIGHT)

Place = tuple[str, int]
"""A box's id, or that of the box a passing line comes from, and a column."""


@dataclass(frozen=True)
class Box:
    """One box of the drawing."""

    id: str
    lines: tuple[str, str, str]
    """Title, key, note."""
    hint: str
    """Shown when the pointer rests on the box."""
    inputs: tuple[str, ...]
    """Ids of boxes, which come earlier in the list."""
    outside: bool
    """Drawn as something that no stage made."""


@dataclass(frozen=True)
class Layout:
    """Where everything is, in pixels from the upper left corner."""

    width: int
    height: int
    corners: Mapping[str, tuple[int, int]]
    """Upper left corner of each box; all are `BOX` wide and high."""
    lines: Sequence[str]
    """Path data, as SVG has it, with absolute M, C and H only."""


def layout(boxes: Sequence[Box]) -> Layout:
    """Place boxes and lines."""
    columns = _columns(boxes)
    paths = [
        [(source, c) for c in range(columns[source], columns[box.id])] + [(box.id, columns[box.id])]
        for box in boxes
        for source in box.inputs
    ]
    corners = _corners([(box.id, columns[box.id]) for box in boxes], paths)
    right = max(x for x, _ in corners.values()) + _WIDTH + _MARGIN
    bottom = max(y for _, y in corners.values()) + _HEIGHT + _MARGIN
    lines = [_line(path, corners) for path in paths]
    places = {box.id: corners[(box.id, columns[box.id])] for box in boxes}
    return Layout(right, bottom, places, lines)


def svg(boxes: Sequence[Box]) -> str:
    """The drawing as an `<svg>` element; it loads nothing."""
    plan = layout(boxes)
    lines = "".join(
        f'<path d="{line}" fill="none" stroke="#9aa7b5" stroke-width="1.5"/>' for line in plan.lines
    )
    shapes = "".join(_box(box, *plan.corners[box.id]) for box in boxes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{plan.width}" height="{plan.height}" '
        f'style="max-width: {plan.width}px" '
        f'viewBox="0 0 {plan.width} {plan.height}" font-family="system-ui, sans-serif" role="img">'
        f"{lines}{shapes}</svg>"
    )


def _columns(boxes: Sequence[Box]) -> dict[str, int]:
    """A column for each box, to the right of its inputs'.

    A source stands right before the first stage that reads it, which keeps lines short.
    """
    columns: dict[str, int] = {}
    for box in boxes:
        columns[box.id] = 1 + max((columns[source] for source in box.inputs), default=-1)
    for box in boxes:
        if not box.inputs:
            readers = [columns[other.id] for other in boxes if box.id in other.inputs]
            columns[box.id] = max(min(readers, default=1) - 1, 0)
    return columns


def _corners(
    places: Sequence[Place], paths: Sequence[Sequence[Place]]
) -> dict[Place, tuple[int, int]]:
    """Upper left corner of each box and lane; a column has the order of what leads to it."""
    held = dict.fromkeys([*places, *itertools.chain.from_iterable(paths)])
    before: dict[Place, list[Place]] = {place: [] for place in held}
    for path in paths:
        for left, right in itertools.pairwise(path):
            before[right].append(left)
    corners: dict[Place, tuple[int, int]] = {}
    middle: dict[Place, float] = {}
    for column in range(max(column for _, column in held) + 1):
        ids = [place for place in held if place[1] == column]
        ids.sort(key=lambda place: _mean([middle[left] for left in before[place]]))
        y = _MARGIN
        for place in ids:
            height = _HEIGHT if place in places else _LANE
            corners[place] = (_MARGIN + column * (_WIDTH + _GAP_X), y)
            middle[place] = y + height / 2
            y += height + _GAP_Y
    return corners


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _line(path: Sequence[Place], corners: Mapping[Place, tuple[int, int]]) -> str:
    """From the right side of the first box to the left side of the last, through the lanes."""
    x, y = corners[path[0]]
    x, y = x + _WIDTH, y + _HEIGHT // 2
    drawn = [f"M{x} {y}"]
    for place in path[1:]:
        left, top = corners[place]
        last = place == path[-1]
        centre = top + (_HEIGHT if last else _LANE) // 2
        bend = (left - x) // 2
        drawn.append(f"C{x + bend} {y} {left - bend} {centre} {left} {centre}")
        if not last:
            drawn.append(f"H{left + _WIDTH}")
        x, y = left + _WIDTH, centre
    return " ".join(drawn)


def colors(box: Box) -> tuple[str, str]:
    """Fill and border."""
    return ("#f4f1ea", "#8a7a55") if box.outside else ("#e8f1fa", "#0072b2")


def texts(box: Box) -> tuple[str, str, str]:
    """Title, key and note as they fit into the box."""
    title, key, note = box.lines
    if len(note) > _NOTE_CHARACTERS:
        note = note[: _NOTE_CHARACTERS - 1] + "…"
    return title, key, note


def _box(box: Box, x: int, y: int) -> str:
    fill, border = colors(box)
    title, key, note = texts(box)
    return (
        f"<g><title>{escape(box.hint)}</title>"
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{fill}" '
        f'stroke="{border}"/>'
        f'<text x="{x + 10}" y="{y + 20}" font-size="13" font-weight="600">{escape(title)}</text>'
        f'<text x="{x + 10}" y="{y + 37}" font-size="11" font-family="monospace" '
        f'fill="#5f6b76">{escape(key)}</text>'
        f'<text x="{x + 10}" y="{y + 54}" font-size="11">{escape(note)}</text></g>'
    )

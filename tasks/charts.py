"""Small charts as SVG text, for pages that load nothing: curves over steps, and histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# Okabe and Ito, "Color universal design" (2008): told apart by colour-blind readers too.
_COLORS = ("#0072B2", "#D55E00")
_GREY, _GRID = "#5f6b76", "#dde3ea"
_WIDTH, _HEIGHT = 620, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 40  # margins, in pixels
_MOST_POINTS = 500  # of one curve: more than there are pixels to tell apart

Point = tuple[float, float]


def curves(title: str, x_label: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Up to two curves in one frame; "" where there are no points.

    A curve of few points shows them as dots. Values that are not finite are left out.
    """
    drawn = {name: _thinned(points) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    everything = [point for points in drawn.values() for point in points]
    frame = _Frame([x for x, _ in everything], [y for _, y in everything])
    body = "".join(
        _curve(frame, points, color) for points, color in zip(drawn.values(), _COLORS, strict=False)
    )
    return _svg(title, frame.axes(x_label) + body + _legend(list(drawn)))


def bars(title: str, x_label: str, histogram: Mapping[str, Any], percent: bool = False) -> str:
    """A histogram: `edges` (n + 1) and `counts` (n). All bars are drawn equally wide.

    Args:
        percent: the edges are shares of one.
    """
    edges, counts = list(histogram["edges"]), list(histogram["counts"])
    assert len(edges) == len(counts) + 1, "a histogram has one edge more than bars"
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return ""
    edges, counts = edges[filled[0] : filled[-1] + 2], counts[filled[0] : filled[-1] + 1]
    frame = _Frame([0, len(counts)], [0, max(counts)])
    width = frame.x(1) - frame.x(0)
    shapes = []
    for i, count in enumerate(counts):
        left, top = frame.x(i), frame.y(count)
        size = f'width="{width - 1:.1f}" height="{frame.y(0) - top:.1f}"'
        shapes.append(f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{_COLORS[0]}"/>')
    every = math.ceil(len(edges) / 10)
    names = "".join(
        _text(frame.x(i), _HEIGHT - _BOTTOM + 16, _edge(edge, percent), "middle")
        for i, edge in enumerate(edges)
        if i % every == 0
    )
    return _svg(title, frame.axes(x_label, names) + "".join(shapes))


class _Frame:
    """Where values are in the drawing."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self._x0, self._x1 = min(xs), max(xs)
        self._y0, self._y1 = min(0.0, *ys), max(ys)
        self._x1 = self._x1 if self._x1 > self._x0 else self._x0 + 1
        self._y1 = self._y1 if self._y1 > self._y0 else self._y0 + 1

    def x(self, value: float) -> float:
        """Pixels from the left."""
        share = (value - self._x0) / (self._x1 - self._x0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        share = (value - self._y0) / (self._y1 - self._y0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str, x_names: str = "") -> str:
        """Grid, numbers and label; `x_names` in place of numbers below."""
        lines = []
        for value in _ticks(self._y0, self._y1):
            y = f"{self.y(value):.1f}"
            ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"'
            lines.append(f'<line {ends} stroke="{_GRID}"/>')
            lines.append(_text(_LEFT - 8, self.y(value) + 4, f"{value:g}", "end"))
        if not x_names:
            x_names = "".join(
                _text(self.x(value), _HEIGHT - _BOTTOM + 16, f"{value:g}", "middle")
                for value in _ticks(self._x0, self._x1)
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        return "".join(lines) + x_names + _text(middle, _HEIGHT - 6, x_label, "middle")


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between two values."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 8)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most `_MOST_POINTS`, each the mean of its neighbours."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(finite) / _MOST_POINTS)
    if size <= 1:
        return finite
    groups = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _curve(frame: _Frame, points: Sequence[Point], color: str) -> str:
    corners = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    line = f'<polyline points="{corners}" fill="none" stroke="{color}" stroke-width="1.8"/>'
    if len(points) > 30:
        return line
    return line + "".join(
        f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5" fill="{color}">'
        f"<title>{x:g}: {y:.4f}</title></circle>"
        for x, y in points
    )


def _legend(names: Sequence[str]) -> str:
    parts = []
    for i, (name, color) in enumerate(zip(names, _COLORS, strict=False)):
        x = _WIDTH - _RIGHT - 110 * (len(names) - i)
        parts.append(f'<rect x="{x}" y="12" width="14" height="4" fill="{color}"/>')
        parts.append(_text(x + 20, 18, name, "start"))
    return "".join(parts)


def _edge(value: float, percent: bool) -> str:
    return f"{100 * value:.0f} %" if percent else f"{value:,.0f}"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="11" fill="{_GREY}">{escape(text)}</text>'


def _svg(title: str, body: str) -> str:
    heading = f'<text x="{_LEFT}" y="18" font-size="13" font-weight="600">{escape(title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="system-ui, sans-serif" role="img">'
        f"<title>{escape(title)}</title>{heading}{body}</svg>"
    )

"""Figures as PNG bytes from plain data. The only importer of matplotlib.

Figures are drawn with the object-oriented interface on the Agg canvas: no window system, no state
shared between threads. Equal data gives equal bytes.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from regrow.tasks import lineage_drawing as drawing
from regrow.tasks.scores import SCORES, Score

# Okabe and Ito, "Color universal design" (2008): told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#5F6B76"
_SIZE_INCHES, _DPI = (8.0, 4.2), 120


def loss_curve(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Training and validation loss over optimizer steps.

    Args:
        history: records with `step` and `loss` (training) or `eval_loss` (validation), as the
            train stage's `metrics.jsonl` holds them; others are passed over.
    """
    figure, (axes,) = _figure()
    train = [(r["step"], r["loss"]) for r in history if "loss" in r]
    validation = [(r["step"], r["eval_loss"]) for r in history if "eval_loss" in r]
    if train:
        many = len(train) > 100
        axes.plot(*_columns(train), color=_BLUE, alpha=0.3 if many else 1.0, label="training")
        if many:
            smooth = _running_mean(train, len(train) // 50)
            axes.plot(*_columns(smooth), color=_BLUE, label="training, running mean")
    if validation:
        axes.plot(*_columns(validation), color=_ORANGE, marker="o", label="validation")
        step, value = validation[-1]
        note = {"textcoords": "offset points", "xytext": (0, 8), "ha": "right"}
        axes.annotate(f"{value:.3f}", (step, value), color=_ORANGE, **note)
    axes.set(title="Loss", xlabel="optimizer step", ylabel="mean loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if train or validation:
        axes.legend(frameon=False)
    return _png(figure)


def length_histogram(hist: Mapping[str, Any]) -> bytes:
    """How long the examples are.

    Args:
        hist: `edges` (n + 1 lengths in tokens), `counts` (n), and perhaps `sequence_len`, which is
            marked. Edges that double are drawn equally wide.
    """
    figure, (axes,) = _figure()
    _bars(axes, hist)
    limit = hist.get("sequence_len")
    if limit:
        axes.axvline(limit, color=_ORANGE, linestyle="--", label=f"sequence_len {limit:,}")
        axes.legend(frameon=False)
    axes.set(title="Length of examples", xlabel="length (tokens)", ylabel="examples")
    if _doubling(hist["edges"]):
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_thousands())
    return _png(figure)


def packing_fill(hist: Mapping[str, Any]) -> bytes:
    """How full the packed rows are.

    Args:
        hist: `edges` (n + 1 shares of `sequence_len`, 0 to 1), `counts` (n rows), and perhaps
            `mean`, which is marked.
    """
    figure, (axes,) = _figure()
    _bars(axes, hist)
    mean = hist.get("mean")
    if mean is not None:
        axes.axvline(mean, color=_ORANGE, linestyle="--", label=f"mean {100 * mean:.1f} %")
        axes.legend(frameon=False)
    axes.set(title="Fill of packed rows", xlabel="share of sequence_len (%)", ylabel="rows")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    return _png(figure)


def scores_bar(before: Mapping[str, Any], after: Mapping[str, Any]) -> bytes:
    """The base model's scores beside the fine-tuned model's, one panel a score.

    Args:
        before: scores as the evaluate stage gives them; a score that is None or absent on either
            side is left out.
        after: the same.
    """
    known = [
        score
        for score in SCORES
        if before.get(score.name) is not None and after.get(score.name) is not None
    ]
    figure, panels = _figure(max(len(known), 1))
    for axes, score in zip(panels, known, strict=False):
        _score_panel(axes, score, [float(before[score.name]), float(after[score.name])])
    if not known:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no score is known on both sides", ha="center")
    return _png(figure)


def boxes_and_lines(boxes: Sequence[drawing.Box]) -> bytes:
    """The drawing of `lineage_drawing.svg` as an image, two pixels for each of its own."""
    plan = drawing.layout(boxes)
    figure = Figure(figsize=(plan.width / 72, plan.height / 72), dpi=144)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, plan.width), ylim=(plan.height, 0))
    axes.set_axis_off()
    for line in plan.lines:
        axes.add_patch(PathPatch(_path(line), fill=False, edgecolor="#9aa7b5", linewidth=1.5))
    for box in boxes:
        x, y = plan.corners[box.id]
        fill, border = drawing.colors(box)
        shape: dict[str, Any] = {"facecolor": fill, "edgecolor": border}
        shape["boxstyle"] = "round,pad=0,rounding_size=6"
        axes.add_patch(FancyBboxPatch((x, y), *drawing.BOX, **shape))
        title, key, note = drawing.texts(box)
        axes.text(x + 10, y + 20, title, fontsize=12, fontweight="bold", parse_math=False)
        axes.text(x + 10, y + 37, key, fontsize=10, family="monospace", color=_GREY)
        axes.text(x + 10, y + 54, note, fontsize=9.5, parse_math=False)
    return _png(figure)


def _path(line: str) -> Path:
    """SVG path data of absolute M, C and H as a matplotlib path."""
    points: list[tuple[float, float]] = []
    codes: list[Any] = []
    for letter, numbers in re.findall(r"([MCH])([^MCH]*)", line):
        values = [float(number) for number in numbers.split()]
        if letter == "H":
            points.append((values[0], points[-1][1]))
            codes.append(Path.LINETO)
        else:
            pairs = list(zip(values[::2], values[1::2], strict=True))
            points += pairs
            codes += [Path.MOVETO if letter == "M" else Path.CURVE4] * len(pairs)
    return Path(points, codes)


def _score_panel(axes: Axes, score: Score, values: Sequence[float]) -> None:
    bars = axes.bar(["before", "after"], values, color=[_GREY, _BLUE], width=0.6)
    axes.bar_label(bars, labels=[score.show(value) for value in values], padding=3)
    better = "lower" if score.lower_is_better else "higher"
    axes.set_title(f"{score.title}\n{better} is better", fontsize=9)
    axes.set_ylim(0, max(*values, 0.01) * 1.2)
    if score.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _figure(panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes


def _bars(axes: Axes, hist: Mapping[str, Any]) -> None:
    edges, counts = list(hist["edges"]), list(hist["counts"])
    assert len(edges) == len(counts) + 1, "a histogram has one edge more than bars"
    widths = [right - left for left, right in itertools.pairwise(edges)]
    axes.bar(edges[:-1], counts, widths, align="edge", color=_BLUE, edgecolor="white")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(_thousands())


def _doubling(edges: Sequence[float]) -> bool:
    return len(edges) > 2 and all(b == 2 * a > 0 for a, b in itertools.pairwise(edges))


def _thousands() -> FuncFormatter:
    return FuncFormatter(lambda value, _position: f"{value:,.0f}")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _running_mean(points: Sequence[tuple[float, float]], radius: int) -> list[tuple[float, float]]:
    """Each value averaged with its `radius` neighbours on both sides, as far as there are any."""
    means = []
    for i, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, i - radius) : i + radius + 1]]
        means.append((step, sum(window) / len(window)))
    return means


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the metadata the bytes would name the version of matplotlib.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

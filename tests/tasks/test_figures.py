"""Figures are images, show what they are given, and share no state."""

import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from regrow.tasks import figures

HISTORY = [{"step": s, "loss": 3 / s, "learning_rate": 1e-4} for s in range(1, 40)]
EVALS = [{"step": s, "eval_loss": 3 / s + 0.1} for s in (13, 26, 39)]
LENGTHS = {"edges": [0, 10, 20, 40], "counts": [5, 9, 2], "sequence_len": 32}
FILL = {"edges": [0, 0.5, 1.0], "counts": [1, 8], "mean": 0.93}
BEFORE = {"loss": 2.1, "perplexity": 8.2, "token_accuracy": 0.52, "exact": 0.0}
AFTER = {"loss": 1.6, "perplexity": 4.9, "token_accuracy": 0.61, "exact": 0.3}


def _size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.loss_curve(HISTORY + EVALS),
        lambda: figures.loss_curve([]),
        lambda: figures.loss_curve([{"step": s, "loss": 2.0} for s in range(500)]),
        lambda: figures.length_histogram(LENGTHS),
        lambda: figures.length_histogram({"edges": [0, 1], "counts": [0]}),
        lambda: figures.packing_fill(FILL),
        lambda: figures.scores_bar(BEFORE, AFTER),
        lambda: figures.scores_bar({"loss": 0.0, "exact": None}, {"loss": 0.0, "exact": 1.0}),
        lambda: figures.scores_bar({}, {}),
    ],
)
def test_figure_is_a_readable_png_and_the_same_each_time(draw) -> None:
    png = draw()
    assert _size(png) == (960, 504)
    assert draw() == png


def test_figure_depends_on_each_part_of_its_data() -> None:
    both = figures.loss_curve(HISTORY + EVALS)
    assert both != figures.loss_curve(HISTORY)
    assert both != figures.loss_curve(EVALS)
    assert figures.length_histogram(LENGTHS) != figures.length_histogram(
        {**LENGTHS, "sequence_len": 16}
    )
    assert figures.packing_fill(FILL) != figures.packing_fill({**FILL, "counts": [2, 8]})
    assert figures.scores_bar(BEFORE, AFTER) != figures.scores_bar(AFTER, BEFORE)


def test_figures_can_be_drawn_in_threads() -> None:
    alone = figures.loss_curve(HISTORY)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: figures.loss_curve(HISTORY), range(8))) == {alone}


def test_pyplot_and_its_global_state_are_not_loaded() -> None:
    code = "import sys, regrow.tasks.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

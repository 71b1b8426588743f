"""Charts are well-formed SVG that loads nothing and shows each value where it belongs."""

import xml.etree.ElementTree as ElementTree

import pytest

from regrow.tasks import charts

SPACE = "{http://www.w3.org/2000/svg}"


def _parsed(svg: str) -> ElementTree.Element:
    assert "href" not in svg
    assert "url(" not in svg
    return ElementTree.fromstring(svg)


def _points(svg: str) -> list[list[tuple[float, float]]]:
    lines = _parsed(svg).iter(f"{SPACE}polyline")
    pairs = [line.get("points", "").split() for line in lines]
    return [[tuple(float(n) for n in pair.split(",")) for pair in line] for line in pairs]  # type: ignore[misc]


def test_curves_rise_with_their_values_and_stay_in_the_frame():
    (train, check) = _points(
        charts.curves("Loss", "step", {"a": [(1, 3.0), (2, 1.0), (3, 2.0)], "b": [(3, 2.5)]})
    )
    assert [x for x, _ in train] == sorted(x for x, _ in train)
    assert train[0][1] < train[2][1] < train[1][1]  # a larger value stands higher
    assert len(check) == 1
    assert all(0 <= x <= 620 and 0 <= y <= 240 for x, y in train + check)


def test_a_long_curve_is_thinned_and_keeps_its_last_step():
    (line,) = _points(charts.curves("Loss", "step", {"a": [(i, 1.0) for i in range(1, 10_001)]}))
    assert len(line) <= 500
    assert line[-1][0] == max(x for x, _ in line)


@pytest.mark.parametrize(
    "points", [[], [(1, float("nan"))], [(1, float("inf"))]], ids=["none", "nan", "inf"]
)
def test_nothing_to_show_is_no_chart(points):
    assert charts.curves("Loss", "step", {"a": points}) == ""


@pytest.mark.parametrize("points", [[(1, 0.0)], [(1, 5.0)], [(1, -2.0), (2, -3.0)]])
def test_single_and_equal_values_have_a_frame(points):
    _parsed(charts.curves("Loss", "step", {"a": points}))


def test_bars_are_as_high_as_their_counts_and_empty_ends_are_left_out():
    svg = charts.bars("Len", "tokens", {"edges": [0, 1, 2, 4, 8, 16], "counts": [0, 4, 0, 2, 0]})
    heights = [float(r.get("height", "")) for r in _parsed(svg).iter(f"{SPACE}rect")]
    assert len(heights) == 3
    assert heights[0] == pytest.approx(2 * heights[2], abs=0.2)
    assert heights[1] == 0
    assert charts.bars("Len", "tokens", {"edges": [0, 1], "counts": [0]}) == ""


def test_titles_and_names_are_escaped():
    _parsed(charts.curves("a < b & c", "x<y", {"<i>": [(1, 1.0)]}))

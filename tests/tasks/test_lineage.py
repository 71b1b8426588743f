"""Lineage names everything that an artifact was made from, once, and never a secret."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from regrow.infra.artifacts import FileEntry, Record
from regrow.tasks import lineage
from regrow.tasks.headline import headline
from regrow.tasks.lineage_picture import draw
from regrow.tasks.stage import StageError

DATA, TOKENIZER, WEIGHTS = "a1" * 32, "b2" * 32, "c3" * 32


def _record(stage: str, letter: str, inputs=None, result=None, spec=None, placement=None) -> Record:
    return Record(
        key=f"stages/{letter * 64}",
        stage=stage,
        spec=spec or {},
        inputs={name: other * 64 for name, other in (inputs or {}).items()},
        attempt="attempt-1",
        files={"x": FileEntry(2_500_000, "0" * 64)},
        result=result or {},
        provenance={"host": "box", "placement": placement or {}},
        created="2026-11-21T21:00:00+00:00",
    )


SPLITS = {"splits": {"train": {"examples": 40, "rows": 5}}}
SCORES = {"scores": {"loss": 1.5, "exact": 0.25}}
RECORDS = [
    _record(
        "prepare",
        "1",
        result=SPLITS,
        spec={
            "datasets": [{"parts": [{"files": [{"kind": "jsonl", "sha256": DATA}]}]}],
            "tokenizer": TOKENIZER,
        },
        placement={
            "locations": {DATA: "https://me:hush@host/data/talks.jsonl"},
            "tokenizer_path": "/models/small",
        },
    ),
    _record(
        "train",
        "2",
        {"prepare": "1"},
        {"steps": 8, "train_loss": 2.0},
        {"base_model_digest": WEIGHTS, "note": "<b>&"},
        {"base_model": "/models/small"},
    ),
    _record("merge", "3", {"train": "2"}, {"rms_logit_difference": 0.0, "adapter_effect": 1.0}),
    _record(
        "evaluate",
        "4",
        {"prepare": "1"},
        SCORES,
        {"model_digest": WEIGHTS},
        {"base_model": "/models/small"},
    ),
    _record("evaluate", "5", {"prepare": "1", "model": "3", "baseline": "4"}, SCORES),
    _record("publish", "6", {"model": "3", "scores": "5"}, {"files": {"a": 1}, "target": "/out"}),
]
LAST = RECORDS[-1]


@pytest.fixture
def lookup():
    return {record.key: record for record in RECORDS}.get


def test_graph_holds_everything_once_and_in_order(lookup):
    nodes = lineage.graph(LAST, lookup)
    assert len({node.id for node in nodes}) == len(nodes) == 9
    seen: set[str] = set()
    for node in nodes:
        assert seen.issuperset(node.inputs), node
        seen.add(node.id)
    assert [node.title for node in nodes if node.record] == [
        "prepare",
        "train",
        "merge",
        "evaluate (baseline)",
        "evaluate (scores)",
        "publish",
    ]
    sources = {(node.title, node.key, node.note) for node in nodes if node.record is None}
    assert sources == {
        ("data", DATA, "talks.jsonl"),
        ("tokenizer", TOKENIZER, "small"),
        ("base model", WEIGHTS, "small"),
    }


def test_tree_shows_each_artifact_in_full_once(lookup):
    prepared, trained, merged, base, tuned, published = (
        headline(record.stage, record.result) for record in RECORDS
    )
    assert lineage.tree(LAST, lookup).splitlines() == [
        f"publish  666666666666  {published}",
        f"├─ merge  333333333333  {merged}",
        f"│  └─ train  222222222222  {trained}",
        f"│     ├─ prepare  111111111111  {prepared}",
        "│     │  ├─ data  a1a1a1a1a1a1  talks.jsonl",
        "│     │  └─ tokenizer  b2b2b2b2b2b2  small",
        "│     └─ base model  c3c3c3c3c3c3  small",
        f"└─ evaluate (scores)  555555555555  {tuned}",
        "   ├─ prepare  111111111111  (as above)",
        "   ├─ merge  333333333333  (as above)",
        f"   └─ evaluate (baseline)  444444444444  {base}",
        "      ├─ prepare  111111111111  (as above)",
        "      └─ base model  c3c3c3c3c3c3  small",
    ]


def test_bare_keys_are_looked_up_as_they_are(lookup):
    bare = {r.key.removeprefix("stages/"): r for r in RECORDS}
    moved = {key: Record(**{**vars(record), "key": key}) for key, record in bare.items()}
    last = moved["6" * 64]
    assert lineage.tree(last, moved.get) == lineage.tree(LAST, lookup)


def test_a_lost_record_is_said_to_be_gone(lookup):
    without = {r.key: r for r in RECORDS if r.stage != "merge"}.get
    assert "model  333333333333  its record is gone" in lineage.tree(LAST, without)
    assert "its record is gone" in lineage.html(LAST, without)


def test_a_record_of_another_version_is_still_shown(lookup):
    old = _record("prepare", "7", result={"rows": 3})
    assert lineage.tree(old, lookup) == "prepare  777777777777"


def test_page_is_self_contained_and_complete(lookup):
    page = lineage.html(LAST, lookup)
    assert not re.search(r"<script|src=|href=|@import|url\(", page)
    for record in RECORDS:
        assert record.key.removeprefix("stages/") in page
    for digest in (DATA, TOKENIZER, WEIGHTS):
        assert digest in page
    assert "2.5 MB" in page
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page


def test_no_secret_reaches_the_page_or_the_tree(lookup):
    assert "hush" not in lineage.html(LAST, lookup)
    assert "hush" not in lineage.tree(LAST, lookup)


def test_drawn_boxes_do_not_overlap_and_lines_go_to_the_right(lookup):
    page = lineage.html(LAST, lookup)
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    space = "{http://www.w3.org/2000/svg}"
    boxes = [
        tuple(float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
        for rect in svg.iter(f"{space}rect")
    ]
    assert len(boxes) == 9
    for i, (x1, y1, width, height) in enumerate(boxes):
        assert x1 + width <= float(svg.get("width", ""))
        assert y1 + height <= float(svg.get("height", ""))
        for x2, y2, *_ in boxes[i + 1 :]:
            assert abs(x1 - x2) >= width or abs(y1 - y2) >= height
    paths = [path.get("d", "") for path in svg.iter(f"{space}path")]
    assert len(paths) == sum(len(node.inputs) for node in lineage.graph(LAST, lookup))
    for path in paths:
        numbers = [float(n) for n in re.findall(r"-?\d+", path)]
        assert numbers[0] < numbers[-2]
        for level, end in re.findall(r"(\d+)H(\d+)", path.replace(" H", "H")):
            for x, y, width, height in boxes:  # what runs straight through a column hits no box
                assert not (x < float(end) <= x + width and y <= float(level) <= y + height)


@pytest.mark.parametrize(
    ("ending", "begin"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("html", b"<!doctype html>")]
)
def test_picture_is_written_by_the_ending_of_its_name(lookup, tmp_path, ending, begin):
    file = tmp_path / f"lineage.{ending}"
    draw(LAST, lookup, file)
    content = file.read_bytes()
    assert content.startswith(begin)
    assert b"hush" not in content
    draw(LAST, lookup, file)
    assert file.read_bytes() == content


def test_picture_of_another_kind_or_place_is_refused(lookup, tmp_path):
    with pytest.raises(StageError, match=r"must end in \.svg, \.png or \.html"):
        draw(LAST, lookup, tmp_path / "lineage.pdf")
    with pytest.raises(StageError, match="No such file or directory"):
        draw(LAST, lookup, tmp_path / "nowhere" / "lineage.svg")

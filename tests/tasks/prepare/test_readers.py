"""Every kind of file gives its rows once, in order, with numbers a person can find them by."""

import bz2
import gzip
import hashlib
import json
import lzma

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from regrow.tasks.prepare import readers
from regrow.tasks.prepare.folders import file_kind
from regrow.tasks.prepare.localize import localize
from regrow.tasks.stage import StageError

ROWS = [{"text": f"row {i} äöü 🦊\u2028 end", "n": i} for i in range(50)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
HALVES = (LINES[: len(LINES) // 2], LINES[len(LINES) // 2 :])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 200)


@pytest.fixture
def read(tmp_path):
    """(name, bytes) -> [(place of the row, row)]."""

    def run(name: str, data: bytes, low: int = 0, high: int = 10**9, ds_type: str | None = None):
        path = tmp_path / name
        path.write_bytes(data)
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        digest = hashlib.sha256(data).hexdigest()
        file = localize(str(path), digest, file_kind(name, ds_type), scratch)
        chunks = readers.find_chunks(file)
        run.chunks = len(chunks)
        return [
            (file.where(number).removeprefix(f"{tmp_path}/"), row)
            for chunk in chunks
            for number, row in readers.read_rows(file, chunk, low, high)
        ]

    return run


def arrow_file(kind: str, rows: int = 7) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue().to_pybytes()


def parquet_file(rows: int = 7) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=rows)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES.replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.rstrip(b"\n"),
    "lines.json": LINES,
    "list.json": json.dumps(ROWS, indent=2).encode(),
    "one-line.json": json.dumps(ROWS).encode(),
    "object.json": json.dumps({"version": 1, "about": {"x": [1]}, "data": ROWS}).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.jsonl.zst": pa.compress(LINES, "zstd", asbytes=True),
    "two-parts.jsonl.zst": b"".join(pa.compress(half, "zstd", asbytes=True) for half in HALVES),
    "list.json.zst": pa.compress(json.dumps(ROWS).encode(), "zstd", asbytes=True),
    "a.parquet": parquet_file(),
    "file.arrow": arrow_file("file"),
    "stream.arrow": arrow_file("stream"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_row_once_and_in_order(read, name):
    assert [row for _, row in read(name, FILES[name])] == ROWS


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("low", "high"), [(0, 1), (13, 29), (49, 50), (50, 99), (7, 7)])
def test_any_range_of_rows(read, name, low, high):
    assert [row for _, row in read(name, FILES[name], low, high)] == ROWS[low:high]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize(("low", "high"), [(0, 99), (13, 29), (3, 4)])
def test_large_row_groups_are_several_chunks(read, name, low, high, monkeypatch):
    whole = {"a.parquet": parquet_file(50), "file.arrow": arrow_file("file", 50)}
    data = whole.get(name) or arrow_file("stream", 50)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 20)
    monkeypatch.setattr(readers, "_BATCH_ROWS", 4)
    assert [row for _, row in read(name, data, low, high)] == ROWS[low:high]
    assert read.chunks > 3


def test_csv_and_text(read):
    text = 'a,b\n1,"two, and\nthree"\n"x ""y""",ü\n'
    expected = [{"a": "1", "b": "two, and\nthree"}, {"a": 'x "y"', "b": "ü"}]
    assert [row for _, row in read("a.csv", text.encode())] == expected
    tabbed = read("a.tsv", b"a\tb\n1\t2\n")
    assert [row for _, row in tabbed] == [{"a": "1", "b": "2"}]
    assert read("a.txt", b"one\n\ntwo") == [
        ("a.txt:1", {"text": "one"}),
        ("a.txt:3", {"text": "two"}),
    ]


def test_rows_are_named_as_people_find_them(read):
    assert read("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n')[1][0] == "a.jsonl:3"
    assert read("a.json", b'[{"a": 1}, {"a": 2}]')[1][0] == "a.json, row 2"


def test_lone_row_files(read):
    assert [row for _, row in read("a.jsonl", b'{"data": [{"x": 1}]}')] == [{"data": [{"x": 1}]}]
    assert [row for _, row in read("a.json", b'{"data": [{"x": 1}]}')] == [{"x": 1}]
    assert read("a.json", b"[]") == []
    assert read("a.jsonl", b"") == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", LINES + b'{"text": \n', r"a\.jsonl:51: not valid JSON"),
        ("a.jsonl", LINES + b"[1]\n", r"a\.jsonl:51: a row must be a JSON object"),
        ("a.jsonl", LINES + b'{"a": "\xff"}\n', r"a\.jsonl:51: not UTF-8"),
        ("a.json", b'[{"a": 1}, {"a": ]', r"a\.json: not a JSON list of rows:.* character 18"),
        ("a.json", b'[{"a": 1}', r"a\.json: not a JSON list"),
        ("a.json", b"[1, 2]", r"a\.json: .*a list of objects is needed"),
        ("a.json", b'{"a": 1,\n "b": 2}', r"a\.json: .*is expected"),
        ("a.json", b'[{"a": 1}] [{"a": 2}]', r"a\.json: .*text follows the list"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json: it is not text in UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl.xz", b"not xz", r"a\.jsonl\.xz: cannot be decompressed"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv:3: .*another number of cells"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv:\d: not valid CSV"),
        ("a.parquet", b"not parquet", r"a\.parquet: cannot be read as parquet"),
        ("a.arrow", b"not arrow at all", r"a\.arrow: cannot be read as arrow"),
        ("a.jsonl.zst", b"not zst", r"a\.jsonl\.zst: cannot be decompressed"),
        (
            "b.jsonl.zst",
            pa.compress(LINES, "zstd", asbytes=True)[:-20],
            r"b\.jsonl\.zst: cannot be decompressed.*is the copy whole",
        ),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], r"a\.jsonl\.gz: cannot be decompressed"),
    ],
)
def test_malformed_row_is_named(read, name, data, message):
    with pytest.raises(StageError, match=message):
        read(name, data)


def test_file_that_changed_since_the_plan_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    with pytest.raises(StageError, match=r"a\.jsonl: the file has changed since the plan"):
        localize(str(path), "0" * 64, "jsonl", tmp_path)
    with pytest.raises(StageError, match=r"gone\.jsonl: the file is gone"):
        localize(str(tmp_path / "gone.jsonl"), "0" * 64, "jsonl", tmp_path)


def test_remote_files_are_copied_and_verified(tmp_path):
    import fsspec

    with fsspec.open("memory://bucket/a.jsonl.gz", "wb") as out:
        out.write(gzip.compress(LINES, mtime=0))
    digest = hashlib.sha256(gzip.compress(LINES, mtime=0)).hexdigest()
    file = localize("memory://bucket/a.jsonl.gz", digest, "jsonl", tmp_path)
    chunks = readers.find_chunks(file)
    rows = [row for chunk in chunks for _, row in readers.read_rows(file, chunk, 0, 99)]
    assert rows == ROWS
    with pytest.raises(StageError, match="has changed"):
        localize("memory://bucket/a.jsonl.gz", "0" * 64, "jsonl", tmp_path)


def test_json_list_is_read_in_pieces(tmp_path, monkeypatch):
    """A list longer than what is read at once gives the same rows."""
    from regrow.tasks.prepare import localize as module

    monkeypatch.setattr(module, "_BLOCK", 17)
    data = json.dumps({"n": 12345, "rows": ROWS}, indent=1).encode()
    (tmp_path / "a.json").write_bytes(data)
    file = localize(str(tmp_path / "a.json"), hashlib.sha256(data).hexdigest(), "json", tmp_path)
    chunks = readers.find_chunks(file)
    assert [r for c in chunks for _, r in readers.read_rows(file, c, 0, 99)] == ROWS

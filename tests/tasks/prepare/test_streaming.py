"""A stream is read as far as training needs it, gives the same bytes as ever, and goes on."""

import bz2
import gzip
import json
import lzma
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from regrow.infra import store
from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.prepare import pieces, readers, sources, streaming, units
from regrow.tasks.prepare.progress import short
from regrow.tasks.prepare.shares import allotted
from regrow.tasks.stage import StageError

STREAM = {"streaming": True, "sequence_len": 64, "gradient_accumulation_steps": 4}


def texts(count: int, mark: str = "n") -> list[dict]:
    return [{"text": f"{mark}{i} " + "words and " * (i % 9 * 3) + "more"} for i in range(count)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def found(prepared, split: str = "train") -> set[str]:
    """The first word of each document of which there is the beginning."""
    tokenizer = Tokenizer.from_file(str(prepared.out / "tokenizer" / "tokenizer.json"))
    rows, firsts = PackedRows(prepared.out, split), set()
    for i in range(len(rows)):
        row = rows[i]
        for part in np.split(row.input_ids, np.cumsum(row.seq_lens)[:-1]):
            firsts.add(tokenizer.decode(part.tolist()).split()[0])
    return {word for word in firsts if word[-1].isdigit()}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for module in (pieces, streaming):
        monkeypatch.setattr(module, "PIECE_BYTES", 3000)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 700)


@pytest.fixture
def stream(bench):
    """Runs the stage on a stream of plain texts."""

    def run(*datasets: dict, placed=None, steps: int = 3, **keys):
        entries = [{"type": "completion", **dataset} for dataset in datasets]
        return bench.run(placed, datasets=entries, max_steps=steps, **{**STREAM, **keys})

    return run


def test_reading_stops_when_training_has_enough(bench, stream):
    path = bench.write("a.jsonl", texts(2000))
    prepared = stream({"path": path})
    told = prepared.result["splits"]["train"]
    assert 3 * 4 <= told["rows"] <= 3 * 4 + 1
    assert 3 * 4 * 64 <= told["tokens"] < 3 * 4 * 64 + 64
    assert prepared.result["datasets"][0]["rows"] < 100
    words = found(prepared)
    assert words == {f"n{i}" for i in range(len(words))}  # the first ones
    assert prepared.report.steps[-1][2] == "train rows"
    assert any(unit == "tokens" and "tokens/s" in note for *_, unit, note in prepared.report.steps)


def test_more_steps_read_on_where_fewer_stopped(bench, stream):
    path = bench.write("a.jsonl", texts(2000))
    stream({"path": path}, steps=2)
    built = len(bench.units.built)
    few = Counter(bench.units.built)["tokens"]
    more = stream({"path": path}, steps=20)
    assert len(bench.units.built) > built
    bench.units = type(bench.units)(bench.root / "fresh")
    assert stream({"path": path}, steps=20).files() == more.files()
    assert Counter(bench.units.built)["tokens"] > few


PACKED = {
    "a.jsonl": lines,
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "a.jsonl.bz2": lambda rows: bz2.compress(lines(rows)),
    "a.jsonl.xz": lambda rows: lzma.compress(lines(rows)),
    "a.jsonl.zst": lambda rows: pa.compress(lines(rows), codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("name", [*PACKED, "a.parquet", "a.arrow", "b.arrow", "a.txt"])
@pytest.mark.parametrize("root", ["{tmp}", "memory://{name}"])
def test_every_kind_of_file_gives_the_same_rows(bench, stream, tmp_path, name, root):
    rows = texts(400)
    plain = stream({"path": bench.write("plain.jsonl", rows)})
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    if name.endswith("parquet"):
        pq.write_table(table, sink, row_group_size=7)
    elif name.endswith("arrow"):
        new = pa.ipc.new_file if name[0] == "a" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    content = sink.getvalue().to_pybytes()
    if name == "a.txt":
        content = "".join(row["text"] + "\n" for row in rows).encode()
    content = PACKED[name](rows) if name in PACKED else content
    place = f"{root.format(tmp=tmp_path, name=tmp_path.name)}/in/{name}"
    with fsspec.open(place, "wb", auto_mkdir=True) as file:
        file.write(content)
    other = stream({"path": place})
    assert found(other) == found(plain)
    assert other.files()["train/shard-00000.arrow"] == plain.files()["train/shard-00000.arrow"]
    assert other.result["datasets"][0]["rows"] < 400


def test_the_rest_of_a_remote_file_is_not_fetched(bench, stream, monkeypatch):
    rows = texts(5000)
    with fsspec.open("memory://far/a.jsonl", "wb") as file:
        file.write(lines(rows))
    read, ends = [0], store.open_url

    def counting(place, *args):
        opened = ends(place, *args)
        inner = opened.readinto
        filled = lambda into: read.append(len(into)) or inner(into)  # noqa: E731
        monkeypatch.setattr(opened, "readinto", filled, raising=False)
        return opened

    monkeypatch.setattr(pieces.store, "open_url", counting)
    stream({"path": "memory://far/a.jsonl"})
    assert 0 < sum(read) < len(lines(rows)) / 10


def test_a_stream_is_the_same_bytes_for_any_number_of_processes(bench, stream):
    one, two = bench.write("a.jsonl", texts(600, "a")), bench.write("b.jsonl", texts(600, "b"))
    datasets = [{"path": one, "weight": 3}, {"path": two}]
    results = []
    for processes in (1, 2, 8):
        bench.units = type(bench.units)(bench.root / f"units-{processes}")
        placed = {"num_proc": processes, "pool_from_bytes": 0}
        done = stream(*datasets, placed=placed, steps=8, val_set_size=0.1)
        results.append((done.files(), done.result))
    assert results[0] == results[1] == results[2]


class Stopped(BaseException):
    """Not an Exception: nothing on the way may handle it."""


@pytest.mark.parametrize("moment", [0, 1, 3])
def test_a_killed_stream_goes_on_at_the_missing_piece(bench, stream, monkeypatch, moment):
    datasets = [
        {"path": bench.write("a.jsonl", texts(600, "a")), "weight": 2},
        {"path": bench.write("b.jsonl", texts(600, "b"))},
    ]
    whole = stream(*datasets, steps=12)
    everything = Counter(bench.units.built)
    bench.units = type(bench.units)(bench.root / "other")
    write, left = units.write_unit, iter(range(moment))

    def dying(*args):
        if next(left, None) is None:
            raise Stopped
        return write(*args)

    with monkeypatch.context() as broken:
        broken.setattr(units, "write_unit", dying)
        with pytest.raises(Stopped):
            stream(*datasets, steps=12)
    assert bench.units.built.count("tokens") == moment
    again = stream(*datasets, steps=12)
    assert Counter(bench.units.built) == everything  # nothing was done twice
    assert again.files() == whole.files()


def test_weights_are_shares_of_the_tokens(bench, stream):
    one, two = bench.write("a.jsonl", texts(900, "a")), bench.write("b.jsonl", texts(900, "b"))
    prepared = stream({"path": one, "weight": 3}, {"path": two}, steps=10)
    words = Counter(word[0] for word in found(prepared))
    assert 2 < words["a"] / words["b"] < 4.5


def test_a_dataset_that_ends_leaves_its_share_to_the_others(bench, stream):
    one, two = bench.write("a.jsonl", texts(5, "a")), bench.write("b.jsonl", texts(900, "b"))
    prepared = stream({"path": one}, {"path": two}, steps=10)
    assert {word for word in found(prepared) if word[0] == "a"} == {f"a{i}" for i in range(5)}
    assert prepared.result["splits"]["train"]["tokens"] >= 10 * 4 * 64


def test_a_stream_that_ends_too_early_is_told_of(bench, stream):
    prepared = stream({"path": bench.write("a.jsonl", texts(5))}, steps=50)
    assert found(prepared) == {f"n{i}" for i in range(5)}
    assert any("end before max_steps" in line for line in prepared.report.lines)


@pytest.mark.parametrize("size", [0.25, 10])
def test_validation_comes_on_top_of_what_training_needs(bench, stream, size):
    prepared = stream({"path": bench.write("a.jsonl", texts(900))}, val_set_size=size, steps=6)
    splits = prepared.result["splits"]
    assert splits["train"]["tokens"] >= 6 * 4 * 64
    assert splits["validation"]["examples"] >= 10
    assert not found(prepared) & found(prepared, "validation")


def test_test_datasets_are_read_whole(bench):
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", texts(900)), "type": "completion"}],
        test_datasets=[{"path": bench.write("t.jsonl", texts(90, "t")), "type": "completion"}],
        max_steps=2,
        **STREAM,
    )
    assert found(prepared, "validation") == {f"t{i}" for i in range(90)}


def test_rows_without_packing_are_counted_as_rows(bench, stream):
    prepared = stream({"path": bench.write("a.jsonl", texts(900))}, sample_packing=False)
    assert len(PackedRows(prepared.out, "train")) == 3 * 4


def test_rows_may_be_skipped(bench, stream):
    path = bench.write("a.jsonl", texts(900))
    words = found(stream({"path": path, "split": "train[200:]", "skip": 50}))
    assert words == {f"n{250 + i}" for i in range(len(words))}
    few = found(stream({"path": path, "split": "train[150:155]+train[3:5]"}))
    assert few == {"n150", "n151", "n152", "n153", "n154", "n3", "n4"}


def test_conversations_are_streamed_too(bench):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}"},
                {"role": "assistant", "content": "It is. " * (i % 9)},
            ]
        }
        for i in range(900)
    ]
    dataset = {"path": bench.write("a.jsonl", rows), "type": "chat_template"}
    prepared = bench.run(datasets=[dataset], max_steps=3, min_sample_len=40, **STREAM)
    told = prepared.result["splits"]["train"]
    assert told["rows"] >= 3 * 4
    assert 3 * 4 * 64 <= told["tokens"] < 3 * 4 * 64 + 64
    assert told["trained_share"] < 0.9
    assert prepared.result["dropped"]["too_short"] > 0


def test_files_follow_one_another(bench, stream):
    for i in range(3):
        bench.write(f"d/{i}.jsonl", texts(4, "abc"[i]))
    words = found(stream({"path": str(bench.root / "d")}, steps=99))
    assert words == {f"{mark}{i}" for mark in "abc" for i in range(4)}


def test_a_bad_row_is_named_with_its_file(bench, stream):
    path = bench.write("a.jsonl", [*texts(40), {"oops": 1}])
    with pytest.raises(StageError, match=r"a\.jsonl \(after \d+ rows\):\d+: no column 'text'"):
        stream({"path": path}, steps=50)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\nx\n", "csv files cannot be read as a stream"),
        ("a.json", b' [{"text": "x"}]', "one JSON list, which cannot be read as a stream"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.jsonl", b"", "there are no rows"),
    ],
)
def test_what_cannot_be_streamed_is_explained(bench, stream, name, content, message):
    (bench.root / name).write_bytes(content)
    with pytest.raises(StageError, match=message):
        stream({"path": str(bench.root / name)})


def test_a_remote_file_that_changed_is_refused(bench, monkeypatch):
    with fsspec.open("memory://here/a.jsonl", "wb") as file:
        file.write(lines(texts(50)))
    planned = iter(["etag-1"])
    monkeypatch.setattr(sources.store, "identity", lambda _: (9, next(planned, "etag-2")))
    dataset = {"path": "memory://here/a.jsonl", "type": "completion"}
    with pytest.raises(StageError, match="has changed since the plan was made"):
        bench.run(datasets=[dataset], max_steps=1, **STREAM)


def test_two_datasets_may_read_one_file_in_two_ways(bench, stream):
    rows = [{**row, "other": f"o{i} more"} for i, row in enumerate(texts(900))]
    path = bench.write("a.jsonl", rows)
    words = found(stream({"path": path}, {"path": path, "field": "other"}, steps=20))
    assert {word[0] for word in words} == {"n", "o"}


def test_a_local_file_that_changed_is_refused(bench):
    dataset = {"path": bench.write("a.jsonl", texts(50)), "type": "completion"}
    planned = bench.stage(datasets=[dataset], max_steps=1, **STREAM)
    bench.write("a.jsonl", texts(50, "z"))
    bench.stage = lambda *_, **__: planned
    with pytest.raises(StageError, match=r"changed since the plan was made \(its sha256"):
        bench.run()
    (bench.root / "a.jsonl").unlink()
    with pytest.raises(StageError, match=r"a\.jsonl: cannot be read"):
        bench.run()


def test_a_dataset_without_rows_is_named_by_its_own_number(bench, stream):
    full, empty = bench.write("a.jsonl", texts(9)), bench.write("b.jsonl", [])
    with pytest.raises(StageError, match=r"^datasets\.1: there are no rows in .*b\.jsonl.*s\.1\.s"):
        stream({"path": full}, {"path": empty})


class _Pages(BaseHTTPRequestHandler):
    """One line at a time and no length: how services hand out what they make on the way."""

    protocol_version = "HTTP/1.1"
    content: bytes

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        packed = self.path.partition("?")[0].endswith(".gz")
        content = gzip.compress(self.content) if packed else self.content
        for line in [*content.splitlines(keepends=True), b""]:
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl?token=1", "a.jsonl.gz?token=1"])
def test_a_server_that_sends_line_by_line_is_read_to_the_end(bench, stream, name):
    _Pages.content = lines(texts(400))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        prepared = stream({"path": f"http://127.0.0.1:{server.server_port}/{name}"}, steps=999)
    finally:
        server.shutdown()
        server.server_close()
    assert prepared.result["datasets"][0]["rows"] == 400


def test_steps_and_batch_decide_how_much_and_so_the_key(bench):
    path = bench.write("a.jsonl", texts(9))

    def key(**keys):
        dataset = {"path": path, "type": "completion"}
        return bench.stage(datasets=[dataset], **{**STREAM, "max_steps": 3, **keys}).key

    assert key() == key(micro_batch_size=2, gradient_accumulation_steps=2)
    assert len({key(), key(max_steps=4), key(gradient_accumulation_steps=5)}) == 3
    assert key(streaming=False) == key(streaming=False, max_steps=4)


@given(
    st.integers(1, 10_000),
    st.lists(
        st.tuples(st.floats(0.1, 9), st.none() | st.integers(0, 5000)), min_size=1, max_size=6
    ),
)
def test_shares_give_all_that_is_wanted_where_there_is_enough(total, datasets):
    weights, most = zip(*datasets, strict=True)
    shares = allotted(total, weights, most)
    assert all(m is None or share <= m for share, m in zip(shares, most, strict=True))
    if None in most:
        assert total <= sum(shares) <= total + len(shares)
    else:
        assert sum(shares) >= min(total, sum(most))


def test_equal_weights_get_equal_shares():
    assert allotted(90, [1, 1, 1], [None] * 3) == [30, 30, 30]
    assert allotted(90, [1, 1, 1], [10, None, None]) == [10, 40, 40]
    assert allotted(90, [3, 1, 1], [10, 20, 20]) == [10, 20, 20]


def test_counts_are_short():
    assert [short(n) for n in (7, 1234, 12_345_678, 3e9)] == ["7", "1.2 k", "12.3 M", "3.0 G"]

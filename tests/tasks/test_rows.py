"""Rows come back as they were written, by number, in any order, also in another process."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from regrow.tasks.modeling.rows import SCHEMA, PackedRows, schema_of
from regrow.tasks.stage import StageError


@pytest.fixture
def artifact(tmp_path):
    """Ten rows in two shards, two rows in a group."""
    rows = [
        {
            "input_ids": list(range(100 * i, 100 * i + i + 2)),
            "loss_mask": [0] + [1] * (i + 1),
            "seq_lens": [1, i + 1],
        }
        for i in range(10)
    ]
    (tmp_path / "train").mkdir()
    shards = []
    for name, part in (("train/a.arrow", rows[:7]), ("train/b.arrow", rows[7:])):
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(str(tmp_path / name), SCHEMA, options=options) as writer:
            writer.write_table(pa.Table.from_pylist(part, SCHEMA), max_chunksize=2)
        shards.append({"file": name, "rows": len(part)})
    counts = {"rows": 10, "examples": 20, "tokens": 65, "supervised_tokens": 55}
    index = {"splits": {"train": {"shards": shards, **counts}}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path, rows


def same(row, expected) -> bool:
    return all(
        getattr(row, name).tolist() == expected[name]
        for name in ("input_ids", "loss_mask", "seq_lens")
    )


def test_rows_by_number_in_any_order(artifact):
    directory, rows = artifact
    packed = PackedRows(directory, "train")
    assert len(packed) == 10
    for index in [*range(10), 9, 0, 7, 6, 3, -1]:
        assert same(packed[index], rows[index])
    assert [len(row.input_ids) for row in packed] == list(range(2, 12))


def test_types_are_those_of_the_interface(artifact):
    row = PackedRows(artifact[0], "train")[4]
    assert (row.input_ids.dtype, row.loss_mask.dtype, row.seq_lens.dtype) == (
        np.int32,
        np.uint8,
        np.int32,
    )


def test_copy_in_another_process_opens_the_files_anew(artifact):
    directory, rows = artifact
    packed = PackedRows(directory, "train")
    assert same(packed[3], rows[3])
    assert same(pickle.loads(pickle.dumps(packed))[8], rows[8])


def test_row_beyond_the_last_is_an_error(artifact):
    packed = PackedRows(artifact[0], "train")
    for index in (10, -11):
        with pytest.raises(IndexError, match="of 10"):
            packed[index]


def test_missing_split_says_what_there_is(artifact):
    assert PackedRows.has(artifact[0], "train")
    assert not PackedRows.has(artifact[0], "validation")
    with pytest.raises(StageError, match=r"no validation split; it has train.*val_set_size"):
        PackedRows(artifact[0], "validation")


@pytest.fixture
def remote(artifact):
    """The same artifact in another file system, with a count of what is read of it."""
    from regrow.infra.store import Store

    directory, rows = artifact
    store = Store("memory://rows-test/artifact")
    names = ["index.json", "train/a.arrow", "train/b.arrow"]
    store.put_files([(directory / name, name) for name in names])
    yield store.url, rows
    store.remove("")


def test_rows_are_read_from_a_url(remote):
    url, rows = remote
    packed = PackedRows(url, "train")
    assert PackedRows.has(url, "train")
    for index in [*range(10), 9, 0, -1]:
        assert same(packed[index], rows[index])
    assert same(pickle.loads(pickle.dumps(packed))[8], rows[8])


def test_no_more_than_the_wanted_group_is_fetched(remote, monkeypatch):
    """Footer, one group, nothing ahead: a shard of gigabytes is not downloaded for a row."""
    from regrow.infra import store

    url, rows = remote
    read: list[int] = []

    class Counted:
        def __init__(self, file):
            self._file = file

        def read(self, size=-1):
            data = self._file.read(size)
            read.append(len(data))
            return data

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self._file.close()

    opened = store.open_ranges
    monkeypatch.setattr(store, "open_ranges", lambda url: Counted(opened(url)))
    packed = PackedRows(url, "train")
    assert same(packed[0], rows[0])
    first = sum(read)
    assert same(packed[1], rows[1])
    assert sum(read) == first  # the same group
    assert same(packed[4], rows[4])
    assert 0 < sum(read) - first < 1500


def test_other_kinds_have_labels_or_more(tmp_path):
    columns = {"input_ids": [[1, 2, 3, 4], [5, 6]], "loss_mask": [[0, 1, 0, 1], [0, 1]]}
    columns |= {"seq_lens": [[2, 2], [2]]}
    for kind, more in (
        ("preference", {"labels": [[1, 0], [1]]}),
        ("prompts", {"extra": [['{"a": 1}', "{}"], ['{"b": "ü"}']]}),
    ):
        root = tmp_path / kind
        root.mkdir()
        schema = schema_of(kind)
        with pa.ipc.new_file(str(root / "a.arrow"), schema) as writer:
            writer.write_table(pa.table({**columns, **more}, schema=schema))
        counts = {"rows": 2, "examples": 3, "tokens": 6, "supervised_tokens": 3}
        split = {"shards": [{"file": "a.arrow", "rows": 2}], **counts}
        (root / "index.json").write_text(json.dumps({"kind": kind, "splits": {"train": split}}))
        packed = PackedRows(root, "train")
        assert packed.kind == kind
        if kind == "prompts":
            assert [row.extra for row in packed] == [('{"a": 1}', "{}"), ('{"b": "ü"}',)]
            assert packed[0].labels is None
        else:
            assert [row.labels.tolist() for row in packed] == [[1, 0], [1]]
            assert packed[0].extra is None


def test_reader_does_not_load_torch():
    import subprocess
    import sys

    code = "import sys, regrow.tasks.modeling.rows; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

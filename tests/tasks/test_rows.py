"""Rows come back as they were written, by number, in any order, also in another process."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from regrow.tasks.modeling.rows import SCHEMA, PackedRows
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


def test_reader_does_not_load_torch():
    import subprocess
    import sys

    code = "import sys, regrow.tasks.modeling.rows; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

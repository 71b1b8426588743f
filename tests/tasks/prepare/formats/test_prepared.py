"""Formats together in one recipe, through the whole stage."""

from __future__ import annotations

import numpy as np
import pytest

from regrow.tasks.modeling.rows import PackedRows

ROWS = {
    "alpaca": {"instruction": "Add two", "output": "It is 3"},
    "alpaca:chatml": {"instruction": "Add two", "input": "1 2", "output": "3"},
    "input_output": {
        "segments": [{"label": False, "text": "Say"}, {"label": True, "text": "word"}]
    },
    "pretokenized": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    "completion": {"text": "two plain words"},
    "pygmalion": {
        "conversations": [{"role": "human", "value": "a"}, {"role": "bot", "value": "b"}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}
CODE = """
def read(row):
    return {"prompt": row["q"], "completion": row["a"]} if row["a"] else None
"""


def dataset(bench, kind, rows, **keys):
    path = bench.write(f"{str(kind).replace(':', '-')}.jsonl", rows)
    return {"path": path, "type": kind, **keys}


def test_formats_of_one_kind_share_a_recipe(bench):
    entries = [dataset(bench, kind, [row, {**row, "other": 1}]) for kind, row in ROWS.items()]
    entries.append({**entries[0], "type": {"no_input_format": "Say {instruction}: "}})
    prepared = bench.run(datasets=entries, sequence_len=512)
    packs = PackedRows(prepared.out, "train")
    rows = [packs[i] for i in range(len(packs))]
    assert sum(len(row.seq_lens) for row in rows) == 2 * len(entries)
    assert all(row.loss_mask.sum() > 0 for row in rows)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_own_function_reads_rows_in_every_process(bench, tmp_path, monkeypatch, processes):
    name = f"own_rows_{processes}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"q": f"Say {n}", "a": str(n) if n % 2 else ""} for n in range(40)]
    prepared = bench.run(
        {"num_proc": processes, "pool_from_bytes": 0},
        datasets=[dataset(bench, f"{name}.read", rows, trust_remote_code=True)],
    )
    packs = PackedRows(prepared.out, "train")
    lengths = np.concatenate([packs[i].seq_lens for i in range(len(packs))])
    assert len(lengths) == 20

"""What units hold is written once, whole, in the rows that packing says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.prepare import shards
from regrow.tasks.prepare.examples import Corpus
from regrow.tasks.prepare.ordering import shuffled
from regrow.tasks.prepare.packing import pack
from regrow.tasks.prepare.shards import write_split
from tests.tasks.prepare.made_units import write_unit

CAPACITY = 24


def written(root: Path, units: list[list[dict]], kind: str, seed: int = 0) -> PackedRows:
    """The rows that items in several units become."""
    paths = [(0, write_unit(root / f"u{i}.arrow", items)) for i, items in enumerate(units)]
    corpus = Corpus(paths)
    packs = pack(corpus.examples.length, CAPACITY)
    order = shuffled(len(packs), seed)
    told: list[int] = []
    split = write_split(
        root, "train", corpus, corpus.examples, packs, order, CAPACITY, told.append, kind
    )
    assert sum(told) == len(packs)
    index = {"kind": kind, "splits": {"train": split.index()}}
    (root / "index.json").write_text(json.dumps(index))
    return PackedRows(root, "train")


def sequence(number: int, length: int) -> list[tuple[int, int]]:
    """(token, learnt) pairs that belong to no other sequence; the first is not learnt."""
    return [(1000 * number + i, int(i > 0 and (number + i) % 3 > 0)) for i in range(length)]


def items_of(lengths: list[tuple[int, int]], kind: str) -> list[dict]:
    if kind == "preference":
        return [
            {"sequences": [sequence(2 * n, a), sequence(2 * n + 1, b)], "labels": [1, 0]}
            for n, (a, b) in enumerate(lengths)
        ]
    found: list[dict] = [{"sequences": [sequence(n, a)]} for n, (a, _) in enumerate(lengths)]
    for number, item in enumerate(found):
        learnt = sum(on for _, on in item["sequences"][0])
        if kind == "unpaired":
            item["labels"] = [number % 2]
        elif kind == "steps":
            item["labels"] = [(number + i) % 2 for i in range(learnt)]
        elif kind == "prompts":
            item["extra"] = json.dumps({"n": number, "text": "ü" * (number % 3)})
    return found


def read_back(rows: PackedRows) -> list[dict]:
    """The items of all rows, as `items_of` makes them."""
    found = []
    for number in range(len(rows)):
        row = rows[number]
        assert len(row.input_ids) <= CAPACITY
        ends = np.cumsum(row.seq_lens)[:-1]
        parts = [
            list(zip(ids.tolist(), mask.tolist(), strict=True))
            for ids, mask in zip(
                np.split(row.input_ids, ends), np.split(row.loss_mask, ends), strict=True
            )
        ]
        labels = [] if row.labels is None else row.labels.tolist()
        if rows.kind == "preference":
            assert labels == [1, 0] * (len(parts) // 2)
            found += [
                {"sequences": list(pair), "labels": [1, 0]}
                for pair in zip(parts[::2], parts[1::2], strict=True)
            ]
            continue
        for i, part in enumerate(parts):
            item: dict = {"sequences": [part]}
            if rows.kind == "unpaired":
                item["labels"] = [labels[i]]
            elif rows.kind == "steps":
                learnt = sum(on for _, on in part)
                item["labels"], labels = labels[:learnt], labels[learnt:]
            elif rows.kind == "prompts":
                assert row.extra is not None
                item["extra"] = row.extra[i]
            found.append(item)
    return found


def by_first_token(item: dict) -> int:
    return item["sequences"][0][0][0]


@pytest.mark.parametrize("kind", ["sft", "preference", "unpaired", "steps", "prompts"])
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, CAPACITY // 2), st.integers(1, CAPACITY // 2)),
        min_size=1,
        max_size=60,
    ),
    cut=st.integers(0, 60),
    seed=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_no_item_is_lost_repeated_divided_or_mixed(tmp_path_factory, kind, lengths, cut, seed):
    items = items_of(lengths, kind)
    parts = [part for part in (items[:cut], items[cut:]) if part]
    rows = written(tmp_path_factory.mktemp("rows"), parts, kind, seed)
    assert sorted(read_back(rows), key=by_first_token) == items


def test_position_tells_shard_and_row(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(shards, "BATCH_ROWS", 3)
    rows = written(tmp_path, [items_of([(20, 1)] * 10, "sft")], "sft")
    assert [rows.position(i) for i in (0, 2, 3, 9, -1)] == [(0, 0), (0, 2), (1, 0), (3, 0), (3, 0)]
    assert len(list((tmp_path / "train").iterdir())) == 4


def test_more_units_than_open_files(tmp_path, monkeypatch):
    from regrow.tasks.prepare.examples import _OpenFiles

    monkeypatch.setattr(_OpenFiles, "_LIMIT", 2)
    items = items_of([(5, 1)] * 12, "sft")
    rows = written(tmp_path, [[item] for item in items], "sft")
    assert sorted(read_back(rows), key=by_first_token) == items


_MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from regrow.tasks.prepare.choosing import held_back, without_repeats
from regrow.tasks.prepare.examples import Corpus
from regrow.tasks.prepare.ordering import shuffled
from regrow.tasks.prepare.packing import pack
from regrow.tasks.prepare.shards import write_split
from regrow.tasks.prepare.units import Unit

out = Path(sys.argv[1])
corpus = Corpus([(0, Unit(Path(path), int(sys.argv[2]), 0, 0)) for path in sys.argv[3:]])
examples = without_repeats(corpus.examples)
examples = examples.take(~held_back(examples, 0.01, 0))
packs = pack(examples.length, 2048)
order = shuffled(len(packs), 0)
write_split(out, "train", corpus, examples, packs, order, 2048, lambda _: None)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]))
"""


@pytest.mark.slow
def test_memory_hardly_grows_with_the_corpus(tmp_path):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux")
    from tests.tasks.prepare.made_units import write_random_unit

    units = [write_random_unit(tmp_path / f"u{i}.arrow", 20_000, 150, i) for i in range(20)]

    def peak(count: int) -> int:
        (out := tmp_path / f"out-{count}").mkdir()
        paths = [str(unit.path) for unit in units[:count]]
        command = [sys.executable, "-c", _MEASURE, str(out), "20000", *paths]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return int(done.stdout)

    small, large = peak(1), peak(20)
    assert large < 1.2 * small, f"{small} kB for 20,000 examples, {large} kB for 400,000"

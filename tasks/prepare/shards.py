"""Packed rows written as Arrow files: the artifact that training reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from regrow.tasks.modeling.rows import schema_of
from regrow.tasks.prepare.examples import Corpus, Examples
from regrow.tasks.prepare.packing import Packs

SHARD_BYTES = 256 << 20
"""Stored size at which a new file begins (platform.md part E: fetched in about a second)."""
BATCH_ROWS = 32
"""Rows compressed together: reading one row decompresses them all. Of 2048 tokens, rows at random
came back at 7, 15 and 25 M tokens/s in groups of 64, 32 and 16, rows in order at 1.0, 1.0 and 0.8
GB/s (measured, tests/bench/prepare_read.py, two busy cores) ..."""
BATCH_TOKENS = 1 << 17
"""... and long rows stand in smaller groups: 32 rows of 4096 tokens, one of 131072."""
COMPRESSION = "lz4"
"""Read back at 2.2 GB/s of tokens against 0.8 with zstd and 47 without compression, written at
0.32, 0.23 and 2.7 GB/s, stored in 1.7, 1.2 and 5 bytes a token (GSM8K and Alpaca text, groups of
131072 tokens, one core of an EPYC; measured, tests/bench/prepare_read.py)."""


@dataclass(frozen=True)
class WrittenSplit:
    """What was written."""

    shards: list[dict[str, object]]
    """{"file": name relative to the artifact, "rows": number} of each file."""
    rows: int
    tokens: int
    supervised_tokens: int
    examples: int
    row_tokens: np.ndarray
    """int64 [rows]: tokens of each pack, in the order of `packs`."""
    labels: dict[str, int]
    """How often each label occurs; empty where the kind has none that tell anything."""

    def index(self) -> dict[str, object]:
        """The split's entry in index.json."""
        return {
            "shards": self.shards,
            "rows": self.rows,
            "examples": self.examples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
        }


def write_split(
    out: Path,
    split: str,
    corpus: Corpus,
    examples: Examples,
    packs: Packs,
    order: np.ndarray,
    capacity: int,
    told: Callable[[int], None],
    kind: str = "sft",
) -> WrittenSplit:
    """Write the rows of a split below `out`.

    Args:
        packs: which items make a row.
        order: the order of the rows.
        capacity: tokens that a row may hold.
        told: called with the number of rows that have just been written.
        kind: what the items are; it says which columns there are.
    """
    (out / split).mkdir(parents=True)
    shards: list[dict[str, object]] = []
    labels = np.zeros(256, np.int64)
    with ThreadPoolExecutor(1) as reading:
        batches = _ahead(_batches(corpus, examples, packs, order, capacity, kind), reading)
        for batch in batches:
            file = f"{split}/shard-{len(shards):05d}.arrow"
            rows = _write_shard(out / file, itertools.chain([batch], batches), told, labels)
            shards.append({"file": file, "rows": rows})
    return WrittenSplit(
        shards=shards,
        rows=len(packs),
        tokens=examples.tokens,
        supervised_tokens=examples.supervised_tokens,
        examples=len(examples),
        row_tokens=np.add.reduceat(examples.length[packs.items], packs.offsets[:-1]),
        labels={
            str(label): int(labels[label])
            for label in np.flatnonzero(labels).tolist()
            if kind != "preference"  # there each pair has one of both
        },
    )


def _ahead(
    batches: Iterator[pa.RecordBatch], reading: ThreadPoolExecutor
) -> Iterator[pa.RecordBatch]:
    """The same, each made while the one before is compressed, which needs no Python."""
    coming = reading.submit(next, batches, None)
    while (batch := coming.result()) is not None:
        coming = reading.submit(next, batches, None)
        yield batch


def _write_shard(
    path: Path,
    batches: Iterator[pa.RecordBatch],
    told: Callable[[int], None],
    labels: np.ndarray,
) -> int:
    """Write a file of batches, as many as it takes; returns its rows, adds up its labels."""
    first = next(batches)
    rows = 0
    options = pa.ipc.IpcWriteOptions(compression=COMPRESSION)
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, first.schema, options=options) as writer,
    ):
        for batch in itertools.chain([first], batches):
            writer.write_batch(batch)
            if "labels" in batch.schema.names:
                values = cast(pa.ListArray, batch.column("labels")).values.to_numpy()
                labels += np.bincount(values, minlength=256)
            rows += batch.num_rows
            told(batch.num_rows)
            if sink.tell() >= SHARD_BYTES:
                break
    return rows


def _batches(
    corpus: Corpus, examples: Examples, packs: Packs, order: np.ndarray, capacity: int, kind: str
) -> Iterator[pa.RecordBatch]:
    size = min(BATCH_ROWS, max(1, BATCH_TOKENS // capacity))
    for begin in range(0, len(order), size):
        rows = [packs.row(index) for index in order[begin : begin + size].tolist()]
        yield _batch(corpus, examples.take(np.concatenate(rows)), [len(row) for row in rows], kind)


def _batch(corpus: Corpus, items: Examples, row_items: list[int], kind: str) -> pa.RecordBatch:
    """A group of rows.

    Args:
        items: those of the rows, one row after the other.
        row_items: how many of them each row has.
    """
    lengths = items.sequence_lens
    blocks, starts = items.sequence_places
    ends = np.cumsum(lengths)
    input_ids, loss_mask = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.uint8)
    corpus.gather(blocks, starts, lengths, input_ids, loss_mask)
    # The first token of a piece of an example has no predecessor in its row.
    loss_mask[ends - lengths] = 0
    row_ends = np.cumsum(row_items) * (items.sequences // len(items))
    tokens = _offsets(ends[row_ends - 1])
    columns = {
        "input_ids": pa.ListArray.from_arrays(tokens, pa.array(input_ids)),
        "loss_mask": pa.ListArray.from_arrays(tokens, pa.array(loss_mask)),
        "seq_lens": pa.ListArray.from_arrays(_offsets(row_ends), pa.array(lengths, pa.int32())),
    }
    schema = schema_of(kind)
    if "labels" in schema.names:
        columns["labels"] = _labels(corpus, items, row_items, kind)
    if "extra" in schema.names:
        texts = [corpus.extra(*place) for place in _item_places(items)]
        offsets = _offsets(np.cumsum(row_items))
        columns["extra"] = pa.ListArray.from_arrays(offsets, pa.array(texts, pa.string()))
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)


def _labels(corpus: Corpus, items: Examples, row_items: list[int], kind: str) -> pa.Array:
    labels = [corpus.labels(*place) for place in _item_places(items)]
    if kind == "steps":  # a sequence that was cut has lost steps
        kept = zip(labels, items.supervised.tolist(), strict=True)
        labels = [its[:count] for its, count in kept]
    ends = np.cumsum([len(its) for its in labels])[np.cumsum(row_items) - 1]
    return pa.ListArray.from_arrays(_offsets(ends), pa.array(np.concatenate(labels)))


def _item_places(items: Examples) -> Iterator[tuple[int, int]]:
    return zip(items.block.tolist(), items.item.tolist(), strict=True)


def _offsets(ends: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], ends]).astype(np.int32))

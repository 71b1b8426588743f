"""Packed rows written as Arrow files: the artifact that training reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from regrow.tasks.modeling.rows import SCHEMA
from regrow.tasks.prepare.examples import Corpus, Examples
from regrow.tasks.prepare.packing import Packs

SHARD_BYTES = 256 << 20
"""Stored size at which a new file begins (platform.md part E: fetched in about a second)."""
BATCH_ROWS = 64
"""Rows compressed together (same source); reading one row decompresses them all ..."""
BATCH_TOKENS = 1 << 18
"""... so long rows stand in smaller groups: 64 rows of 4096 tokens, 2 of 131072."""


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
    sequence_len: int,
    told: Callable[[int], None],
) -> WrittenSplit:
    """Write the rows of a split below `out`.

    Args:
        packs: which examples make a row.
        order: the order of the rows.
        told: called with the number of rows that have just been written.
    """
    (out / split).mkdir(parents=True)
    batches = _batches(corpus, examples, packs, order, sequence_len)
    shards: list[dict[str, object]] = []
    for batch in batches:
        file = f"{split}/shard-{len(shards):05d}.arrow"
        rows = _write_shard(out / file, itertools.chain([batch], batches), told)
        shards.append({"file": file, "rows": rows})
    return WrittenSplit(
        shards=shards,
        rows=len(packs),
        tokens=examples.tokens,
        supervised_tokens=examples.supervised_tokens,
        examples=len(examples),
        row_tokens=np.add.reduceat(examples.length[packs.items], packs.offsets[:-1]),
    )


def _write_shard(path: Path, batches: Iterator[pa.RecordBatch], told: Callable[[int], None]) -> int:
    rows = 0
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA, options=options) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
            told(batch.num_rows)
            if sink.tell() >= SHARD_BYTES:
                break
    return rows


def _batches(
    corpus: Corpus, examples: Examples, packs: Packs, order: np.ndarray, sequence_len: int
) -> Iterator[pa.RecordBatch]:
    size = min(BATCH_ROWS, max(1, BATCH_TOKENS // sequence_len))
    for begin in range(0, len(order), size):
        rows = [packs.row(index) for index in order[begin : begin + size].tolist()]
        yield _batch(corpus, examples, rows)


def _batch(corpus: Corpus, examples: Examples, rows: list[np.ndarray]) -> pa.RecordBatch:
    flat = np.concatenate(rows)
    lengths = examples.length[flat]
    places = zip(
        examples.block[flat].tolist(), examples.start[flat].tolist(), lengths.tolist(), strict=True
    )
    pieces = [corpus.tokens(*place) for place in places]
    input_ids = np.concatenate([ids for ids, _ in pieces])
    loss_mask = np.concatenate([mask for _, mask in pieces])
    # The first token of a piece of an example has no predecessor in its row.
    loss_mask[np.cumsum(lengths) - lengths] = 0
    row_items = np.array([len(row) for row in rows])
    row_ends = np.cumsum(lengths)[np.cumsum(row_items) - 1]
    tokens, items = _offsets(row_ends), _offsets(np.cumsum(row_items))
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(tokens, pa.array(input_ids)),
            pa.ListArray.from_arrays(tokens, pa.array(loss_mask)),
            pa.ListArray.from_arrays(items, pa.array(lengths)),
        ],
        schema=SCHEMA,
    )


def _offsets(ends: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], ends]).astype(np.int32))

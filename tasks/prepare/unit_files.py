"""The file of a unit: items with their tokens, a record batch for each chunk of the source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from regrow.tasks.prepare.tokenize import Block

UNIT_FILE = "tokens.arrow"

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("seq_lens", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.uint8())),
        ("extra", pa.string()),
        ("supervised", pa.int32()),
        ("prompt_len", pa.int32()),
        ("digest", pa.uint64()),
    ]
)
"""One line for each item; `seq_lens` are the lengths of its sequences, which stand one after the
other in `input_ids`."""


def write_unit(blocks: Iterator[Block], path: Path) -> dict[str, Any]:
    """Blocks as they come, not compressed: packing reads examples from all over the file."""
    examples = tokens = unended = 0
    refused: Counter[str] = Counter()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for block in blocks:
            writer.write_batch(_record_batch(block))
            examples, tokens = examples + len(block), tokens + len(block.input_ids)
            unended += block.unended
            refused += block.refused
    counts = {"examples": examples, "tokens": tokens, "unended": unended}
    return counts | {"refused": dict(refused)}


def _record_batch(block: Block) -> pa.RecordBatch:
    sequences = _edges(block.sequences)
    tokens = _edges(block.seq_lens)[sequences]
    columns = {
        "input_ids": _lists(tokens, block.input_ids),
        "loss_mask": _lists(tokens, block.loss_mask),
        "seq_lens": _lists(sequences, block.seq_lens),
        "labels": _lists(_edges(block.label_counts), block.labels),
        "extra": pa.array(block.extra, pa.string()),
        "supervised": _array(block.supervised),
        "prompt_len": _array(block.prompt_lens),
        "digest": _array(block.digests),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


_TYPES = {"int32": pa.int32(), "uint8": pa.uint8(), "uint64": pa.uint64()}


def _array(values: np.ndarray) -> pa.Array:
    # Not pa.array(), which imports pandas to see whether it is given a table.
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(_TYPES[values.dtype.name], len(values), buffers)


def _lists(edges: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(_array(edges), _array(values))


def _edges(counts: np.ndarray) -> np.ndarray:
    """int32 [n + 1]: where each of n parts of these sizes begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

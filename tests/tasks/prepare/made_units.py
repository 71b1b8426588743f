"""Units of made-up tokens: the side of prepare that packs and writes, without a tokenizer."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa

from regrow.tasks.prepare.unit_files import SCHEMA
from regrow.tasks.prepare.units import Unit


def write_unit(path: Path, items: list[dict], block_items: int = 7) -> Unit:
    """A unit of items {"sequences": [[(token, learnt), ...], ...], "labels": [...], "extra"}."""
    lines = []
    for item in items:
        flat = [pair for sequence in item["sequences"] for pair in sequence]
        lines.append(
            {
                "input_ids": [token for token, _ in flat],
                "loss_mask": [learnt for _, learnt in flat],
                "seq_lens": [len(sequence) for sequence in item["sequences"]],
                "labels": item.get("labels", []),
                "extra": item.get("extra"),
                "supervised": sum(learnt for _, learnt in flat),
                "prompt_len": 0,
                "digest": len(lines),
            }
        )
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for begin in range(0, len(lines), block_items):
            part = lines[begin : begin + block_items]
            writer.write_batch(pa.RecordBatch.from_pylist(part, SCHEMA))
    return Unit(path, len(items), sum(len(line["input_ids"]) for line in lines), 0)


def write_random_unit(
    path: Path, examples: int, median: int, seed: int, block_examples: int = 5000
) -> Unit:
    """A unit of random tokens, lengths lognormal; half of each example is learnt."""
    random = np.random.default_rng(seed)
    tokens = 0
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        for begin in range(0, examples, block_examples):
            count = min(block_examples, examples - begin)
            lengths = np.clip(random.lognormal(np.log(median), 0.5, count), 2, 2048).astype(int)
            total = int(lengths.sum())
            tokens += total
            within = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            mask = (within > np.repeat(lengths // 2, lengths)).astype(np.uint8)
            offsets = pa.array([0, *itertools.accumulate(lengths.tolist())], pa.int32())
            ids = random.integers(0, 49152, total, dtype=np.int32)
            learnt = np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int32)
            columns = [
                pa.ListArray.from_arrays(offsets, pa.array(ids)),
                pa.ListArray.from_arrays(offsets, pa.array(mask)),
                pa.ListArray.from_arrays(
                    pa.array(range(count + 1), pa.int32()), pa.array(lengths, pa.int32())
                ),
                pa.array([[]] * count, pa.list_(pa.uint8())),
                pa.nulls(count, pa.string()),
                pa.array(learnt),
                pa.array(lengths // 2, pa.int32()),
                pa.array(random.integers(0, 2**63, count).astype(np.uint64)),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    return Unit(path, examples, tokens, 0)

"""How fast packed rows come back: groups in order, rows at random, and the loader training uses.

    python tests/bench/prepare_read.py [--tokens 34000000] [--workers 1] [--text FILE.jsonl ...]

Tokens are those of the given texts (JSON lines), again and again in another order, or, without any,
drawn with the frequencies of words (Zipf), so that they compress about as text does. Prints a table
of formats of storage (size against speed) and one of ways to read what `write_split` wrote; "GPUs
fed" is against 70 000 tokens/s, what a model of 1e9 parameters takes of them on one H100.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from regrow.tasks.modeling.rows import SCHEMA, PackedRows
from regrow.tasks.train.loader import TOKENS, MicroBatches, make_loader
from regrow.tasks.train.order import DataOrder, Split

ROW, GROUP = 2048, 64
GPU_TOKENS_PER_SECOND = 70_000


def tokens_of(texts: list[Path], wanted: int) -> np.ndarray:
    """int32 [wanted]."""
    random = np.random.default_rng(0)
    if not texts:
        return (random.zipf(1.2, wanted) % 49152).astype(np.int32)
    from tokenizers import Tokenizer

    root = Path(__file__).parents[2] / ".regrow/models/SmolLM2-135M-Instruct/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(root))
    rows = [json.loads(line) for path in texts for line in path.open()]
    lines = [" ".join(str(value) for value in row.values()) for row in rows]
    known = [np.array(e.ids, np.int32) for e in tokenizer.encode_batch_fast(lines)]
    parts, total = [], 0
    while total < wanted:
        parts += [known[i] for i in random.permutation(len(known))]
        total += sum(map(len, known))
    return np.concatenate(parts)[:wanted]


def groups(tokens: np.ndarray) -> list[pa.RecordBatch]:
    """Rows of `ROW` tokens, `GROUP` of them in a batch."""
    size = ROW * GROUP
    offsets = pa.array(np.arange(0, size + 1, ROW).astype(np.int32))
    each = pa.array(np.arange(GROUP + 1).astype(np.int32))
    mask = pa.array((np.arange(size) // 60 % 2 * (np.arange(size) % ROW > 0)).astype(np.uint8))
    lens = pa.ListArray.from_arrays(each, pa.array(np.full(GROUP, ROW, np.int32)))
    return [
        pa.RecordBatch.from_arrays(
            [
                pa.ListArray.from_arrays(offsets, pa.array(tokens[at : at + size])),
                pa.ListArray.from_arrays(offsets, mask),
                lens,
            ],
            schema=SCHEMA,
        )
        for at in range(0, len(tokens) - size + 1, size)
    ]


def write(root: Path, batches: list[pa.RecordBatch], codec: pa.Codec | str | None) -> int:
    """An artifact of one shard; returns its bytes."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    path = root / "train" / "shard-00000.arrow"
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_file(str(path), SCHEMA, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    rows = len(batches) * GROUP
    split = {
        "shards": [{"file": "train/shard-00000.arrow", "rows": rows}],
        "rows": rows,
        "examples": rows,
        "tokens": rows * ROW,
        "supervised_tokens": 0,
    }
    (root / "index.json").write_text(json.dumps({"kind": "sft", "splits": {"train": split}}))
    return path.stat().st_size


def best_of(times: int, work: Callable[[], object]) -> float:
    """The least seconds that `work` took."""
    return min(_timed(work) for _ in range(times))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_all(root: Path, order: np.ndarray) -> None:
    """Every row once, each of its tokens touched."""
    rows = PackedRows(root, "train")
    for index in order.tolist():
        row = rows[index]
        assert int(row.input_ids.max()) >= 0
        assert len(row.loss_mask)


def load_all(root: Path, workers: int, micro: int) -> int:
    """Tokens of one epoch of the loader that training uses."""
    rows = PackedRows(root, "train")
    order = DataOrder(len(rows), micro, seed=0)
    split = Split(world_size=1, micro_batch_size=micro, accumulation=1)
    batches = MicroBatches(rows, order, split, 0, order.steps_per_epoch, None)
    return sum(int(batch[TOKENS]) for batch in make_loader(batches, workers, False))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=34_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    batches = groups(tokens_of(given.text, given.tokens))
    tokens = len(batches) * GROUP * ROW
    print(f"{tokens:,} tokens in rows of {ROW}, {GROUP} rows a group\n")
    print("| stored as | bytes/token | write GB/s | read in order GB/s |\n|---|---|---|---|")
    codecs = {"lz4": "lz4", "zstd 1": pa.Codec("zstd", 1), "not compressed": None}
    with tempfile.TemporaryDirectory() as scratch:
        roots = {name: Path(scratch) / name for name in codecs}
        rows = np.arange(len(batches) * GROUP)
        for name, codec in codecs.items():
            seconds = _timed(lambda n=name, c=codec: write(roots[n], batches, c))
            size = (roots[name] / "train/shard-00000.arrow").stat().st_size
            read = best_of(3, lambda n=name: read_all(roots[n], rows))
            speeds = " | ".join(f"{tokens * 4 / s / 1e9:.2f}" for s in (seconds, read))
            print(f"| {name} | {size / tokens:.2f} | {speeds} |")
        root = roots["lz4"]
        mixed = np.random.default_rng(0).permutation(rows)
        print("\n| way | M tokens/s | GB/s | GPUs fed |\n|---|---|---|---|")
        ways: dict[str, Callable[[], object]] = {
            "rows in order": lambda: read_all(root, rows),
            "rows at random": lambda: read_all(root, mixed),
            "loader, no worker, 1 row": lambda: load_all(root, 0, 1),
            f"loader, {given.workers} worker(s), 1 row": lambda: load_all(root, given.workers, 1),
            f"loader, {given.workers} worker(s), 8 rows": lambda: load_all(root, given.workers, 8),
        }
        for name, way in ways.items():
            speed = tokens / best_of(2, way)
            fed = speed / GPU_TOKENS_PER_SECOND
            print(f"| {name} | {speed / 1e6:.1f} | {speed * 4 / 1e9:.2f} | {fed:.0f} |")


if __name__ == "__main__":
    main()

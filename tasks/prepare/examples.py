"""The examples of a split as a table over the units' bytes: choosing, cutting and counting them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from regrow.tasks.prepare.ordering import mixed
from regrow.tasks.prepare.units import Unit
from regrow.tasks.stage import StageError


@dataclass(frozen=True)
class Examples:
    """One line for each example (or piece of one); all arrays have the same length."""

    dataset: np.ndarray
    """int32: which of the spec's datasets."""
    block: np.ndarray
    """int32: which of the corpus's blocks."""
    start: np.ndarray
    """int64: first token in the block."""
    length: np.ndarray
    """int32: tokens."""
    supervised: np.ndarray
    """int32: tokens that are learnt."""
    prompt_len: np.ndarray
    """int32: tokens before the answer, 0 when there is none."""
    digest: np.ndarray
    """uint64: of the whole example, also for a piece of one."""

    def __len__(self) -> int:
        return len(self.length)

    def take(self, which: np.ndarray) -> Examples:
        """Those lines (numbers or a boolean mask), in that order."""
        return Examples(*(getattr(self, column.name)[which] for column in fields(self)))

    def place(self, index: int) -> tuple[int, int, int]:
        """(block, start, length): what `Corpus.tokens` takes."""
        return int(self.block[index]), int(self.start[index]), int(self.length[index])

    @property
    def tokens(self) -> int:
        """In all."""
        return int(self.length.sum(dtype=np.int64))

    @property
    def supervised_tokens(self) -> int:
        """In all."""
        return int(self.supervised.sum(dtype=np.int64))


class Corpus:
    """The tokens of some units, mapped from their files.

    Args:
        units: (number of the dataset, unit) in order.
    """

    def __init__(self, units: Sequence[tuple[int, Unit]]) -> None:
        self._blocks: list[tuple[np.ndarray, np.ndarray]] = []
        parts = [
            self._opened(dataset, batch) for dataset, unit in units for batch in _batches(unit)
        ]
        columns = [column.name for column in fields(Examples)]
        self.examples = Examples(
            *(np.concatenate([_NONE[name], *(getattr(p, name) for p in parts)]) for name in columns)
        )
        """All examples, in the order of the sources."""

    def _opened(self, dataset: int, batch: pa.RecordBatch) -> Examples:
        ids = batch.column("input_ids")
        offsets = ids.offsets.to_numpy()
        count = batch.num_rows
        self._blocks.append((ids.values.to_numpy(), batch.column("loss_mask").values.to_numpy()))
        return Examples(
            dataset=np.full(count, dataset, np.int32),
            block=np.full(count, len(self._blocks) - 1, np.int32),
            start=offsets[:-1].astype(np.int64),
            length=np.diff(offsets).astype(np.int32),
            supervised=batch.column("supervised").to_numpy(),
            prompt_len=batch.column("prompt_len").to_numpy(),
            digest=batch.column("digest").to_numpy(),
        )

    def tokens(self, block: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, loss_mask) of an example; of a piece, the first token is not learnt."""
        ids, mask = self._blocks[block]
        return ids[start : start + length], mask[start : start + length]

    def counted(self, examples: Examples, which: np.ndarray) -> Examples:
        """The examples with `supervised` counted anew for those numbers."""
        supervised = examples.supervised.copy()
        for i in which.tolist():
            _, mask = self.tokens(*examples.place(i))
            supervised[i] = mask[1:].sum()
        return replace(examples, supervised=supervised)


_NONE = {
    "dataset": np.empty(0, np.int32),
    "block": np.empty(0, np.int32),
    "start": np.empty(0, np.int64),
    "length": np.empty(0, np.int32),
    "supervised": np.empty(0, np.int32),
    "prompt_len": np.empty(0, np.int32),
    "digest": np.empty(0, np.uint64),
}


def _batches(unit: Unit) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(unit.path)))
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def without_repeats(examples: Examples) -> Examples:
    """The first of each set of equal examples."""
    _, first = np.unique(examples.digest, return_index=True)
    return examples.take(np.sort(first))


def fitted(
    corpus: Corpus, examples: Examples, limit: int, strategy: str, split_datasets: Sequence[int]
) -> tuple[Examples, int]:
    """Examples of at most `limit` tokens, and how many longer ones were dropped.

    Args:
        strategy: drop, truncate, split or raise.
        split_datasets: datasets whose long examples are always split (plain text).

    Raises:
        StageError: when the strategy is raise and an example is longer.
    """
    long = examples.length > limit
    splits = np.isin(examples.dataset, split_datasets) | (strategy == "split")
    if strategy == "raise" and (long & ~splits).any():
        raise StageError(
            f"{int((long & ~splits).sum())} of {len(examples)} examples are longer than "
            f"sequence_len {limit}; the longest has {int(examples.length.max())} tokens. Raise "
            "`sequence_len`, or set `excess_length_strategy` to drop, truncate or split"
        )
    kept = ~long | splits if strategy == "drop" else np.full(len(examples), True)
    pieces, changed = _cut(examples.take(kept), limit, splits[kept])
    return corpus.counted(pieces, changed), int((~kept).sum())


def _cut(examples: Examples, limit: int, splits: np.ndarray) -> tuple[Examples, np.ndarray]:
    """Pieces of at most `limit` tokens (one of each example not split), and which were cut."""
    counts = np.where(splits, -(-examples.length // limit), 1)
    origin = np.repeat(np.arange(len(examples)), counts)
    number = np.arange(len(origin)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = examples.take(origin)
    done = number * limit
    length = np.minimum(pieces.length - done, limit).astype(np.int32)
    changed = np.flatnonzero(length != pieces.length)
    prompt_len = np.where(length != pieces.length, 0, pieces.prompt_len).astype(np.int32)
    start = pieces.start + done
    return replace(pieces, start=start, length=length, prompt_len=prompt_len), changed


def held_back(examples: Examples, size: float, seed: int) -> np.ndarray:
    """Which examples are for validation: bool [examples].

    Chosen by content, so the choice depends neither on the order of the files nor on who reads
    them, and equal examples are never on both sides.

    Args:
        size: below 1 a fraction of the distinct examples (rounded up), else their number.

    Raises:
        StageError: when nothing would be left to train on.
    """
    digests = np.unique(examples.digest)
    # The small amount undoes what the product adds: 0.07 * 100 is 7.000000000000001.
    wanted = int(np.ceil(size * len(digests) - 1e-9)) if size < 1 else int(size)
    if wanted >= len(digests):
        raise StageError(
            f"val_set_size: {size:g} holds back {wanted} of {len(digests)} distinct examples and "
            "leaves none to train on. Lower it"
        )
    scores = mixed(digests, seed)
    chosen = digests[np.argsort(scores, kind="stable")[:wanted]]
    return np.isin(examples.digest, chosen)

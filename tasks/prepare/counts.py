"""What the prepare stage tells of its result: numbers for people, plans and later stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from regrow.tasks.prepare.examples import Examples
from regrow.tasks.prepare.shards import WrittenSplit
from regrow.tasks.prepare.spec import DatasetSpec


def split_counts(written: WrittenSplit, examples: Examples, capacity: int) -> dict[str, Any]:
    """Counts of a split.

    Args:
        capacity: tokens that a row may hold.

    `sequences`: two for each pair; `trained_share`: learnt tokens per token; `fill`: tokens per
    place in `rows * capacity`; `labels`: how often each occurs, where the kind has any;
    histograms: things in [edge, next edge), the last edge included.
    """
    counts = {
        "rows": written.rows,
        "examples": written.examples,
        "sequences": examples.sequences,
        "tokens": written.tokens,
        "supervised_tokens": written.supervised_tokens,
        "trained_share": written.supervised_tokens / written.tokens,
        "fill": written.tokens / (written.rows * capacity),
        "length_histogram": _lengths(examples, capacity),
        "fill_histogram": _fills(written, capacity),
    }
    return counts | ({"labels": written.labels} if written.labels else {})


def _lengths(examples: Examples, capacity: int) -> dict[str, Any]:
    """Sequences by length in tokens, in bins that double."""
    lengths = examples.sequence_lens
    edges = [2**power for power in range(int(lengths.max()).bit_length() + 1)]
    counts, _ = np.histogram(lengths, bins=edges)
    longest = capacity * len(examples) // examples.sequences
    return {"edges": edges, "counts": counts.tolist(), "sequence_len": longest}


def _fills(written: WrittenSplit, capacity: int) -> dict[str, Any]:
    """Rows by the share of their capacity that holds tokens, in twenty equal bins."""
    edges = [step / 20 for step in range(21)]
    counts, _ = np.histogram(written.row_tokens / capacity, bins=edges)
    mean = written.tokens / (written.rows * capacity)
    return {"edges": edges, "counts": counts.tolist(), "mean": mean}


def dataset_counts(
    datasets: Sequence[DatasetSpec], rows: Sequence[int], examples: Examples
) -> list[dict[str, Any]]:
    """Counts of each dataset before anything is dropped; `rows` are those of its files."""
    return [
        {
            "format": dataset.format,
            "files": len(dataset.files),
            "rows": rows[number],
            "examples": int((examples.dataset == number).sum()),
            "tokens": examples.take(examples.dataset == number).tokens,
        }
        for number, dataset in enumerate(datasets)
    ]


def summary(split: str, counts: dict[str, Any]) -> str:
    """The counts of a split in one line."""
    labels = counts.get("labels", {})
    marked = f", {labels.get('1', 0):,} of {sum(labels.values()):,} labels are 1" if labels else ""
    return (
        f"{split}: {counts['examples']:,} examples in {counts['rows']:,} rows, "
        f"{counts['tokens']:,} tokens, {counts['trained_share']:.1%} learnt, "
        f"rows {counts['fill']:.1%} full{marked}"
    )

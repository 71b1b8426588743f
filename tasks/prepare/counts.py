"""What the prepare stage tells of its result: numbers for people, plans and later stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from regrow.tasks.prepare.examples import Examples
from regrow.tasks.prepare.shards import WrittenSplit
from regrow.tasks.prepare.spec import DatasetSpec


def split_counts(written: WrittenSplit, examples: Examples, sequence_len: int) -> dict[str, Any]:
    """Counts of a split.

    `trained_share`: learnt tokens per token; `fill`: tokens per place in `rows * sequence_len`;
    histograms: things in [edge, next edge), the last edge included.
    """
    return {
        "rows": written.rows,
        "examples": written.examples,
        "tokens": written.tokens,
        "supervised_tokens": written.supervised_tokens,
        "trained_share": written.supervised_tokens / written.tokens,
        "fill": written.tokens / (written.rows * sequence_len),
        "length_histogram": _lengths(examples, sequence_len),
        "fill_histogram": _fills(written, sequence_len),
    }


def _lengths(examples: Examples, sequence_len: int) -> dict[str, Any]:
    """Examples by length in tokens, in bins that double."""
    edges = [2**power for power in range(int(examples.length.max()).bit_length() + 1)]
    counts, _ = np.histogram(examples.length, bins=edges)
    return {"edges": edges, "counts": counts.tolist(), "sequence_len": sequence_len}


def _fills(written: WrittenSplit, sequence_len: int) -> dict[str, Any]:
    """Rows by the share of `sequence_len` that holds tokens, in twenty equal bins."""
    edges = [step / 20 for step in range(21)]
    counts, _ = np.histogram(written.row_tokens / sequence_len, bins=edges)
    mean = written.tokens / (written.rows * sequence_len)
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
    return (
        f"{split}: {counts['examples']:,} examples in {counts['rows']:,} rows, "
        f"{counts['tokens']:,} tokens, {counts['trained_share']:.1%} learnt, "
        f"rows {counts['fill']:.1%} full"
    )

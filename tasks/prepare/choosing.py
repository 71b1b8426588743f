"""Which examples are used, and how often: once each, cut to length, held back, by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from regrow.tasks.prepare.examples import Corpus, Examples
from regrow.tasks.prepare.ordering import mixed
from regrow.tasks.stage import StageError


def without_repeats(examples: Examples) -> Examples:
    """The first of each set of equal examples."""
    order = np.argsort(examples.digest, kind="stable")
    kept = np.full(len(examples), True)
    ordered = examples.digest[order]
    kept[order[1:][ordered[1:] == ordered[:-1]]] = False
    return examples.take(kept)


def sampled(examples: Examples, weights: Sequence[float], seed: int) -> Examples:
    """Of each dataset with a weight below 1 that share of its examples, and never none.

    Chosen by content and seed, so the choice does not depend on the order of the files.
    """
    kept = np.full(len(examples), True)
    for dataset, weight in enumerate(weights):
        if weight < 1:
            its = _by_score(examples, dataset, seed)
            kept[its[max(round(weight * len(its)), 1) :]] = False
    return examples.take(kept)


def repeated(examples: Examples, weights: Sequence[float], seed: int) -> Examples:
    """The examples of each dataset as often as its weight above 1 says.

    1.5: all, and half of them, chosen by content and seed, once more, after all others of their
    dataset: equal examples are apart.
    """
    if max(weights, default=1) <= 1:
        return examples
    times = np.ones(len(examples), np.int64)
    for dataset, weight in enumerate(weights):
        if weight > 1:
            its = _by_score(examples, dataset, seed)
            times[its] = int(weight)
            times[its[: round(weight % 1 * len(its))]] += 1
    origin = np.repeat(np.arange(len(examples)), times)
    number = np.arange(len(origin)) - np.repeat(np.cumsum(times) - times, times)
    return examples.take(origin[np.lexsort((origin, number, examples.dataset[origin]))])


def _by_score(examples: Examples, dataset: int, seed: int) -> np.ndarray:
    """The numbers of a dataset's examples in an order that follows from content and seed."""
    its = np.flatnonzero(examples.dataset == dataset)
    # Mixed twice: another order than the one by which examples are held back.
    return its[np.argsort(mixed(mixed(examples.digest[its], seed), seed), kind="stable")]


def part(examples: Examples, number: int, index: int) -> Examples:
    """Part `index` of `number` parts of about equal size; each has some of every dataset."""
    return examples.take(np.arange(index, len(examples), number)) if number > 1 else examples


def seen(examples: Examples, others: Examples) -> np.ndarray:
    """Which examples are among the others too, token for token: bool [examples]."""
    return np.isin(examples.digest, others.digest)


def fitted(
    corpus: Corpus, examples: Examples, limit: int, strategy: str, split_datasets: Sequence[int]
) -> tuple[Examples, int]:
    """Examples whose sequences have at most `limit` tokens, and how many others were dropped.

    Args:
        strategy: drop, truncate, split or raise.
        split_datasets: datasets whose long examples are always split (plain text).

    Raises:
        StageError: when the strategy is raise and an example is longer, or it is split and they
            are pairs.
    """
    long = examples.longest > limit
    pairs = examples.first is not None
    if strategy == "split" and pairs and long.any():
        raise StageError(
            "excess_length_strategy: a preferred and a rejected answer cannot be split; use drop "
            "or truncate"
        )
    splits = np.isin(examples.dataset, split_datasets) | (strategy == "split")
    if strategy == "raise" and (long & ~splits).any():
        raise StageError(
            f"{int((long & ~splits).sum())} of {len(examples)} examples are longer than "
            f"sequence_len {limit}; the longest has {int(examples.longest.max())} tokens. Raise "
            "`sequence_len`, or set `excess_length_strategy` to drop, truncate or split"
        )
    kept = np.full(len(examples), True)
    if strategy == "drop":
        kept = ~long | splits
    elif pairs:  # where the prompt alone is too long nothing is left of either answer
        kept = ~long | (examples.prompt_len < limit)
    cut = _cut_pairs if pairs else _cut
    pieces, changed = cut(examples.take(kept), limit, splits[kept])
    return corpus.counted(pieces, changed), int((~kept).sum())


def _cut(examples: Examples, limit: int, splits: np.ndarray) -> tuple[Examples, np.ndarray]:
    """Pieces of at most `limit` tokens (one of each example not split), and which were cut."""
    if not (examples.length > limit).any():
        return examples, np.empty(0, np.int64)
    counts = np.where(splits, -(-examples.length // limit), 1)
    origin = np.repeat(np.arange(len(examples)), counts)
    number = np.arange(len(origin)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = examples.take(origin)
    done = (number * limit).astype(np.int32)
    length = np.minimum(pieces.length - done, limit).astype(np.int32)
    changed = np.flatnonzero(length != pieces.length)
    prompt_len = np.where(length != pieces.length, 0, pieces.prompt_len).astype(np.int32)
    start = pieces.start + done
    return replace(pieces, start=start, length=length, prompt_len=prompt_len), changed


def _cut_pairs(examples: Examples, limit: int, _splits: np.ndarray) -> tuple[Examples, np.ndarray]:
    """Both sequences cut to `limit` tokens, and which pairs were cut."""
    assert examples.first is not None
    first = np.minimum(examples.first, limit)
    length = (first + np.minimum(examples.length - examples.first, limit)).astype(np.int32)
    return replace(examples, first=first, length=length), np.flatnonzero(length != examples.length)


def held_back(examples: Examples, size: float, seed: int) -> np.ndarray:
    """Which examples are for validation: bool [examples].

    Chosen by content, so the choice depends neither on the order of the files nor on who reads
    them, and equal examples are never on both sides.

    Args:
        size: below 1 a fraction of the distinct examples (rounded up), else their number.

    Raises:
        StageError: when nothing would be left to train on.
    """
    scores = mixed(examples.digest, seed)  # equal for equal examples, and for no others
    ordered = np.sort(scores)
    distinct = ordered[np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))]
    # The small amount undoes what the product adds: 0.07 * 100 is 7.000000000000001.
    wanted = int(np.ceil(size * len(distinct) - 1e-9)) if size < 1 else int(size)
    if wanted >= len(distinct):
        raise StageError(
            f"val_set_size: {size:g} holds back {wanted} of {len(distinct)} distinct examples and "
            "leaves none to train on. Lower it"
        )
    return scores < distinct[wanted]

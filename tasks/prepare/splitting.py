"""From tokenized datasets to the examples of each split, with what was dropped and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from regrow.tasks.prepare.choosing import (
    fitted,
    held_back,
    part,
    repeated,
    sampled,
    seen,
    without_repeats,
)
from regrow.tasks.prepare.examples import Corpus, Examples
from regrow.tasks.prepare.spec import DatasetSpec, PrepareSpec
from regrow.tasks.stage import StageError

Dropped = dict[str, int]
"""Reason -> number of examples."""

Splits = dict[str, tuple[Corpus, Examples]]
"""The examples of each split, and the corpus that they are in."""


@dataclass(frozen=True)
class Tokenized:
    """The examples of some datasets, before anything is dropped."""

    datasets: tuple[DatasetSpec, ...]
    corpus: Corpus
    rows: list[int]
    """Source rows of each dataset."""
    unended: int
    refused: Counter[str]
    """Why rows were dropped as they were read -> how many."""


def split(spec: PrepareSpec, train: Tokenized, test: Tokenized) -> tuple[Splits, Dropped]:
    """The examples to train on and, where the spec has any, to validate on.

    Validation is the same whatever the training examples' weights above 1, and holds none of them.

    Raises:
        StageError: when nothing is left, or the spec forbids what was found.
    """
    pool, dropped = _chosen(spec, train, _train_weights(spec), spec.shard_num, spec.shard_idx)
    kept = _usable(spec, train, pool, spec.sequence_len, "datasets", dropped)
    splits: Splits = {}
    if spec.test_datasets:
        weights = [dataset.weight for dataset in spec.test_datasets]
        its_pool, its_dropped = _chosen(spec, test, weights)
        length = spec.eval_sequence_len
        held = _usable(spec, test, its_pool, length, "test_datasets", its_dropped)
        for why, number in its_dropped.items():
            dropped[why] += number
        kept = _without_leaked(spec, kept, held, dropped)
        splits["validation"] = (test.corpus, held)
    elif spec.val_set_size:
        chosen = held_back(kept, spec.val_set_size, spec.seed)
        kept, held = kept.take(~chosen), kept.take(chosen)
        if spec.eval_sequence_len != spec.sequence_len:
            again = pool.take(seen(pool, held))
            held = _usable(spec, train, again, spec.eval_sequence_len, "val_set_size", dropped)
        splits["validation"] = (train.corpus, held)
    if spec.stream_rows is None:
        kept = repeated(kept, [dataset.weight for dataset in spec.datasets], spec.seed)
    return {"train": (train.corpus, kept), **splits}, dropped


def _train_weights(spec: PrepareSpec) -> list[float]:
    """Of a stream a weight is a share of what is read, and all of that is used."""
    streams = spec.stream_rows is not None
    return [1 if streams else dataset.weight for dataset in spec.datasets]


def _chosen(
    spec: PrepareSpec, tokenized: Tokenized, weights: list[float], parts: int = 1, index: int = 0
) -> tuple[Examples, Dropped]:
    """The examples that are wanted, whatever their length, and how many are not."""
    examples = tokenized.corpus.examples
    unique = without_repeats(examples) if spec.deduplicate else examples
    wanted = part(sampled(unique, weights, spec.seed), parts, index)
    dropped = {
        "refused": tokenized.refused.total(),
        "repeated": len(examples) - len(unique),
        "not_wanted": len(unique) - len(wanted),
    }
    return wanted, dropped | dict.fromkeys(("too_short", "too_long", "nothing_learnt", "leaked"), 0)


def _usable(
    spec: PrepareSpec,
    tokenized: Tokenized,
    pool: Examples,
    limit: int,
    key: str,
    dropped: Dropped,
) -> Examples:
    """The examples (or pieces of them) that can be used; adds to `dropped` those that cannot.

    Args:
        limit: longest sequence in tokens.
        key: where they come from in the recipe, for errors.
    """
    if not len(pool) and tokenized.refused:
        (why, _), *_ = tokenized.refused.most_common(1)
        raise StageError(f"{key}: all {tokenized.refused.total()} rows are refused: {why}")
    if not len(pool) and dropped["not_wanted"]:
        raise StageError(
            f"dataset_shard_num: part {spec.shard_idx} of {spec.shard_num} is empty: there are "
            f"{dropped['not_wanted']} examples in all. Lower it"
        )
    if not len(pool):
        raise StageError(f"{key}: there are no rows in the files: every line is blank")
    enough = pool.take(pool.length >= spec.min_sample_len)
    plain = [i for i, dataset in enumerate(tokenized.datasets) if dataset.format == "completion"]
    fit, too_long = fitted(tokenized.corpus, enough, limit, spec.excess_length_strategy, plain)
    # Prompts are answered in training; there is nothing in them to learn.
    usable = fit if spec.kind == "prompts" else fit.take(fit.supervised > 0)
    found = {
        "too_short": len(pool) - len(enough),
        "too_long": too_long,
        "nothing_learnt": len(fit) - len(usable),
    }
    if not len(usable):
        raise StageError(_nothing_left(pool, limit, found, key))
    for why, number in found.items():
        dropped[why] += number
    return usable


def _nothing_left(examples: Examples, limit: int, dropped: Dropped, key: str) -> str:
    return (
        f"{key}: none of {len(examples)} examples can be trained on. {dropped['too_long']} are "
        f"longer than sequence_len {limit} (the shortest of all has "
        f"{int(examples.longest.min())} tokens, the longest {int(examples.longest.max())}): raise "
        "`sequence_len` or set `excess_length_strategy: truncate`. "
        f"{dropped['nothing_learnt']} hold nothing to learn: check `roles_to_train`, `roles` and "
        f"the columns. {dropped['too_short']} are shorter than `min_sample_len`"
    )


def _without_leaked(
    spec: PrepareSpec, kept: Examples, held: Examples, dropped: Dropped
) -> Examples:
    """Training examples without those that validation has too; counted in any case."""
    leaked = seen(kept, held)
    dropped["leaked"] = int(leaked.sum())
    if spec.leakage == "keep" or not leaked.any():
        return kept
    told = f"{dropped['leaked']} of {len(kept)} training examples are in test_datasets too"
    if spec.leakage == "error":
        raise StageError(f"validation_leakage: {told}. Use other files, or set it to drop")
    if leaked.all():
        raise StageError(
            f"test_datasets: {told}, and none would be left to train on. Use other files; or set "
            "`validation_leakage: keep`, if the validation loss need not be of unseen examples"
        )
    return kept.take(~np.asarray(leaked))

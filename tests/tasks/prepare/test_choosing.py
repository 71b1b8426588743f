"""What is chosen, cut, repeated and held back: nothing lost, nothing twice that was not asked."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.tasks.prepare.choosing import (
    fitted,
    held_back,
    part,
    repeated,
    sampled,
    seen,
    without_repeats,
)
from regrow.tasks.prepare.examples import Examples
from regrow.tasks.stage import StageError


class AllLearnt:
    """A corpus in which every token but the first of a piece is learnt."""

    def counted(self, examples, which):
        supervised = examples.supervised.copy()
        supervised[which] = examples.length[which] - 1
        return replace(examples, supervised=supervised)


def examples(lengths, dataset=None, digests=None, prompts=0, first=None) -> Examples:
    lengths = np.array(lengths, np.int32)
    count = len(lengths)
    starts = (np.cumsum(lengths) - lengths).astype(np.int32)
    return Examples(
        dataset=np.zeros(count, np.int16) if dataset is None else np.array(dataset, np.int16),
        block=np.zeros(count, np.int32),
        item=np.arange(count, dtype=np.int32),
        start=starts,
        length=lengths,
        supervised=lengths - 1,
        prompt_len=np.full(count, prompts, np.int32),
        digest=np.array(range(1, count + 1) if digests is None else digests, np.uint64),
        first=None if first is None else np.array(first, np.int32),
        second_start=None if first is None else starts + np.array(first, np.int32),
    )


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 100))
def test_split_examples_cover_every_token_once(lengths, limit):
    found, dropped = fitted(AllLearnt(), examples(lengths), limit, "split", [])
    assert dropped == 0
    assert found.length.max() <= limit
    places = [
        place
        for start, length in zip(found.start, found.length, strict=True)
        for place in range(start, start + length)
    ]
    assert places == list(range(sum(lengths)))
    assert (found.supervised == found.length - 1).all()


@given(LENGTHS, st.integers(1, 100))
def test_truncated_examples_keep_their_beginning(lengths, limit):
    before = examples(lengths)
    found, dropped = fitted(AllLearnt(), before, limit, "truncate", [])
    assert dropped == 0
    assert found.start.tolist() == before.start.tolist()
    assert found.length.tolist() == [min(length, limit) for length in lengths]


@given(LENGTHS, st.integers(1, 100))
def test_dropped_examples_are_the_long_ones_and_are_counted(lengths, limit):
    found, dropped = fitted(AllLearnt(), examples(lengths), limit, "drop", [])
    assert found.length.tolist() == [length for length in lengths if length <= limit]
    assert dropped == sum(length > limit for length in lengths)


@given(LENGTHS, st.integers(1, 100))
def test_plain_text_is_split_whatever_happens_to_others(lengths, limit):
    both = examples(lengths * 2, dataset=[0] * len(lengths) + [1] * len(lengths))
    found, _ = fitted(AllLearnt(), both, limit, "drop", [1])
    assert found.take(found.dataset == 1).tokens == sum(lengths)
    assert found.take(found.dataset == 0).length.max(initial=0) <= limit


def test_raise_names_the_longest():
    with pytest.raises(StageError, match=r"2 of 3 examples are longer than sequence_len 5; .* 9 "):
        fitted(AllLearnt(), examples([9, 5, 7]), 5, "raise", [])


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1), st.integers(1, 50))
def test_cut_pairs_keep_the_beginning_of_both_answers(lengths, limit):
    pairs = examples([a + b for a, b in lengths], first=[a for a, _ in lengths], prompts=1)
    found, dropped = fitted(AllLearnt(), pairs, limit, "truncate", [])
    kept = [its for its in lengths if max(its) <= limit or limit > 1]
    assert found.sequence_lens.tolist() == [min(n, limit) for its in kept for n in its]
    assert dropped == len(lengths) - len(kept)
    whole, dropped = fitted(AllLearnt(), pairs, limit, "drop", [])
    assert len(whole) == sum(max(its) <= limit for its in lengths) == len(lengths) - dropped


WEIGHTS = st.lists(st.floats(0.01, 4), min_size=1, max_size=4)


@given(WEIGHTS, st.integers(1, 50), st.integers(0, 9))
def test_a_dataset_gives_its_weight_times_its_examples(weights, count, seed):
    whole = examples([3] * (count * len(weights)), dataset=np.repeat(range(len(weights)), count))
    found = repeated(sampled(whole, weights, seed), weights, seed)
    for dataset, weight in enumerate(weights):
        its = found.take(found.dataset == dataset)
        assert abs(len(its) - max(1, weight * count)) <= 0.5 + 1e-6
        times = set(Counter(its.digest.tolist()).values())
        assert max(times) - min(times) <= 1
        assert weight >= 1 or times == {1}


def test_repeats_stand_apart():
    found = repeated(examples([1] * 6, dataset=[0, 0, 0, 1, 1, 1]), [2, 1], 0)
    assert found.digest.tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6]


@given(st.integers(1, 60), st.integers(1, 7))
def test_parts_cover_all_examples_once(count, number):
    whole = examples([1] * count)
    parts = [part(whole, number, index).digest.tolist() for index in range(number)]
    assert sorted(digest for its in parts for digest in its) == whole.digest.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.lists(st.integers(1, 9), min_size=1))
def test_the_first_of_equal_examples_is_kept(digests):
    whole = examples(range(1, len(digests) + 1), digests=digests)
    found = without_repeats(whole)
    assert found.digest.tolist() == list(dict.fromkeys(digests))
    assert seen(whole, found).all()


@given(st.lists(st.integers(1, 30), min_size=4), st.integers(1, 3), st.integers(0, 5))
def test_equal_examples_are_held_back_together(digests, size, seed):
    whole = examples([1] * len(digests), digests=digests)
    if size >= len(set(digests)):
        with pytest.raises(StageError, match="leaves none to train on"):
            held_back(whole, size, seed)
        return
    chosen = held_back(whole, size, seed)
    held = set(whole.digest[chosen].tolist())
    assert len(held) == size
    assert not held & set(whole.digest[~chosen].tolist())


def test_what_a_weight_leaves_out_is_not_what_validation_holds_back():
    """Both choose by content and seed, and must not choose the same."""
    whole = examples([1] * 1000)
    left_out = ~seen(whole, sampled(whole, [0.5], 0))
    held = held_back(whole, 0.5, 0)
    assert 0.4 < (left_out & held).sum() / held.sum() < 0.6

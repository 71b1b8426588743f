"""Every example lies whole in exactly one row, and hardly any room is left."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.tasks.prepare import packing
from regrow.tasks.prepare.ordering import mixed, shuffled
from regrow.tasks.prepare.packing import (
    best_fit_decreasing,
    exactly_closed,
    in_order,
    one_each,
    pack,
    row_sizes,
)


def check_packs(packs, lengths, capacity):
    assert sorted(packs.items.tolist()) == list(range(len(lengths)))
    assert packs.offsets[0] == 0
    assert packs.offsets[-1] == len(lengths)
    for row in range(len(packs)):
        items = packs.row(row)
        assert len(items)
        assert lengths[items].sum() <= capacity
        assert (np.diff(items) > 0).all()


@settings(deadline=None)
@given(st.integers(1, 64).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_every_item_is_in_one_row_that_holds_it(drawn):
    capacity, lengths = drawn[0], np.array(drawn[1], np.int32)
    check_packs(pack(lengths, capacity), lengths, capacity)


@settings(deadline=None)
@given(st.integers(1, 64).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_rows_in_order_are_closed_only_when_the_next_does_not_fit(drawn):
    capacity, lengths = drawn[0], np.array(drawn[1], np.int32)
    packs = in_order(lengths, capacity)
    check_packs(packs, lengths, capacity)
    assert packs.items.tolist() == list(range(len(lengths)))
    for row in range(len(packs) - 1):
        assert lengths[packs.row(row)].sum() + lengths[packs.offsets[row + 1]] > capacity


def test_sizes_of_rows_are_sums_over_their_items(monkeypatch):
    monkeypatch.setattr(packing, "_ROWS_AT_ONCE", 2)
    pairs = np.random.default_rng(0).integers(1, 9, (50, 2))
    packs = pack(pairs.sum(axis=1), 20)
    sizes = row_sizes(pairs, packs)
    for row in range(len(packs)):
        its = pairs[packs.row(row)]
        assert sizes[row].tolist() == [its.sum(), (its**2).sum()]
    assert row_sizes(pairs[:, 0], one_each(50)).tolist() == [[n, n * n] for n in pairs[:, 0]]


@settings(deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1))
    )
)
def test_both_ways_keep_within_the_row(drawn):
    capacity, lengths = drawn[0], np.array(drawn[1], np.int32)
    for way in (best_fit_decreasing, exactly_closed):
        row_of = way(lengths, capacity)
        assert np.bincount(row_of, weights=lengths).max() <= capacity
        assert set(row_of.tolist()) == set(range(row_of.max() + 1))


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_decreasing_is_what_one_by_one_would_give(lengths):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 20) - length)
    row_of = best_fit_decreasing(np.array(lengths), 20)
    used = np.bincount(row_of, weights=lengths).astype(int)
    assert sorted(20 - used) == sorted(rooms)


@pytest.mark.parametrize(
    ("capacity", "least"), [(2048, 0.995), (8192, 0.995), (32768, 0.995), (131072, 0.99)]
)
def test_rows_are_full_for_usual_lengths(capacity, least):
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1, 50_000).astype(int) + 1
    lengths = lengths[lengths <= capacity]
    assert lengths.sum() / (len(pack(lengths, capacity)) * capacity) >= least


def test_rows_are_full_for_lengths_that_are_alike():
    lengths = np.random.default_rng(0).integers(300, 700, 20_000)
    assert lengths.sum() / (len(pack(lengths, 2048)) * 2048) >= 0.98


def test_a_million_examples_take_seconds():
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1, 1_000_000).astype(int) + 1
    begin = time.process_time()
    packs = pack(lengths[lengths <= 2048], 2048)
    assert time.process_time() - begin < 20
    assert len(packs) > 0


def test_packing_depends_on_lengths_alone():
    lengths = np.random.default_rng(1).integers(1, 500, 5000)
    first, second = pack(lengths, 1024), pack(lengths.copy(), 1024)
    assert first.items.tolist() == second.items.tolist()


def test_first_items_are_the_lowest_of_each_row():
    packs = pack(np.array([5, 5, 6, 4]), 10)
    assert packs.first_items().tolist() == [packs.row(i).min() for i in range(len(packs))]
    assert one_each(0).first_items().tolist() == []


def test_order_is_a_permutation_and_pinned():
    assert sorted(shuffled(1000, 7).tolist()) == list(range(1000))
    assert shuffled(8, 42).tolist() == SHUFFLED
    assert shuffled(8, 43).tolist() != SHUFFLED
    assert mixed(np.array([0, 1]), 0).tolist() == MIXED


SHUFFLED = [7, 4, 0, 2, 6, 5, 1, 3]
MIXED = [12035550249420947055, 627405149472732430]

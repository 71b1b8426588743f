"""Every split of a step over ranks and micro-batches reads the same rows, each once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from accelerate import skip_first_batches
from hypothesis import given
from hypothesis import strategies as st

from regrow.tasks.modeling.row_sizes import costs
from regrow.tasks.prepare.packing import pack, row_sizes
from regrow.tasks.train.loader import SUPERVISED, TOKENS, FileOrder, MicroBatches, make_loader
from regrow.tasks.train.order import DataOrder, Split, choose_split
from regrow.tasks.train.schedule import Cadence, total_steps, warmup_steps

ORDERS = st.builds(
    DataOrder,
    num_rows=st.integers(1, 60),
    global_batch_size=st.integers(1, 16),
    seed=st.integers(0, 2**31),
)


@given(ORDERS, st.integers(0, 3))
def test_an_epoch_reads_every_row_once(order, epoch):
    first = epoch * order.steps_per_epoch
    steps = [order.rows(step) for step in range(first, first + order.steps_per_epoch)]
    assert all(len(rows) == order.global_batch_size for rows in steps[:-1])
    assert sorted(np.concatenate(steps).tolist()) == list(range(order.num_rows))


@given(ORDERS, st.integers(0, 20), st.integers(1, 8), st.integers(1, 8))
def test_any_split_covers_the_rows_of_a_step_once(order, step, world_size, micro_batch_size):
    split = choose_split(order.global_batch_size, micro_batch_size, world_size)
    assert split.micro_batch_size <= micro_batch_size
    rows = order.rows(step)
    parts = [
        split.rows(rows, rank, micro)
        for rank in range(world_size)
        for micro in range(split.accumulation)
    ]
    assert all(len(part) <= split.micro_batch_size for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == sorted(rows.tolist())


COSTS = st.lists(st.floats(0, 1e6), min_size=60, max_size=60).map(np.array)


@given(ORDERS, st.integers(0, 20), st.integers(1, 8), st.integers(1, 8), COSTS)
def test_balancing_moves_rows_between_ranks_and_out_of_no_step(order, step, world, micro, costs):
    split = choose_split(order.global_batch_size, micro, world, costs)
    plain = choose_split(order.global_batch_size, micro, world)
    rows = order.rows(step)
    parts = {
        (r, m): split.rows(rows, r, m) for r in range(world) for m in range(split.accumulation)
    }
    assert all(len(part) <= split.micro_batch_size for part in parts.values())
    assert sorted(np.concatenate(list(parts.values())).tolist()) == sorted(rows.tolist())
    for number in range(split.accumulation):  # no more ranks are idle than without costs
        rows_now = sum(len(parts[rank, number]) for rank in range(world))
        assert rows_now == sum(len(plain.rows(rows, rank, number)) for rank in range(world))
    again = {place: split.rows(rows, *place) for place in parts}
    assert all(parts[place].tolist() == again[place].tolist() for place in parts)


def test_ranks_wait_less_for_each_other_with_costs():
    """Rows of 32768 tokens packed from lognormal lengths, 8 ranks: the slowest against the mean."""
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1.5, 100_000).astype(int) + 1
    lengths = lengths[lengths <= 32768]
    packs = pack(lengths, 32768)
    work = costs(row_sizes(lengths, packs), hidden_size=4096)
    order = DataOrder(len(packs), 64, seed=0)

    def waiting(split):
        found = []
        for step in range(order.steps_per_epoch - 1):
            rows = order.rows(step)
            for micro in range(split.accumulation):
                each = [work[split.rows(rows, rank, micro)].sum() for rank in range(8)]
                found.append(max(each) / np.mean(each))
        return np.mean(found)

    assert waiting(choose_split(64, 1, 8)) > 1.15
    assert waiting(choose_split(64, 1, 8, work)) < 1.05
    assert waiting(choose_split(64, 2, 8, work)) < 1.05


def test_one_rank_keeps_the_order_of_the_step():
    costs = np.arange(60.0)
    rows = DataOrder(60, 8, 0).rows(3)
    split = choose_split(8, 2, 1, costs)
    assert np.concatenate([split.rows(rows, 0, m) for m in range(4)]).tolist() == rows.tolist()


def test_work_grows_with_the_square_of_the_length():
    sizes = np.array([[4096, 4096**2], [4096, 8 * 512**2]])
    one_long, many_short = costs(sizes, hidden_size=64)
    assert one_long > 3 * many_short
    assert costs(np.array([[100, 10_000]]), hidden_size=10**9)[0] == pytest.approx(100)


@given(ORDERS, st.integers(0, 3), st.integers(0, 99))
def test_an_epoch_by_length_reads_every_row_once(order, epoch, seed):
    lengths = np.random.default_rng(seed).integers(1, 999, order.num_rows)
    grouped = replace(order, kind="by_length", lengths=lengths)
    first = epoch * order.steps_per_epoch
    steps = [grouped.rows(step) for step in range(first, first + order.steps_per_epoch)]
    assert [len(rows) for rows in steps] == [
        len(order.rows(step)) for step in range(first, first + order.steps_per_epoch)
    ]
    assert sorted(np.concatenate(steps).tolist()) == list(range(order.num_rows))


def test_rows_of_a_step_by_length_are_alike_and_differ_in_each_epoch():
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    order = DataOrder(4000, 16, 0, "by_length", lengths)
    spreads = [np.ptp(lengths[order.rows(step)]) for step in range(order.steps_per_epoch)]
    assert np.mean(spreads) < 50  # of 1000; 880 without
    means = [lengths[order.rows(step)].mean() for step in range(order.steps_per_epoch)]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2  # long ones not first
    following = [order.rows(order.steps_per_epoch + step) for step in range(3)]
    assert all(set(rows) != set(order.rows(step)) for step, rows in enumerate(following))


def test_stored_order_is_that_of_the_files_in_every_epoch():
    order = DataOrder(5, 2, 0, "stored")
    assert [order.rows(step).tolist() for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_epochs_and_seeds_differ():
    order = DataOrder(100, 100, seed=1)
    assert order.rows(0).tolist() != order.rows(1).tolist()
    assert order.rows(0).tolist() != DataOrder(100, 100, seed=2).rows(0).tolist()


def test_the_order_is_the_same_on_every_machine_for_ever():
    """Golden: a change here changes every trained model. Raise VERSION of train with it."""
    order = DataOrder(10, 4, seed=42)
    assert [order.rows(step).tolist() for step in range(6)] == GOLDEN


GOLDEN = [[5, 0, 6, 4], [2, 7, 3, 1], [8, 9], [3, 1, 2, 9], [5, 0, 6, 8], [7, 4]]


@pytest.mark.parametrize(
    ("global_batch", "micro", "world", "split"),
    [
        (8, 2, 1, Split(1, 2, 4)),
        (8, 2, 2, Split(2, 2, 2)),
        (8, 3, 1, Split(1, 2, 4)),
        (6, 4, 2, Split(2, 3, 1)),
        (2, 16, 1, Split(1, 2, 1)),
        (3, 2, 2, Split(2, 1, 2)),  # one rank runs a dummy
        (1, 1, 4, Split(4, 1, 1)),
    ],
)
def test_the_largest_micro_batch_that_divides_is_chosen(global_batch, micro, world, split):
    assert choose_split(global_batch, micro, world) == split


class Recording:
    """Rows that remember which of them were read."""

    def __init__(self, make_row, count):
        self.read, self._row, self._count = [], make_row, count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        self.read.append(index)
        return self._row(index)


class OneExample:
    def __init__(self, index):
        self.input_ids = np.full(4, index, np.int32)
        self.loss_mask = np.array([0, 1, 1, 0], np.uint8)
        self.seq_lens = np.array([4], np.int32)


def test_skipped_steps_are_not_read_and_the_rest_is_as_it_would_have_been():
    order, split = DataOrder(21, 4, seed=0), Split(1, 2, 2)
    whole, rest = Recording(OneExample, 21), Recording(OneExample, 21)
    all_of_it = list(make_loader(MicroBatches(whole, order, split, 0, 12, None), 0, False))
    loader = make_loader(MicroBatches(rest, order, split, 0, 12, None), 0, False)
    resumed = list(skip_first_batches(loader, 7 * 2))
    assert len(all_of_it) == 24
    assert [b["input_ids"].tolist() for b in resumed] == [
        b["input_ids"].tolist() for b in all_of_it[14:]
    ]
    assert rest.read == np.concatenate([order.rows(step) for step in range(7, 12)]).tolist()


def test_ranks_without_rows_get_a_batch_without_labels():
    order = DataOrder(5, 4, seed=0)  # step 1 holds one row, for rank 0
    for rank, tokens in ((0, 4), (1, 0)):
        rows = Recording(OneExample, 5)
        batches = MicroBatches(rows, order, Split(2, 2, 1), rank, 2, None)
        batch = batches[1]
        assert (batch[TOKENS], batch[SUPERVISED]) == (tokens, tokens // 2)
        assert (batch["labels"] != -100).sum() == tokens // 2


@given(st.integers(1, 40), st.integers(1, 9))
def test_a_validation_reads_every_row_once_in_order(num_rows, per_step):
    order = FileOrder(num_rows, per_step)
    read = np.concatenate([order.rows(step) for step in range(order.steps)])
    assert read.tolist() == list(range(num_rows))


def test_a_loader_leaves_the_global_random_state_alone():
    import torch

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    batches = MicroBatches(Recording(OneExample, 5), DataOrder(5, 2, 0), Split(1, 2, 1), 0, 3, None)
    list(make_loader(batches, 0, False))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("cadence", "due"),
    [
        (Cadence(), []),
        (Cadence(steps=4), [4, 8, 12]),
        (Cadence(steps=0.25), [4, 8, 12]),
        (Cadence(steps=100), []),
        (Cadence(per_epoch=1), [5, 10]),
        (Cadence(per_epoch=2), [2, 5, 8, 10, 12]),
        (Cadence(per_epoch=100), list(range(1, 14))),
        (Cadence(per_epoch=0), []),
    ],
)
def test_what_is_due_when(cadence, due):
    assert sorted(cadence.due(total_steps=13, steps_per_epoch=5)) == due


def test_steps_follow_from_epochs_unless_given():
    assert total_steps(5, 2.5, None) == 13
    assert total_steps(5, 2.5, 7) == 7
    assert total_steps(5, 0.01, None) == 1
    assert warmup_steps(100, 7, 0.5) == 7
    assert warmup_steps(100, 0, 0.5) == 0
    assert warmup_steps(100, None, 0.031) == 4
    assert warmup_steps(100, None, None) == 0

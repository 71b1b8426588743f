"""Every split of a step over ranks and micro-batches reads the same rows, each once."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate import skip_first_batches
from hypothesis import given
from hypothesis import strategies as st

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

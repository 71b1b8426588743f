"""A flattened batch holds the rows' tokens, labels and borders, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from regrow.tasks.modeling.batches import flatten, rows_to_learn


def row(ids, mask, lengths):
    return SimpleNamespace(
        input_ids=np.array(ids, np.int32),
        loss_mask=np.array(mask, np.uint8),
        seq_lens=np.array(lengths, np.int32),
    )


ROWS = [row([5, 6, 7, 8, 9], [0, 1, 1, 0, 1], [3, 2]), row([4, 3], [0, 1], [2])]


def test_positions_restart_and_labels_follow_the_mask():
    batch = flatten(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 7]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)


def test_padding_is_one_more_segment_without_labels():
    batch = flatten(ROWS, pad_to=12, pad_token_id=1)
    assert batch["input_ids"].shape == (1, 12)
    assert batch["input_ids"][0, 7:].tolist() == [1] * 5
    assert (batch["labels"][0, 7:] == -100).all()
    assert batch["position_ids"][0, 7:].tolist() == [0, 1, 2, 3, 4]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 12]
    assert batch["max_length_q"] == 5


@pytest.mark.parametrize("pad_to", [None, 16])
def test_no_rows_make_a_batch_without_labels(pad_to):
    batch = flatten([], pad_to)
    assert batch["input_ids"].numel() == (pad_to or 8)
    assert (batch["labels"] == -100).all()


def test_rows_longer_than_the_padding_are_an_error():
    with pytest.raises(ValueError, match="pad_to=6"):
        flatten(ROWS, pad_to=6)


def test_a_learnt_first_token_is_our_own_bug():
    with pytest.raises(AssertionError, match="predecessor"):
        flatten([row([5, 6], [1, 1], [2])])


def test_a_batch_is_padded_to_a_multiple():
    batch = flatten(ROWS, multiple_of=4)
    assert batch["input_ids"].shape == (1, 8)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 8]
    assert flatten(ROWS, multiple_of=7)["cu_seq_lens_q"].tolist() == [0, 3, 5, 7]
    assert flatten([], multiple_of=64)["input_ids"].shape == (1, 64)
    assert flatten([], multiple_of=6)["input_ids"].shape == (1, 12)


def test_supervised_rows_are_those_before_a_learnt_token():
    batch = flatten(ROWS, multiple_of=4)
    labels = batch["labels"][0]
    assert batch["supervised_rows"].tolist() == [0, 1, 3, 5]
    assert (labels[batch["supervised_rows"] + 1] != -100).all()
    assert flatten([])["supervised_rows"].numel() == 0


@pytest.mark.parametrize("supervised", [1, 63, 64, 65, 447])
def test_the_last_layer_gives_supervised_rows_and_the_first_others_up_to_64(supervised):
    mask = np.zeros(511, np.uint8)
    mask[np.random.default_rng(0).permutation(np.arange(1, 511))[:supervised]] = 1
    batch = flatten([row(np.ones(511), mask, [511])], multiple_of=64)
    rows, learnt = batch["last_layer_rows"].tolist(), batch["supervised_rows"].tolist()
    others = [at for at in range(512) if at not in set(learnt)]
    assert len(rows) == -(-supervised // 64) * 64
    assert rows == sorted(learnt + others[: len(rows) - supervised])
    assert batch["last_layer_rows"].dtype == torch.int64


@pytest.mark.parametrize("supervised", [0, 449, 510])
def test_the_last_layer_gives_all_rows_where_few_could_be_left_out(supervised):
    mask = np.arange(511) > 510 - supervised
    batch = flatten([row(np.ones(511), mask, [511])], multiple_of=64)
    assert len(batch["supervised_rows"]) == supervised
    assert "last_layer_rows" not in batch


def test_the_last_layer_gives_few_numbers_of_rows():
    """However many are supervised: a kernel's sizes are looked for once each."""
    numbers = set()
    for supervised in range(1, 7168, 97):
        mask = np.arange(8192) < supervised
        targets = torch.from_numpy(np.where(mask, 1, -100))
        numbers.add(len(rows_to_learn(targets)["last_layer_rows"]))
    assert numbers == set(range(256, 7169, 256))

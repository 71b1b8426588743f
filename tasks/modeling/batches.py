"""Turns rows of a prepared artifact into one packed batch for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not learnt (torch's `ignore_index` default)."""

SUPERVISED_ROWS = "supervised_rows"
"""Key of the positions whose next token is learnt: what the loss head multiplies."""

LAST_ROWS = "last_layer_rows"
"""Key of the positions that the last layer must give: sorted, those of `SUPERVISED_ROWS` among
them. Not there where it had better give all."""

# Few enough sizes that kernels and the allocator see the same ones again, and a multiple of the
# depth of cuBLAS's tiles, as in `regrow.tasks.train.loader`.
_ROW_MULTIPLE = 64
_SIZES = 32  # of the last layer at most: each is one more that cuBLAS looks for a kernel for
# What is taken of attention's result is kept beside it. The rest of the layer keeps 2 I + 2 H of
# each row: an eighth of the rows less pays for 7/8 H where I >= 2.5 H (Llama-2-7B has 2.7 H).
_MOST_TAKEN = 7 / 8
_DUMMY_TOKENS = 8  # of a batch without rows; any small number does, 8 keeps kernels aligned


class PackedRow(Protocol):
    """A row as `regrow.tasks.modeling.rows.PackedRows` gives it: numpy arrays."""

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def loss_mask(self) -> np.ndarray: ...
    @property
    def seq_lens(self) -> np.ndarray: ...


def flatten(
    rows: Sequence[PackedRow],
    pad_to: int | None = None,
    pad_token_id: int = 0,
    multiple_of: int = 1,
) -> dict[str, Any]:
    """The rows, one after the other, as the keyword arguments of a Transformers model.

    Returns `input_ids`, `labels` and `position_ids` as int64 [1, T]; `cu_seq_lens_q` and
    `cu_seq_lens_k` as int32 [examples + 1]; `max_length_q` and `max_length_k` as int; and what
    `rows_to_learn` gives. Labels are not shifted (the model does that). Padding up to `pad_to`
    tokens, or to a multiple of `multiple_of`, is one more segment without labels. No rows at all
    give a short batch of padding: a loss of zero with zero gradients.

    Raises:
        ValueError: when the rows hold more than `pad_to` tokens.
    """
    lengths = [int(length) for row in rows for length in row.seq_lens]
    tokens = sum(lengths)
    padding = _padding(tokens, pad_to, multiple_of)
    input_ids = np.full(tokens + padding, pad_token_id, dtype=np.int64)
    labels = np.full(tokens + padding, IGNORED, dtype=np.int64)
    if rows:
        input_ids[:tokens] = np.concatenate([row.input_ids for row in rows])
        learnt = np.concatenate([row.loss_mask for row in rows]).astype(bool)
        labels[:tokens][learnt] = input_ids[:tokens][learnt]
    if padding:
        lengths.append(padding)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    starts = cu_seqlens[:-1]
    assert (labels[starts] == IGNORED).all(), "the first token of an example has no predecessor"
    position_ids = np.arange(len(input_ids)) - np.repeat(starts, lengths)
    longest = max(lengths)
    cu_seqlens = torch.from_numpy(cu_seqlens)
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    } | rows_to_learn(torch.from_numpy(np.append(labels[1:], IGNORED)))


def rows_to_learn(targets_T: Tensor) -> dict[str, Tensor]:
    """`supervised_rows`, int64: positions whose next token is learnt, and `last_layer_rows`.

    They are found here, on the host, so that no device need be waited for. The last layer's rows
    are the supervised ones and as many of the first others as make up a multiple of a 32nd of all,
    or of 64.
    """
    learnt_T = targets_T != IGNORED
    found = {SUPERVISED_ROWS: learnt_T.nonzero()[:, 0]}
    supervised = len(found[SUPERVISED_ROWS])
    more = -supervised % (_ROW_MULTIPLE * max(1, len(targets_T) // (_ROW_MULTIPLE * _SIZES)))
    if supervised > 0 and supervised + more <= _MOST_TAKEN * len(targets_T):
        learnt_T[(~learnt_T).nonzero()[:more, 0]] = True
        found[LAST_ROWS] = learnt_T.nonzero()[:, 0]
    return found


def _padding(tokens: int, pad_to: int | None, multiple_of: int) -> int:
    if pad_to is None:
        some = tokens or _DUMMY_TOKENS
        return some + -some % multiple_of - tokens
    if tokens > pad_to:
        raise ValueError(f"the rows hold {tokens} tokens, more than pad_to={pad_to}")
    return pad_to - tokens

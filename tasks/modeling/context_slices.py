"""Cuts a packed batch into the slices that the processes of one context-parallel group hold.

The row is cut into twice as many chunks as there are processes; process r holds chunk r and the
r-th from the end, so that all have about the same attention to compute although later tokens see
more (as in Llama 3's training, arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regrow.tasks.modeling.batches import IGNORED, rows_to_learn

CONTEXT_PARTS = "context_parts"
"""Key of what a slice's chunks are to attention: for each of the two (segments, first key, end of
keys, longest of queries, longest of keys), as plain integers."""

TOKEN_LENGTHS = "token_lengths"
"""Key of the length of each token's example: int64 [T]."""


def tokens_multiple(processes: int, multiple_of: int) -> int:
    """What a batch must be padded to a multiple of, so that each slice has a multiple of
    `multiple_of` tokens and two equal chunks."""
    return processes * (multiple_of + multiple_of % 2)


def slice_batch(batch: dict[str, Any], rank: int, processes: int) -> dict[str, Any]:
    """One process's slice of what `regrow.tasks.modeling.batches.flatten` gave.

    `input_ids`, `position_ids`, `TOKEN_LENGTHS` and the rows to learn are of the slice. Labels are
    shifted before cutting, since the token to predict may be another process's: `shift_labels`
    [1, T] are the targets, and `labels` [1, T + 1] the same behind one that is ignored, so that
    shifting them gives the targets. `cu_seq_lens_q` and `cu_seq_lens_k` are those of the first
    chunk and of the second, one after the other; `CONTEXT_PARTS` says where the keys lie in the
    row.
    """
    tokens = batch["input_ids"].shape[1]
    chunk, rest = divmod(tokens, 2 * processes)
    assert not rest, f"{tokens} tokens are not padded to a multiple of {2 * processes}"
    starts = (rank * chunk, (2 * processes - 1 - rank) * chunk)

    def here(x_1T: Tensor) -> Tensor:
        return torch.cat([x_1T[:, start : start + chunk] for start in starts], dim=1)

    ignored = torch.full((1, 1), IGNORED)
    targets = here(torch.cat([batch["labels"][:, 1:], ignored], dim=1))
    bounds = batch["cu_seq_lens_q"].long()
    lengths = bounds.diff()
    parts = [_part(bounds, start, start + chunk) for start in starts]
    return {
        "input_ids": here(batch["input_ids"]),
        "labels": torch.cat([ignored, targets], dim=1),
        "shift_labels": targets,
        "position_ids": here(batch["position_ids"]),
        "cu_seq_lens_q": torch.cat([cu_q for cu_q, _, _ in parts]),
        "cu_seq_lens_k": torch.cat([cu_k for _, cu_k, _ in parts]),
        "max_length_q": max(place[3] for _, _, place in parts),
        "max_length_k": max(place[4] for _, _, place in parts),
        CONTEXT_PARTS: tuple(place for _, _, place in parts),
        TOKEN_LENGTHS: here(torch.repeat_interleave(lengths, lengths)[None])[0],
    } | rows_to_learn(targets[0])


def _part(bounds: Tensor, start: int, end: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(cu_seqlens of queries, of keys, place of the keys) of the row's tokens [start, end).

    The queries are the last ones of what each example has up to `end`; its first tokens are keys
    too, wherever they lie.
    """
    first = int(torch.searchsorted(bounds, start, right=True)) - 1
    last = int(torch.searchsorted(bounds, end))
    found = bounds[first : last + 1]
    cu_q = (found.clamp(start, end) - start).int()
    cu_k = (found.clamp(max=end) - found[0]).int()
    longest = (int(cu_q.diff().max()), int(cu_k.diff().max()))
    return cu_q, cu_k, (len(cu_q) - 1, int(found[0]), end, *longest)

"""A row cut over several processes is computed as on one: loss and every gradient."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from regrow.tasks.modeling.batches import IGNORED, LAST_ROWS, flatten
from regrow.tasks.modeling.context_parallel import ContextGroup, check_can_be_cut
from regrow.tasks.modeling.context_slices import (
    CONTEXT_PARTS,
    TOKEN_LENGTHS,
    slice_batch,
    tokens_multiple,
)
from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
from regrow.tasks.stage import StageError
from regrow.tasks.train.losses import token_losses
from tests.gloo_ranks import on_ranks
from tests.tasks.modeling.models import tiny

# One example longer than a slice, borders of examples at a border of slices, single tokens.
LENGTHS = ([61, 3, 1, 17, 14], [5, 5], [90])
LONG = [250, 64]
"""Long enough that the last layer has rows to leave out."""


def batch(lengths, multiple, pad_to=None):
    random = np.random.default_rng(0)
    mask = random.random(sum(lengths)) < 0.6
    mask[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = False
    row = SimpleNamespace(
        input_ids=random.integers(3, 97, sum(lengths)),
        loss_mask=mask,
        seq_lens=np.array(lengths),
    )
    return flatten([row], pad_to, multiple_of=multiple)


def loss_and_gradients(model, inputs, items):
    model.zero_grad()
    loss = model(**inputs, num_items_in_batch=items, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def compare(variants):
    """{variant: largest difference of loss or gradients}, on each rank."""
    size = torch.distributed.get_world_size()
    context = ContextGroup.of(size)
    found = {}
    for family, kernels, recomputes in variants:
        for lengths in (*LENGTHS, LONG) if kernels else LENGTHS:
            whole = batch(lengths, tokens_multiple(size, 1))
            items = int((whole["labels"] != IGNORED).sum())
            model = tiny(family)
            if recomputes:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            expected = loss_and_gradients(model, whole, items)
            inputs = slice_batch(whole, context.rank, size)
            assert (LAST_ROWS in inputs) == (lengths is LONG)
            if kernels:
                swap_kernels(model, KERNELS)
            context.attach(model)
            loss, gradients = loss_and_gradients(model, inputs, items)
            torch.distributed.all_reduce(loss)
            worst = (loss - expected[0]).abs().item()
            for name, gradient in gradients.items():
                torch.distributed.all_reduce(gradient)
                worst = max(worst, (gradient - expected[1][name]).abs().max().item())
            key = (family, kernels, recomputes)
            found[key] = max(found.get(key, 0.0), worst)
    return found


# mistral and gemma2 have sliding windows shorter than a slice; gemma2 caps scores.
VARIANTS = [(family, False, False) for family in ("llama", "qwen3", "mistral", "gemma2", "phi3")]
VARIANTS += [("llama", True, False), ("gemma3", True, True), ("qwen3_moe", False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_gradients_are_those_of_one_process(ranks, tmp_path):
    for found in on_ranks(compare, ranks, tmp_path, VARIANTS):
        assert len(found) == len(VARIANTS)
        assert {key: worst for key, worst in found.items() if worst > 1e-5} == {}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_slices_hold_every_token_and_target_once(ranks, lengths):
    whole = batch(lengths, tokens_multiple(ranks, 1))
    slices = [slice_batch(whole, rank, ranks) for rank in range(ranks)]
    assert len({part["input_ids"].shape for part in slices}) == 1

    def joined(name):
        halves = [part[name][0].chunk(2) for part in slices]
        return torch.cat([*(h[0] for h in halves), *(h[1] for h in reversed(halves))])

    for name in ("input_ids", "position_ids"):
        assert torch.equal(joined(name), whole[name][0])
    targets = joined("shift_labels")
    assert torch.equal(targets[:-1], whole["labels"][0, 1:])
    assert targets[-1] == IGNORED
    for part in slices:
        assert torch.equal(part["labels"][:, 1:], part["shift_labels"])
        learnt = part["shift_labels"][0] != IGNORED
        assert torch.equal(part["supervised_rows"], learnt.nonzero().flatten())
        assert len(part[TOKEN_LENGTHS]) == part["input_ids"].shape[1]
        assert part["max_length_k"] == max(place[4] for place in part[CONTEXT_PARTS])


def test_attention_is_shared_out_evenly():
    """Pairs of a query and a key it sees, in one long example."""
    whole, ranks = batch([4096], 8), 4
    work = []
    for rank in range(ranks):
        part = slice_batch(whole, rank, ranks)
        work.append(int((part["position_ids"] + 1).sum()))
    assert max(work) / min(work) < 1.01


def test_losses_of_a_slice_have_a_label_for_its_last_token():
    whole = batch([20, 12], 4)
    logits = torch.randn(1, 32, 97)
    expected = token_losses(logits, whole["labels"], 0.1, 1e-3)
    found = []
    for rank in range(2):
        part = slice_batch(whole, rank, 2)
        starts = (8 * rank, 24 - 8 * rank)
        here = torch.cat([logits[:, start : start + 8] for start in starts], dim=1)
        found.append(token_losses(here, part["labels"], 0.1, 1e-3))
    assert sum(x.sum() for x in found).item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert sum(len(x) for x in found) == len(expected)


def test_models_that_turn_by_the_row_s_length_are_refused():
    config = tiny("llama").config
    check_can_be_cut(config)
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4}
    with pytest.raises(StageError, match="longrope"):
        check_can_be_cut(config)
    config.rope_parameters = {"full_attention": {"rope_type": "dynamic"}}
    with pytest.raises(StageError, match="dynamic"):
        check_can_be_cut(config)


def test_groups_that_do_not_come_out_even_are_named():
    with pytest.raises(StageError, match="1 training processes in all are no groups of 2"):
        ContextGroup.of(2)

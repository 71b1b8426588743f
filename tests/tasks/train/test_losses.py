"""Smoothed and z-losses are what the formulas say, over the supervised tokens alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from regrow.tasks.train.losses import loss_function, token_losses
from regrow.tasks.train.worker import train


def example():
    torch.manual_seed(0)
    logits = torch.randn(1, 12, 7)
    labels = torch.randint(0, 7, (1, 12))
    labels[0, [0, 3, 4, 8]] = -100
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_is_torchs(smoothing):
    logits, labels = example()
    ours = token_losses(logits, labels, smoothing, 0.0)
    theirs = torch.nn.functional.cross_entropy(
        logits[0, :-1], labels[0, 1:], label_smoothing=smoothing, reduction="none"
    )
    torch.testing.assert_close(ours, theirs[labels[0, 1:] != -100])


def test_the_z_loss_is_the_squared_log_of_the_sum():
    logits, labels = example()
    extra = token_losses(logits, labels, 0.0, 0.5) - token_losses(logits, labels, 0.0, 0.0)
    learnt = labels[0, 1:] != -100
    expected = 0.5 * torch.logsumexp(logits[0, :-1][learnt], -1).square()
    torch.testing.assert_close(extra, expected)


def test_none_is_needed_for_plain_cross_entropy():
    assert loss_function(0.0, 0.0) is None
    logits, labels = example()
    total = loss_function(0.0, 1e-3)(SimpleNamespace(logits=logits), labels, 8)
    torch.testing.assert_close(total, token_losses(logits, labels, 0.0, 1e-3).sum() / 8)


def test_any_micro_batch_gives_the_same_weights(make_job):
    spec = {"label_smoothing": 0.1, "z_loss": 1e-2, "max_steps": 4}
    outs = []
    for micro in (1, 4):
        job = make_job(f"micro-{micro}", spec, {"micro_batch_size": micro})
        train(job)
        outs.append(load_file(job.out / "adapter_model.safetensors"))
    assert max((outs[0][n] - outs[1][n]).abs().max().item() for n in outs[0]) < 1e-4


def test_the_validation_loss_stays_plain(make_job):
    start = {"learning_rate": 1e-9, "max_steps": 4}
    plain = train(make_job("plain", start))
    smooth = train(make_job("smooth", start | {"label_smoothing": 0.3}))
    losses = [result["eval_losses"][0]["loss"] for result in (plain, smooth)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert plain["train_loss"] != pytest.approx(smooth["train_loss"], abs=1e-6)

"""Training with our kernels follows training without: curve, files, resume, two ranks."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

from regrow.tasks.modeling.kernels import KERNELS
from regrow.tasks.stage import canonical
from regrow.tasks.train.spec import TrainPlacement
from regrow.tasks.train.worker import train
from tests.tasks.train.killed import KillAt, Killed
from tests.tasks.train.ranks import (
    WAYS,
    largest_difference,
    losses,
    needs_deepspeed,
    run_ranks,
    zero,
)

KINDS = {"lora": {}, "full": {"adapter": None, "learning_rate": 1e-3}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_and_the_files_are_those_without_kernels(make_job, kind):
    plain = make_job("plain", KINDS[kind])
    ours = make_job("ours", KINDS[kind], {"kernels": KERNELS, "gradient_checkpointing": True})
    before, result = train(plain), train(ours)
    assert losses(ours.metrics_path) == pytest.approx(losses(plain.metrics_path), abs=1e-4)
    for found, expected in zip(result["eval_losses"], before["eval_losses"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert largest_difference(ours, plain) < 2e-3  # a step of Adam is up to 1e-2
    assert {p.name for p in ours.out.iterdir()} == {p.name for p in plain.out.iterdir()}
    assert result["parameters"] == before["parameters"]
    swapped = result["timing"]["kernels"]
    assert swapped["swapped"] == {"attention": 2, "mlp": 2, "rms_norm": 5, "cross_entropy": 1}
    assert before["timing"]["kernels"]["swapped"] == {}


def test_trained_weights_are_rounded_once_a_step(make_job):
    """Full fine-tuning in bfloat16: with or without kernels every sum between layers is bfloat16,
    and with them the rounded copies follow the weights from step to step."""
    spec = {**KINDS["full"], "dtype": "bfloat16", "max_steps": 12}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.seen = set()
            for layer in model.model.layers:
                layer.register_forward_hook(lambda m, a, out: self.seen.add(out.dtype))

    looks, found = [], []
    for name, placement in (("plain", {}), ("ours", {"kernels": KERNELS}),
                            ("split", {"kernels": KERNELS, "micro_batch_size": 1})):  # fmt: skip
        job = make_job(name, spec, placement)
        looks.append(Look())
        train(job, [looks[-1]])
        found.append(losses(job.metrics_path))
    assert all(look.seen == {torch.bfloat16} for look in looks)
    steps = sorted(found[0])
    assert found[0][steps[-1]] < found[0][steps[0]] - 0.05  # weights that stayed give the first
    for ours in found[1:]:
        assert ours == pytest.approx(found[0], abs=2e-2)


def test_the_recipes_loss_is_the_same(make_job):
    spec = {"label_smoothing": 0.1, "z_loss": 1e-2, "max_steps": 4}
    plain = train(make_job("plain", spec))
    ours = train(make_job("ours", spec, {"kernels": KERNELS}))
    assert ours["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-4)
    found, expected = (result["eval_losses"][0]["loss"] for result in (ours, plain))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("policy", ["selective", "offload", "auto"])
def test_what_is_computed_again_changes_nothing(make_job, policy):
    spec = {"max_steps": 3}
    plain = train(make_job("plain", spec))
    placement = {"gradient_checkpointing": policy, "kernels": KERNELS}
    ours = train(make_job("ours", spec, placement))
    assert ours["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-4)
    assert ours["timing"]["recomputes"] == ("none" if policy == "auto" else policy)


def test_a_run_goes_on_with_other_kernels_and_ends_where_it_would(make_job):
    """Names and shapes of a checkpoint are those of the model without kernels."""

    whole = make_job("whole")
    train(whole)
    with pytest.raises(Killed):
        train(make_job("killed", placement={"kernels": KERNELS}, key="checkpoints/a"), [KillAt(7)])
    resumed = make_job("resumed", placement={"kernels": "off"}, key="checkpoints/a")
    train(resumed)
    assert largest_difference(resumed, whole) < 2e-3


def test_a_job_keeps_the_kernels_through_json(make_job, tmp_path):
    for chosen in ("auto", "off", ("mlp", "rms_norm")):
        placement = make_job("a", placement={"kernels": chosen}).placement
        data = json.loads(json.dumps(canonical(placement)))
        assert TrainPlacement.from_json(data) == placement


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        pytest.param("fsdp2", "lora", id="fsdp2-lora"),
        pytest.param("fsdp2", "full", id="fsdp2-full", marks=pytest.mark.extended),
        pytest.param("ddp", "lora", id="ddp-lora", marks=pytest.mark.extended),
        pytest.param("ddp", "full", id="ddp-full", marks=pytest.mark.extended),
    ],
)
def test_two_ranks_with_kernels_follow_one_without(make_job, way, kind):
    spec = {"max_steps": 8} | KINDS[kind]
    alone = make_job("alone", spec)
    train(alone)
    # So long that the last layer has rows to leave out.
    sizes = {"micro_batch_size": 1, "pad_to": 128}
    placement = sizes | {"sharding": WAYS[way], "kernels": KERNELS}
    ours = make_job("ours", spec, placement)
    run_ranks(ours, 2)
    assert losses(ours.metrics_path) == pytest.approx(losses(alone.metrics_path), abs=1e-4)
    assert largest_difference(ours, alone) < 2e-3
    kernels = json.loads(ours.result_path.read_text())["timing"]["kernels"]
    assert set(kernels["swapped"]) == set(KERNELS) - {"experts"}
    assert kernels["parts"]["last_rows"] == 1


@needs_deepspeed
@pytest.mark.extended
def test_zero_3_leaves_out_what_it_does_not_gather_with_a_layer(make_job):
    """The head for its loss, and experts."""
    spec = {"max_steps": 4}
    alone = make_job("alone", spec)
    train(alone)
    placement = {"micro_batch_size": 1, "sharding": zero(3), "kernels": KERNELS}
    ours = make_job("ours", spec, placement)
    run_ranks(ours, 2)
    assert losses(ours.metrics_path) == pytest.approx(losses(alone.metrics_path), abs=1e-4)
    kernels = json.loads(ours.result_path.read_text())["timing"]["kernels"]
    assert set(kernels["swapped"]) == {"attention", "mlp", "rms_norm"}
    assert set(kernels["left"]) == {"experts", "cross_entropy"}

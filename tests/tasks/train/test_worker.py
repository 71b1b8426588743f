"""The worker trains, resumes to the byte, and gives the same result for any split of the batch."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from regrow.infra.artifacts import ArtifactStore
from regrow.tasks.stage import StageError
from regrow.tasks.train import worker
from regrow.tasks.train.metrics import read_metrics
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.spec import AdapterSpec
from regrow.tasks.train.trainers.loop import StepLoop
from regrow.tasks.train.worker import train
from tests.tasks.train.killed import KillAt, Killed

# Dropout makes a resume fail that does not restore the random state.
DROPOUT = {"adapter": AdapterSpec(r=4, alpha=8, dropout=0.2, target_linear=True)}
WHOLE = {"adapter": None, "learning_rate": 1e-3}
NOISE = {"neftune_noise_alpha": 5.0}


def tensors(job):
    (path,) = job.out.glob("*.safetensors")
    return load_file(path)


def largest_difference(job, other):
    ours, theirs = tensors(job), tensors(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_training_lowers_the_loss_and_reports_it(make_job, capsys):
    job = make_job("a", {"num_epochs": 6}, {"logging_steps": 5})
    result = train(job)
    assert result["steps"] == 36
    losses = [r["loss"] for r in result["history"] if "loss" in r]
    assert losses[-1] == result["train_loss"] < losses[0] - 0.1
    assert [r["step"] for r in result["history"] if "loss" in r] == [1, *range(5, 36, 5), 36]
    assert [r["step"] for r in result["eval_losses"]] == list(range(4, 37, 4))
    index = json.loads((job.prepared / "index.json").read_text())["splits"]["train"]
    assert result["tokens"] == 6 * index["tokens"]
    assert result["supervised_tokens"] == 6 * index["supervised_tokens"]
    assert 0 < result["trainable_parameters"] < result["parameters"]
    assert json.loads(job.result_path.read_text()) == result
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == len(result["history"])
    assert lines[-1].startswith("step 36/36 |")
    record = read_metrics(job.metrics_path)[0]
    assert {"tokens_per_second", "memory_gib", "seconds", "grad_norm"} <= record.keys()


@pytest.mark.parametrize(
    "spec", [DROPOUT, WHOLE, DROPOUT | NOISE], ids=["adapter_dropout", "whole", "noise"]
)
def test_killed_at_any_step_the_result_is_the_same_to_the_byte(make_job, file_bytes, spec):
    undisturbed = make_job("undisturbed", spec, key="checkpoints/a")
    train(undisturbed)
    # Before the first checkpoint (at 3), right after one, one step before the next, at the last.
    for step in (2, 4, 8, 12):
        with pytest.raises(Killed):
            train(make_job(f"killed-{step}", spec, key="checkpoints/b"), [KillAt(step)])
    resumed = make_job("resumed", spec, key="checkpoints/b")
    result = train(resumed)
    # The losses first: should it ever fail, they say at which step it went another way.
    assert [(r["step"], r["loss"]) for r in result["history"] if "loss" in r] == [
        (r["step"], r["loss"])
        for r in json.loads(undisturbed.result_path.read_text())["history"]
        if "loss" in r
    ]
    assert file_bytes(resumed.out) == file_bytes(undisturbed.out)
    assert result["tokens"] == json.loads(undisturbed.result_path.read_text())["tokens"]


def test_the_process_first_sees_to_it_that_it_does_not_outlive_torchruns_agent(monkeypatch):
    class Watched(Exception):  # noqa: N818 (the name says what is the matter)
        pass

    def watched() -> None:
        raise Watched

    monkeypatch.setattr(worker, "end_with_agent", watched)
    with pytest.raises(Watched):
        worker.main(["no job"])


def test_damaged_and_unfinished_checkpoints_are_named_and_passed_over(make_job, file_bytes, caplog):
    undisturbed = make_job("undisturbed", DROPOUT, key="checkpoints/a")
    train(undisturbed)
    with pytest.raises(Killed):
        train(make_job("killed", DROPOUT, key="checkpoints/b"), [KillAt(10)])
    store = ArtifactStore.open_url(undisturbed.checkpoints.url)
    assert store.children("checkpoints/b") == [f"checkpoints/b/step-0000000{n}" for n in (6, 9)]
    record = store.lookup("checkpoints/b/step-00000009")
    (optimizer,) = store.fetch(record).glob("*.safetensors")
    data = bytearray(optimizer.read_bytes())
    data[len(data) // 2] ^= 1
    optimizer.write_bytes(data)
    # A later one whose upload never came to its record.
    half = store.store.local / "checkpoints/b/step-00000012/attempt-0"
    shutil.copytree(optimizer.parent, half)

    resumed = make_job("resumed", DROPOUT, key="checkpoints/b")
    with caplog.at_level(logging.INFO):
        train(resumed)
    assert "step-00000012 was not finished" in caplog.text
    assert "step-00000009 is damaged: shard-00001" in caplog.text
    assert "resuming after step 6 of 12" in caplog.text
    assert file_bytes(resumed.out) == file_bytes(undisturbed.out)


def test_a_resume_at_the_last_step_only_exports(make_job, file_bytes):
    first = make_job("first", DROPOUT, key="checkpoints/a")
    train(first)
    again = make_job("again", DROPOUT, key="checkpoints/a")
    result = train(again, [KillAt(1)])
    assert result["steps"] == 12
    assert file_bytes(again.out) == file_bytes(first.out)


def test_only_the_newest_checkpoints_are_kept(make_job):
    job = make_job("a", placement={"saving": Cadence(steps=2)}, key="checkpoints/a")
    train(job)
    store = ArtifactStore.open_url(job.checkpoints.url)
    kept = [key[-2:] for key in store.children("checkpoints/a")]
    assert kept == ["10", "12"]
    assert not list((job.work / "unfinished").glob("checkpoint-*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_slower_rank_neither_meets_nor_leaves_a_vanishing_directory(tmp_path, rank):
    """Rank 0 removes the Trainer's empty checkpoint while others may still be on their way to it:
    of what is removed they must not make anything."""
    place = tmp_path / "checkpoint-20"
    loop = SimpleNamespace(args=SimpleNamespace(should_save=rank == 0))
    StepLoop.save_model(loop, str(place))
    assert place.is_dir() == (rank == 0)


def test_evaluating_and_saving_leave_no_trace_in_the_weights(make_job, file_bytes):
    spec = DROPOUT | NOISE
    silent = {"evaluation": Cadence(), "saving": Cadence()}
    plain = make_job("plain", spec, silent)
    busy = make_job(
        "busy", spec, {"evaluation": Cadence(steps=1), "saving": Cadence(steps=1)}, "checkpoints/a"
    )
    train(plain)
    train(busy)
    assert file_bytes(plain.out) == file_bytes(busy.out)


def test_the_result_holds_the_model_and_nothing_of_this_machine(make_job, file_bytes, tmp_path):
    job = make_job("a", key="checkpoints/a")
    train(job)
    files = file_bytes(job.out)
    assert files.keys() == {"adapter_model.safetensors", "adapter_config.json"}
    assert str(tmp_path).encode() not in b"".join(files.values())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert all(tensor.dtype == torch.float32 for tensor in tensors(job).values())


def test_adapter_weights_train_in_float32_over_a_bfloat16_base(make_job):
    job = make_job("a", {"dtype": "bfloat16"})
    result = train(job)
    assert result["train_loss"] < result["history"][0]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in tensors(job).values())


def test_a_model_trained_whole_is_stored_in_the_recipes_dtype(make_job):
    job = make_job("a", WHOLE | {"dtype": "bfloat16"})
    train(job)
    model, report = AutoModelForCausalLM.from_pretrained(job.out, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache  # generation is fast again
    assert "_name_or_path" not in (job.out / "config.json").read_text()


@pytest.mark.parametrize("micro", [1, 4])
def test_any_micro_batch_gives_the_same_weights(make_job, micro):
    """The loss is normalised by the supervised tokens of the whole batch, however it is split."""
    one = make_job("one", placement={"micro_batch_size": 2})
    other = make_job("other", placement={"micro_batch_size": micro})
    train(one)
    result = train(other)
    assert result["timing"]["accumulation"] == 4 // micro
    assert largest_difference(one, other) < 1e-4  # weights move by 1e-2 a step


def test_padding_and_recomputation_do_not_change_the_weights(make_job):
    one = make_job("one")
    other = make_job("other", placement={"pad_to": 64, "gradient_checkpointing": True})
    train(one)
    train(other)
    assert largest_difference(one, other) < 1e-4


def test_a_micro_batch_that_does_not_divide_is_lowered_and_said(make_job, caplog):
    with caplog.at_level(logging.WARNING):
        result = train(make_job("a", {"max_steps": 1}, {"micro_batch_size": 3}))
    assert result["timing"]["micro_batch_size"] == 2
    assert "micro_batch_size 3 does not divide the global batch of 4 rows" in caplog.text


def test_diverged_training_stops_and_says_why(make_job):
    with pytest.raises(StageError, match="learning_rate"):
        train(make_job("a", WHOLE | {"learning_rate": 1e30, "max_grad_norm": 0.0}))


def test_training_goes_on_from_an_adapter(make_job):
    """Its rank and targets hold, whatever the recipe says of them."""
    first = make_job("first", {"max_steps": 3})
    train(first)
    start = {"adapter": AdapterSpec(r=0, alpha=0, start="f" * 64), "max_steps": 1}
    job = make_job("second", start | {"learning_rate": 1e-9})
    result = train(dataclasses.replace(job, start_adapter=first.out))
    assert result["trainable_parameters"] > 0
    before, after = tensors(first), tensors(job)
    assert before.keys() == after.keys()
    assert max((before[n] - after[n]).abs().max().item() for n in before) < 1e-6

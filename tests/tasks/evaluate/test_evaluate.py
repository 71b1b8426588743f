"""The evaluate stage measures what it can, says what it cannot, and compares like with like."""

import json
import math
import traceback
from dataclasses import replace

import psutil
import pytest
import torch

from regrow.infra.device_files import Devices
from regrow.infra.devices import Gpu, local_gpus
from regrow.tasks.evaluate import run as module
from regrow.tasks.evaluate.run import _device, run
from regrow.tasks.evaluate.spec import EvaluatePlacement
from regrow.tasks.evaluate.table import scores_table
from regrow.tasks.modeling.load import load_tokenizer
from regrow.tasks.stage import StageError, canonical
from tests.tasks.evaluate.prepared import byte_tokenizer, make_job, write_prepared
from tests.tasks.train.tiny_models import write_llama


def _lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_before_and_after_are_compared(prepared, tiny_llama_dir, trained_dir, tmp_path):
    spec = {"eval_prompts": ("Say hi",), "max_new_tokens": 12}
    placement = EvaluatePlacement(base_model=str(tiny_llama_dir), device="cpu")
    base = make_job(
        tmp_path, {"prepare": prepared}, placement=placement, model_digest="d" * 64, **spec
    )
    before = run(base)
    inputs = {"prepare": prepared, "model": trained_dir, "baseline": base.out}
    job = make_job(tmp_path, inputs, {"baseline": before}, **spec)
    after = run(job)

    assert before["comparison"] is None
    assert before["scores"]["exact"] == 0
    assert after["scores"]["exact"] == 1
    assert after["scores"]["prompts"] == 5
    assert after["scores"]["loss"] < 0.1 < before["scores"]["loss"]
    assert after["scores"]["token_accuracy"] == 1
    comparison = after["comparison"]
    assert comparison["before"]["loss"] == before["scores"]["loss"]
    assert comparison["after"]["loss"] == after["scores"]["loss"]
    change = 100 * (after["scores"]["loss"] / before["scores"]["loss"] - 1)
    assert comparison["change"]["loss"]["percent"] == pytest.approx(change)
    assert comparison["change"]["exact"] == {"absolute": 1.0}

    assert json.loads((job.out / "scores.json").read_text()) == after["scores"]
    assert json.loads((job.out / "comparison.json").read_text()) == comparison
    rows, earlier = _lines(job.out / "generations.jsonl"), _lines(base.out / "generations.jsonl")
    assert [row["before"] for row in rows] == [row["answer"] for row in earlier]
    assert [row["exact"] for row in rows] == [True] * 5 + [None]
    assert rows[5]["prompt"] == "Say hi"
    assert rows[5]["expected"] is None
    assert after["samples"] == rows
    assert after["notes"] == []
    canonical(after)  # what cannot be written into a record raises


def test_without_validation_only_answers_are_given(tokenizer, tiny_llama_dir, tmp_path):
    prepared = write_prepared(tmp_path / "p", tokenizer, [], True)
    job = make_job(tmp_path, {"prepare": prepared, "model": tiny_llama_dir})
    result = run(job)
    assert result["scores"]["loss"] is None
    assert result["scores"]["prompts"] == 5
    assert len(result["notes"]) == 1
    assert "val_set_size" in result["notes"][0]
    assert job.report.logged[-1] == result["notes"][0]


def test_without_validation_and_prompts_no_model_is_needed(tokenizer, tmp_path):
    prepared = write_prepared(tmp_path / "p", tokenizer, [], False)
    job = make_job(tmp_path, {"prepare": prepared, "model": tmp_path / "nothing"})
    result = run(job)
    assert set(result["scores"].values()) == {None, 0}
    assert len(result["notes"]) == 2
    assert _lines(job.out / "generations.jsonl") == []


def test_no_more_prompts_are_answered_than_asked(prepared, tiny_llama_dir, tmp_path):
    job = make_job(tmp_path, {"prepare": prepared, "model": tiny_llama_dir}, num_prompts=2)
    result = run(job)
    assert result["scores"]["prompts"] == 2
    assert len(_lines(job.out / "generations.jsonl")) == 2


def test_equal_jobs_give_equal_results(prepared, tiny_llama_dir, tmp_path):
    inputs = {"prepare": prepared, "model": tiny_llama_dir}
    assert run(make_job(tmp_path, inputs)) == run(make_job(tmp_path, inputs))


def test_tokens_new_to_the_base_model_are_no_hindrance(tokenizer, tiny_llama_dir, tmp_path):
    grown = load_tokenizer(tiny_llama_dir)
    grown.add_tokens(["lamp: on"])
    prepared = write_prepared(tmp_path / "p", grown, [[0]], True)
    placement = EvaluatePlacement(base_model=str(tiny_llama_dir), device="cpu")
    result = run(make_job(tmp_path, {"prepare": prepared}, placement=placement))
    assert math.isfinite(result["scores"]["loss"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_an_absent_device_is_named(prepared, tiny_llama_dir, tmp_path):
    job = make_job(
        tmp_path,
        {"prepare": prepared, "model": tiny_llama_dir},
        placement=EvaluatePlacement(device="cuda"),
    )
    with pytest.raises(StageError, match="cuda"):
        run(job)


def test_table_shows_before_after_and_change():
    scores = {"loss": 2.0, "perplexity": 7.389, "token_accuracy": 0.5, "exact": 0.0}
    after = {"loss": 1.5, "perplexity": 4.4817, "token_accuracy": 0.625, "exact": 0.25}
    from regrow.tasks.evaluate.compare import compare

    result = {"scores": after, "comparison": compare(scores, after), "notes": []}
    assert scores_table(result).splitlines() == [
        "                     before   after        change",
        "loss (nats a token)  2.0000  1.5000       -25.0 %",
        "perplexity             7.39    4.48       -39.3 %",
        "token accuracy       50.0 %  62.5 %  +12.5 points",
        "exact answers         0.0 %  25.0 %  +25.0 points",
    ]


def test_table_without_a_baseline_or_scores_says_what_is_known():
    one = {"scores": {"loss": 2.0, "exact": None}, "comparison": None, "notes": ["no prompts"]}
    assert scores_table(one).splitlines() == [
        "                      score",
        "loss (nats a token)  2.0000",
        "no prompts",
    ]
    nothing = {"scores": {"loss": None}, "comparison": None, "notes": ["nothing"]}
    assert scores_table(nothing) == "nothing"


def test_a_model_is_evaluated_on_the_gpu_that_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpus = (Gpu("H100", 80 * 2**30, "uuid", 3, "GPU-uuid"),)
    job = make_job(tmp_path, {}, placement=EvaluatePlacement())
    assert _device(replace(job, devices=Devices(gpus))) == torch.device("cuda", 3)
    assert _device(job) == torch.device("cuda", 0)


def test_a_gpu_is_used_in_another_process_also_where_gpus_have_no_lock_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "run_alone", lambda _job: {"alone": True})
    job = make_job(tmp_path, {"prepare": tmp_path}, placement=EvaluatePlacement())
    assert job.devices is None
    assert run(job) == {"alone": True}


GPU_OF_ITS_OWN = Devices((Gpu("H100", 80 * 2**30, "uuid", 0, "GPU-uuid"),))


def test_with_a_gpu_the_same_is_measured_in_a_process_that_ends(
    prepared, tiny_llama_dir, trained_dir, tmp_path
):
    """With it ends CUDA's context, which would stay on a GPU that is another run's by then."""
    placement = EvaluatePlacement(base_model=str(tiny_llama_dir), device="cpu")
    base = make_job(tmp_path, {"prepare": prepared}, placement=placement, model_digest="d" * 64)
    before = run(base)
    inputs = {"prepare": prepared, "model": trained_dir, "baseline": base.out}
    here, there = (make_job(tmp_path, inputs, {"baseline": before}) for _ in range(2))
    others = set(psutil.Process().children())
    assert run(replace(there, devices=GPU_OF_ITS_OWN)) == run(here)
    assert set(psutil.Process().children()) == others
    assert there.report.logged == here.report.logged
    assert [each[:2] for each in there.report.progressed]
    names = {path.name for path in here.out.iterdir()}
    assert {path.name for path in there.out.iterdir()} == names
    assert all((there.out / name).read_bytes() == (here.out / name).read_bytes() for name in names)


def test_an_evaluation_that_fails_in_its_own_process_says_why(prepared, tmp_path):
    job = make_job(tmp_path, {"prepare": prepared, "model": tmp_path / "none"})
    with pytest.raises(StageError, match="none") as here:
        run(job)
    with pytest.raises(StageError) as there:
        run(replace(job, devices=GPU_OF_ITS_OWN))
    assert str(there.value) == str(here.value)
    assert "in on_device" in "".join(traceback.format_exception(there.value))


@pytest.mark.extended
def test_an_evaluation_that_is_killed_is_told(prepared, trained_dir, tmp_path):
    job = make_job(tmp_path, {"prepare": prepared, "model": trained_dir})

    others = set(psutil.Process().children())

    class Killing:
        def log(self, _message: str) -> None:
            for child in set(psutil.Process().children()) - others:
                child.kill()

        progress = log

    with pytest.raises(StageError, match=r"ended without a word \(SIGKILL\)"):
        run(replace(job, devices=GPU_OF_ITS_OWN, report=Killing()))


@pytest.fixture
def small(tmp_path):
    """A prepared artifact and a random model, both made of nothing that is not here."""
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    prepared = write_prepared(tmp_path / "p", tokenizer, [[0, 3, 2], [4, 1]], True)
    return {"prepare": prepared, "model": write_llama(tmp_path / "m", **sizes)}


@pytest.mark.extended
def test_a_small_model_made_in_place_is_evaluated_in_a_process_of_its_own(small, tmp_path):
    """The same without a GPU as the next test with one."""
    result = run(replace(make_job(tmp_path, small), devices=GPU_OF_ITS_OWN))
    assert math.isfinite(result["scores"]["loss"])
    assert result["scores"]["prompts"] == 5


@pytest.mark.gpu
def test_the_process_of_the_run_has_no_context_on_the_gpu(small, tmp_path):
    job = make_job(tmp_path, small, placement=EvaluatePlacement(device="cuda"))
    before = torch.cuda.is_initialized()
    result = run(replace(job, devices=Devices(tuple(local_gpus()[:1]))))
    assert math.isfinite(result["scores"]["loss"])
    assert torch.cuda.is_initialized() == before

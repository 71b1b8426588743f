"""What is computed again: the plan's memory model decides, by the worker's facts, for all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from regrow.infra.launch import WorkerFailed
from regrow.tasks.forecast.fit import Choice, Room, choose
from regrow.tasks.forecast.job_setting import Facts, wish_of_job
from regrow.tasks.forecast.memory import GIB
from regrow.tasks.forecast.model_shape import model_shape
from regrow.tasks.modeling.kernels import Swapped
from regrow.tasks.train import fitting
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.attempts import Attempts
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.order import Split
from regrow.tasks.train.reporters import Reporters
from regrow.tasks.train.spec import TrainPlacement, TrainSpec
from regrow.tasks.train.worker import train
from tests.gloo_ranks import on_ranks

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SPEC = TrainSpec(
    base_model_digest="",
    dtype="bfloat16",
    global_batch_size=2,
    num_epochs=1,
    learning_rate=1e-4,
    adapter=AdapterSpec(r=16, alpha=32, target_linear=True),
)


def wish(kernels=None, asked="auto"):
    placement = TrainPlacement("", micro_batch_size=2, gradient_checkpointing=asked)
    return wish_of_job(SPEC, placement, Facts(model_shape(LLAMA_8B), 4096, kernels=kernels))


@pytest.mark.parametrize(
    ("gib", "expected"), [(62, "none"), (24, "selective"), (21.5, "full"), (17, "offload")]
)
def test_as_little_is_computed_again_as_memory_demands(gib, expected):
    assert fitting.decide("auto", wish(), "", Room(gib * GIB)).policy == expected


def test_the_plan_and_the_worker_decide_alike():
    for gib in (70, 40, 24, 20, 17, 10):
        room = Room(gib * GIB)
        planned = choose(wish(), room, Choice(2, "full")).checkpointing or "none"
        assert fitting.decide("auto", wish(), "", room).policy == planned


def test_weights_are_laid_anew_only_where_holes_do_no_harm():
    roomy = {gib: fitting.decide("auto", wish(), "", Room(gib * GIB)).roomy for gib in (70, 22, 17)}
    assert roomy == {70: True, 22: False, 17: False}
    assert not fitting.decide("auto", None, "nobody knows it", Room(80 * GIB)).roomy
    assert not fitting.decide("none", None, "nobody knows it", Room(80 * GIB)).roomy
    assert fitting.decide("none", None, "", None).roomy  # on a CPU


def test_kernels_that_do_not_run_are_not_counted_on():
    room = Room(50 * GIB)
    assert fitting.decide("auto", wish(), "", room).policy == "none"
    assert fitting.decide("auto", wish(kernels=()), "", room).policy != "none"


@pytest.mark.parametrize(
    ("asked", "policy"), [(True, "full"), (False, "none"), ("selective", "selective")]
)
def test_what_is_asked_for_is_done_and_forecast(asked, policy):
    found = fitting.decide(asked, wish(asked=asked), "", Room(80 * GIB))
    assert found.policy == policy
    assert found.forecast is not None
    assert found.record()["forecast_memory_gib"] > 15


def test_an_unknown_architecture_computes_all_again():
    found = fitting.decide("auto", None, "nobody knows it", Room(80 * GIB))
    assert found.policy == "full"
    assert "nobody knows it" in found.record()["recomputes_why"]


def test_activations_wait_on_the_host_only_where_it_has_room():
    crowded = Room(17 * GIB, host=1 * GIB)
    found = fitting.decide("auto", wish(), "", crowded)
    assert (found.policy, found.fits) == ("full", False)
    assert "would wait in the host's memory, and it has only 1.0 GiB free" in found.why
    assert found.record()["free_host_memory_gib"] == 1
    assert "host" not in fitting.decide("auto", wish(), "", Room(9 * GIB, host=90 * GIB)).why


@pytest.mark.parametrize(
    ("gib", "host", "expected"),
    [
        (62, 90, ["none", "full", "offload"]),
        (24, 90, ["selective", "full", "offload"]),
        (21.5, 1, ["full"]),
        (24, 1, ["selective", "full"]),
        (17, 1, ["full"]),
    ],
)
def test_after_an_end_of_memory_less_is_kept_as_far_as_the_host_has_room(gib, host, expected):
    """Then nothing is left but smaller micro-batches."""
    room = Room(gib * GIB, host * GIB)
    found = [fitting.decide("auto", wish(), "", room)]
    while found[-1].fallback:
        found.append(fitting.decide("auto", wish(), "", room, found[-1].fallback))
    assert [each.policy for each in found] == expected
    taken = [each.forecast.allocated for each in found]
    assert taken == sorted(taken, reverse=True)
    assert found[-1].stays == 0


@pytest.mark.parametrize("asked", ["auto", "offload"])
def test_what_was_offloaded_already_is_offloaded_to_the_last_byte(asked):
    room = Room(18 * GIB, host=90 * GIB)
    first = fitting.decide(asked, wish(asked=asked), "", room)
    assert (first.policy, first.fallback) == ("offload", "offload")
    again = fitting.decide(asked, wish(asked=asked), "", room, first.fallback)
    assert (again.policy, again.stays, again.fallback) == ("offload", 0.0, None)
    assert again.forecast.allocated < first.forecast.allocated < room.device
    # Inputs of 2 GiB: a part of them has room on this host, all of them have not.
    found = fitting.decide(asked, wish(asked=asked), "", Room(18 * GIB, host=2 * GIB))
    assert (found.policy, found.fits, found.fallback) == ("offload", True, None)


def test_what_can_only_stay_in_any_case_is_no_other_run():
    asked = wish()
    one = 2 * 2 * 4096 * 4096
    setting = asked.at(2, "offload")
    least = next(
        room
        for mib in range(16000, 18000, 4)
        if (room := Room(mib * 2**20)) and one < fitting.staying(setting, room)
    )
    found = fitting.decide("auto", asked, "", least)
    assert found.policy == "offload"
    assert one < found.stays < 2 * one
    assert found.fallback is None


def test_only_what_auto_chose_is_given_up():
    room = Room(80 * GIB, host=90 * GIB)
    for asked in (False, True, "selective"):
        assert fitting.decide(asked, wish(asked=asked), "", room).fallback is None
    assert fitting.decide("auto", None, "nobody knows it", room).fallback is None
    assert fitting.decide("auto", None, "", None).fallback == "full"  # on a CPU


def test_offloading_that_is_asked_for_says_where_the_host_is_too_small():
    found = fitting.decide("offload", wish(asked="offload"), "", Room(17 * GIB, host=1 * GIB))
    assert (found.policy, found.fits) == ("offload", False)
    assert "it has only 1.0 GiB free" in found.why
    found = fitting.decide("offload", wish(asked="offload"), "", Room(17 * GIB, host=9 * GIB))
    assert (found.fits, found.why) == (True, "")


def test_the_stage_hears_of_what_takes_less(monkeypatch, caplog, tmp_path):
    args = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    placement = TrainPlacement("", micro_batch_size=2, gradient_checkpointing="auto")
    job = WorkerJob(SPEC, placement, tmp_path, tmp_path, tmp_path, tmp_path)
    monkeypatch.setattr(fitting, "_wish", lambda *rest: (wish(), ""))
    course = Attempts(job, SimpleNamespace(log=lambda message: None), tmp_path)
    model = SimpleNamespace(config=None, modules=list)
    with caplog.at_level("INFO"):
        fitting.fit(job, model, Swapped(), Split(2, 1, 1), args)
    for record in caplog.records:
        course.hear(f"INFO {record.name}: {record.getMessage()}")
    course.after(WorkerFailed("OutOfMemoryError", 0, "", tmp_path))
    assert (course.job.placement.fallback, course.job.placement.micro_batch_size) == ("full", 2)
    assert fitting.fit(course.job, model, Swapped(), Split(2, 1, 1), args).policy == "full"


def rooms_of_ranks() -> tuple[float, str]:
    rank = torch.distributed.get_rank()
    free = (60 - 36 * rank) * GIB
    torch.cuda.mem_get_info = lambda device: (free, 80 * GIB)
    torch.cuda.memory_reserved = lambda device: 0
    torch.cuda.get_per_process_memory_fraction = lambda device: 1.0
    args = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    room = fitting.smallest_room(args)
    return room.device / GIB, fitting.decide("auto", wish(), "", room).policy


def test_the_rank_with_the_least_memory_decides_for_all(tmp_path):
    assert on_ranks(rooms_of_ranks, 2, tmp_path) == [(24, "selective")] * 2


def test_a_share_of_the_gpu_is_all_the_room_there_is(monkeypatch):
    given = {"mem_get_info": (70 * GIB, 80 * GIB), "memory_reserved": 5 * GIB}
    given["get_per_process_memory_fraction"] = 0.25
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    room = fitting.smallest_room(SimpleNamespace(device=torch.device("cpu"), world_size=1))
    assert room.device == 20 * GIB


def test_a_warning_says_that_the_host_is_too_small(monkeypatch, caplog):
    args = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    job = SimpleNamespace(placement=TrainPlacement("", gradient_checkpointing="auto"))
    given = {"_wish": (wish(), ""), "is_attached": False}
    for name, value in given.items():
        monkeypatch.setattr(fitting, name, lambda *rest, value=value: value)
    found = fitting.decide("auto", wish(), "", Room(17 * GIB, host=1 * GIB))
    monkeypatch.setattr(fitting, "decide", lambda *rest: found)
    fitting.fit(job, SimpleNamespace(config=None), Swapped(), Split(2, 1, 1), args)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the host's memory" in record.message


def fit_of_rank() -> str:
    asked = "offload" if torch.distributed.get_rank() else "full"
    args = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    job = SimpleNamespace(placement=TrainPlacement("", gradient_checkpointing=asked))
    fitting._wish = lambda *rest: (None, "")
    fitting.is_attached = lambda model: False
    model = SimpleNamespace(config=None, modules=list)
    return fitting.fit(job, model, Swapped(), Split(2, 1, 1), args).policy


def test_all_ranks_do_what_rank_0_says(tmp_path):
    assert on_ranks(fit_of_rank, 2, tmp_path) == ["full", "full"]


def test_offloading_gives_way_where_examples_are_side_by_side(caplog):
    part = SimpleNamespace(regrow_side_by_side=True)
    model = SimpleNamespace(modules=lambda: [part])
    args = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    job = SimpleNamespace(placement=TrainPlacement("", gradient_checkpointing="offload"))
    assert fitting.fit(job, model, Swapped(), Split(2, 1, 1), args).policy == "full"
    assert "offload is for packed rows" in caplog.text


def test_cached_files_leave_room_on_the_host(tmp_path):
    table = tmp_path / "meminfo"
    assert fitting._available(table) > 0
    table.write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n")
    assert fitting._available(table) == 4000 * 1024


def test_a_container_s_limit_counts(tmp_path):
    free = fitting._host_memory(tmp_path)
    assert free > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7000\n")
    assert fitting._host_memory(tmp_path) == pytest.approx(free, rel=0.5)  # it moves on its own
    (tmp_path / "memory.max").write_text("10000\n")
    assert fitting._host_memory(tmp_path) == 3000
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 1500\nactive_file 500\n")
    assert fitting._host_memory(tmp_path) == 4500


def test_the_record_names_what_was_computed_again(make_job):
    found = train(make_job("a", {"max_steps": 1}, {"gradient_checkpointing": "selective"}))
    assert found["timing"]["recomputes"] == "selective"


def test_tensorboard_can_write_down_the_arguments_of_every_policy(make_job, tmp_path, monkeypatch):
    """It writes them as JSON, which a policy's functions are not."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    placement = {"gradient_checkpointing": "selective", "reporters": Reporters(("tensorboard",))}
    assert train(make_job("a", {"max_steps": 1}, placement))["steps"] == 1
    assert list((tmp_path / "runs").iterdir())

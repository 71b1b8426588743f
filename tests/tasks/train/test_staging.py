"""Copies of a training's state go into buffers that are made once, and ahead of the first copy."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from regrow.tasks.train import state as states
from regrow.tasks.train.saving import BackgroundSaver, Ranks, SaveCheckpoints
from regrow.tasks.train.state import Staging, State


def state_of(number: float) -> State:
    tensors = {"weight/a": torch.full((3, 2), number), "optimizer/a/step": torch.tensor(number)}
    return State(tensors, {"step": number})


def test_the_first_copy_finds_its_buffers_made(monkeypatch):
    made = []
    build = states._buffer
    monkeypatch.setattr(states, "_buffer", lambda tensor: made.append(build(tensor)) or made[-1])
    staging = Staging()
    staging.prepare(state_of(0.0))
    first = staging.copy(state_of(1.0))
    assert len(made) == 2
    assert all(any(tensor is buffer for buffer in made) for tensor in first.tensors.values())
    assert first.tensors["weight/a"].tolist() == [[1.0, 1.0]] * 3
    second = staging.copy(state_of(2.0))
    assert len(made) == 2
    assert second.tensors["optimizer/a/step"].item() == 2.0


def test_a_state_of_another_shape_gets_buffers_of_its_own():
    staging = Staging()
    staging.prepare(State({"weight/a": torch.zeros(5)}, {}))
    found = staging.copy(state_of(1.0))
    assert found.tensors.keys() == {"weight/a", "optimizer/a/step"}
    assert found.tensors["weight/a"].shape == (3, 2)


def test_where_memory_is_short_the_copy_makes_them(monkeypatch, caplog):
    build = states._buffer

    def refuse(tensor):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(states, "_buffer", refuse)
    staging = Staging()
    staging.prepare(state_of(0.0))
    assert staging._making is not None
    staging._making.join()
    assert "no memory yet" in caplog.text
    monkeypatch.setattr(states, "_buffer", build)
    assert staging.copy(state_of(1.0)).tensors["weight/a"].sum() == 6


ENDS_MEANWHILE = """
import torch
from regrow.tasks.train import state as states

begun = states.threading.Event()

def slow(tensor):
    begun.set()
    return torch.empty(20_000_000).normal_()  # in C++, as pinning is, without Python's lock

states._buffer = slow
staging = states.Staging()
staging.prepare(states.State({str(n): torch.zeros(1) for n in range(5)}, {}))
begun.wait()
print("over", flush=True)
"""


def test_a_process_that_ends_while_they_are_made_ends_well():
    done = subprocess.run(
        [sys.executable, "-c", ENDS_MEANWHILE], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr


def test_the_end_of_a_training_stops_their_making_and_frees_them(monkeypatch, tmp_path):
    begun, may_go_on = threading.Event(), threading.Event()
    made = []

    def slow(tensor):
        begun.set()
        assert may_go_on.wait(60)
        made.append(tensor)
        return torch.empty_like(tensor)

    monkeypatch.setattr(states, "_buffer", slow)
    saver = BackgroundSaver(None, Ranks(), tmp_path / "scratch")
    saver.staging.prepare(State({str(n): torch.zeros(1) for n in range(5)}, {}))
    making = saver.staging._making
    assert begun.wait(60)
    closing = threading.Thread(target=saver.close)
    closing.start()
    assert saver.staging._closed.wait(60)
    may_go_on.set()
    closing.join(60)
    assert not making.is_alive()
    assert len(made) == 1
    assert not saver.staging._buffers


@pytest.mark.parametrize(
    ("due", "device", "prepared"),
    [({3, 9}, "cuda", 1), ({2}, "cuda", 1), ({1}, "cuda", 0), (set(), "cuda", 0), ({9}, "cpu", 0)],
)
def test_they_are_made_on_a_gpu_where_a_save_is_to_come(due, device, prepared):
    seen = []
    staging = SimpleNamespace(prepare=seen.append)
    trainer = SimpleNamespace(is_deepspeed_enabled=False, capture=lambda: "state")
    saves = SaveCheckpoints(SimpleNamespace(staging=staging), trainer, None, due, None)
    args = SimpleNamespace(device=torch.device(device))
    for step in (2, 3, 4):  # the first after a resume
        saves.on_step_end(args, SimpleNamespace(global_step=step), None)
    assert seen == ["state"] * prepared


def test_pinned_memory_goes_back_to_the_machine_at_the_end(monkeypatch):
    """Where torch keeps it, the whole model that is written next may find none."""
    given_back = []
    staging = Staging()
    staging.copy(state_of(1.0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    empty = lambda: given_back.append(not staging._buffers)  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", empty, raising=False)
    staging.close()
    assert given_back == [True]

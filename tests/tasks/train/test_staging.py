"""Copies of a training's state go into buffers that are made once, and ahead of the first copy."""

import torch

from regrow.tasks.train import state as states
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

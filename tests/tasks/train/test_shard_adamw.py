"""AdamW in one pass on the parts that FSDP2 leaves each process moves weights as PyTorch's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from regrow.tasks.train.metrics import read_metrics
from regrow.tasks.train.shard_adamw import ShardAdamW
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.worker import train
from tests.gloo_ranks import on_ranks
from tests.tasks.train.ranks import losses, run_ranks

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FSDP = {"version": 2, "reshard_after_forward": True, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    # 5 rows are 3 and 2; one row leaves the second process nothing.
    sizes = (
        torch.nn.Linear(6, 5, bias=False),
        torch.nn.Tanh(),
        torch.nn.Linear(5, 3),
        torch.nn.Linear(3, 1),
    )
    return torch.nn.Sequential(*sizes)


def backward(module: torch.nn.Module, number: int) -> None:
    """The same rows on every rank, whose mean gradient is then that of one process."""
    torch.manual_seed(number)
    (module(torch.randn(4, 6)).square().sum() * 9).backward()


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_ranks_of(copies: int, ranks: int) -> dict[str, Any]:
    """Weights, norms and states after steps of two micro-batches, and those of one process."""
    names = ("copies", "parts") if copies > 1 else ("parts",)
    shape = (copies, ranks // copies) if copies > 1 else (ranks,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    ours, right = model(), model()
    fully_shard(ours[0], mesh=mesh)
    fully_shard(ours, mesh=mesh)
    first: Any = ours[0]

    def gather_first(moved: torch.Tensor) -> None:
        if moved is first.weight:
            first.unshard(async_op=True)  # what the next step computes with has moved

    settings = SETTINGS | {"max_grad_norm": 0.5, "rounded": None, "after": gather_first}
    shards = ShardAdamW(ours.parameters(), **settings)
    plain = torch.optim.AdamW(right.parameters(), **SETTINGS)
    norms = []
    for step in range(4):
        for micro in range(2):
            backward(ours, 10 * step + micro)
            backward(right, 10 * step + micro)
        shards.take()
        assert torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.5) == 0
        expected = torch.nn.utils.clip_grad_norm_(right.parameters(), 0.5)
        shards.step()
        plain.step()
        plain.zero_grad()
        assert shards.norm is not None
        norms.append((shards.norm.item(), expected.item()))
    pairs = list(zip(ours.parameters(), right.parameters(), strict=True))
    assert all(isinstance(shards.state[p]["exp_avg"], DTensor) for p, _ in pairs)
    moments = [(shards.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"]) for p, q in pairs]
    # Lists, as a tensor would be gone with its rank.
    found = [(whole(p).tolist(), q.tolist()) for p, q in pairs + moments]
    return {"norms": norms, "numbers": found}


@pytest.mark.parametrize(
    ("copies", "ranks"), [(1, 2), pytest.param(2, 4, marks=pytest.mark.extended)]
)
def test_parts_move_as_the_whole_does(copies: int, ranks: int, tmp_path: Path):
    for found in on_ranks(on_ranks_of, ranks, tmp_path, copies, ranks):
        for norm, expected in found["norms"]:
            assert norm == pytest.approx(expected, rel=1e-5)
        for ours, right in found["numbers"]:
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(right))


@pytest.mark.extended
def test_a_training_clips_with_it_as_one_process_does(make_job):
    """Through the worker: the norm that is reported is that of all parts."""
    spec = {"adapter": None, "learning_rate": 1e-3, "max_steps": 6, "warmup_steps": 2}
    spec |= {"max_grad_norm": 0.1, "optimizer": "adamw_torch_fused"}
    kernels = {"kernels": ("cross_entropy",), "micro_batch_size": 1}
    alone = make_job("alone", spec, kernels)
    train(alone)
    job = make_job("divided", spec, kernels | {"sharding": Sharding(fsdp=FSDP)})
    said = run_ranks(job, 2)
    assert any("AdamW clips and steps in one pass of this process's part" in line for line in said)
    assert losses(job.metrics_path) == pytest.approx(losses(alone.metrics_path), abs=1e-4)
    assert norms(job) == pytest.approx(norms(alone), rel=1e-3)


def norms(job: Any) -> dict[int, float]:
    return {r["step"]: r["grad_norm"] for r in read_metrics(job.metrics_path) if "loss" in r}

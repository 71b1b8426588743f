"""bitsandbytes' optimizers step what FSDP2 divides, and lose nothing of their states."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from regrow.tasks.stage import StageError
from regrow.tasks.train.block_states import SHARDS, of_this_shard
from regrow.tasks.train.files import SavedState, write_state
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.shard_steps import ShardSteps, stepping_shards
from regrow.tasks.train.state import TorchEngine
from regrow.tasks.train.worker import train
from tests.gloo_ranks import on_ranks
from tests.tasks.train.ranks import WAYS, losses, resumed_after, run_and_kill, run_ranks
from tests.tasks.train.tiny_models import write_llama

bitsandbytes = pytest.importorskip("bitsandbytes")

KINDS: dict[str, dict[str, Any]] = {
    "AdamW8bit": {},
    "PagedAdamW8bit": {},
    "AdamW32bit": {},
    "Lion8bit": {"betas": (0.9, 0.99)},
    "Lion32bit": {"betas": (0.9, 0.99)},
    "RMSprop8bit": {},
    "RMSprop32bit": {},
    "AdEMAMix8bit": {},
    "AdEMAMix": {},
}
STEPS, HALF = 6, 3

Weights = dict[str, np.ndarray]
"""Of all parameters, whole; a process that has ended cannot hand over torch's tensors."""


class Net(nn.Module):
    """Matrices that are cut within blocks of 256, a small one, and parts that are empty or uneven:
    2 rows, and 7 rows of 900, of which three processes hold 3, 3 and 1, fewer than 4096 numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(100, 72), (7, 900), (2, 2100), (30, 9)]
        self.layers = nn.ModuleList([nn.Linear(width, rows) for rows, width in sizes])
        self.words = nn.Embedding(97, 72)

    def forward(self) -> None:
        """Never called: the gradients are made up."""


def optimizer_of(kind: str, model: Any) -> Any:
    """As the Trainer makes it: the states of embeddings stay in 32 bits."""
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()  # it keeps what it was told of earlier optimizers
    manager.register_module_override(model.words, "weight", {"optim_bits": 32})
    cls = stepping_shards(getattr(bitsandbytes.optim, kind))
    return cls(model.parameters(), lr=1e-2, weight_decay=0.1, **KINDS[kind])


def trained(
    kind: str, first: int, last: int, start: Path | None = None, out: Path | None = None
) -> Weights:
    """The weights after steps `first` to `last`; from a checkpoint, into one."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    model, group = Net(), torch.distributed.group.WORLD if ranks > 1 else None
    if ranks > 1:
        fully_shard(model)
    optimizer = optimizer_of(kind, model)
    engine = TorchEngine(model, optimizer)
    if start is not None:
        engine.restore(SavedState(start, group))
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient: Any = torch.randn(parameter.shape, generator=random)
            if isinstance(parameter, DTensor):
                mesh, places = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, mesh, places, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()
    if out is not None:
        rank = torch.distributed.get_rank() if ranks > 1 else 0
        write_state(engine.capture(), out, {}, rank, group)
    return {name: weight.numpy() for name, weight in engine.whole_weights()}


def undisturbed_and_resumed(directory: Path) -> dict[str, Any]:
    """Of each kind: the weights of all steps, and of the second half after a checkpoint."""
    found = {}
    for kind in KINDS:
        saved = directory / kind
        straight = trained(kind, 0, STEPS)
        trained(kind, 0, HALF, out=saved)
        found[kind] = straight, trained(kind, HALF, STEPS, saved)
    return found


def second_half(kinds: list[str], directory: Path) -> dict[str, Any]:
    return {kind: trained(kind, HALF, STEPS, directory / kind) for kind in kinds}


def difference(ours: Weights, theirs: Weights) -> float:
    return max(np.abs(ours[name] - theirs[name]).max().item() for name in theirs)


def tolerance(kind: str) -> float:
    """Six steps of 1e-2; a number in 8 bits is off by up to 1/30 of itself, and small ones beside
    large ones by more (`create_dynamic_map`)."""
    return 3e-2 if "8bit" in kind else 1e-6


@pytest.mark.slow
def test_each_kind_follows_one_process_and_resumes_to_the_bit(tmp_path):
    found = on_ranks(undisturbed_and_resumed, 2, tmp_path, tmp_path)[0]
    for kind, (straight, resumed) in found.items():
        assert all(np.array_equal(straight[name], resumed[name]) for name in straight), kind
        assert difference(straight, trained(kind, 0, STEPS)) < tolerance(kind), kind
        # And one process goes on from the two.
        alone = trained(kind, HALF, STEPS, tmp_path / kind)
        assert difference(straight, alone) < tolerance(kind), kind


@pytest.mark.slow
def test_three_processes_go_on_from_one_with_uneven_and_empty_parts(tmp_path):
    kinds = ["AdamW8bit", "AdEMAMix8bit", "AdamW32bit"]
    for kind in kinds:
        trained(kind, 0, HALF, out=tmp_path / kind)
    found = on_ranks(second_half, 3, tmp_path, kinds, tmp_path)[0]
    for kind in kinds:
        assert difference(found[kind], trained(kind, 0, STEPS)) < tolerance(kind), kind


def quantized_in_parts(values: torch.Tensor, shards: int) -> dict[str, Any]:
    """A state as `shards` processes save it."""
    parts = values.chunk(shards) if shards > 1 else (values,)
    table = bitsandbytes.functional.create_dynamic_map()
    made = [bitsandbytes.functional.quantize_blockwise(p, table, blocksize=256) for p in parts]
    blocks = made[0][1].absmax.numel()
    scales = [nn.functional.pad(s.absmax, (0, blocks - s.absmax.numel())) for _, s in made]
    scales += [torch.zeros(blocks)] * (shards - len(parts))
    codes = torch.cat([codes for codes, _ in made])
    return {
        SHARDS: shards,
        "state1": codes,
        "qmap1": table,
        "absmax1": torch.cat(scales),
        "step": 3,
    }


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 9])
def test_states_of_any_number_of_parts_are_read_as_the_numbers_they_stand_for(shards):
    torch.manual_seed(0)
    values = torch.randn(7, 900)
    saved = quantized_in_parts(values, shards)
    found = of_this_shard(saved, torch.empty(7, 900))
    assert SHARDS not in found
    assert found["step"] == 3
    scales = found["absmax1"].repeat_interleave(256)[: values.numel()].view_as(values)
    read = found["qmap1"][found["state1"].int()] * scales
    assert (read - values).abs().max() < 0.02 * values.abs().max() * (1 if shards == 1 else 2)
    if shards == 1:
        assert torch.equal(found["state1"], saved["state1"])


def test_other_optimizers_are_left_as_they_are():
    assert stepping_shards(torch.optim.AdamW) is torch.optim.AdamW
    made = stepping_shards(bitsandbytes.optim.AdamW8bit)
    assert issubclass(made, ShardSteps)
    assert "bitsandbytes" in str(made)  # by which Transformers keeps embeddings in 32 bits


# ---- whole trainings ----


@pytest.fixture(scope="session")
def wide_model_dir(tmp_path_factory):
    """A random Llama whose matrices are large enough for states in 8 bits."""
    sizes = {"hidden_size": 72, "intermediate_size": 100, "tie_word_embeddings": False}
    return write_llama(tmp_path_factory.mktemp("wide-model"), **sizes)


@pytest.fixture
def job_of(make_job, wide_model_dir):
    """job_of(name, FSDP2 or not, key): ten clipped steps of 4 rows, a checkpoint at each third."""
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    spec = {"optimizer": "adamw_bnb_8bit", "max_grad_norm": 0.5, "adapter": None}

    def make(name, way="fsdp2", key=None):
        placement = {
            "micro_batch_size": 1,
            "sharding": WAYS[way],
            "saving": Cadence(steps=3),
            "base_model": str(wide_model_dir),
        }
        job = make_job(name, spec | {"max_steps": 10, "learning_rate": 1e-3}, placement, key)
        return dataclasses.replace(job, base_model=wide_model_dir)

    return make


@pytest.mark.extended
@pytest.mark.parametrize("way", ["fsdp2", "zero2", "zero3"])
def test_a_training_on_two_ranks_follows_one_and_loses_nothing_when_killed(job_of, way, file_bytes):
    if "zero" in way:
        pytest.importorskip("deepspeed")
    alone = job_of("alone", "ddp")
    train(alone)
    calm = job_of("calm", way, "checkpoints/calm")
    run_ranks(calm, 2)
    assert losses(calm.metrics_path) == pytest.approx(losses(alone.metrics_path), abs=1e-3)
    killed = job_of("killed", way, "checkpoints/killed")
    run_and_kill(killed, 2, step=8, rank=1)
    resumed = job_of("resumed", way, "checkpoints/killed")
    assert resumed_after(run_ranks(resumed, 2)) == 6
    assert losses(resumed.metrics_path) == losses(calm.metrics_path)
    assert file_bytes(resumed.out) == file_bytes(calm.out)
    if "zero" in way:  # one process cannot cut these states into those of its parameters
        with pytest.raises(StageError, match="2 processes with DeepSpeed's ZeRO"):
            train(job_of("one", "ddp", "checkpoints/killed"))

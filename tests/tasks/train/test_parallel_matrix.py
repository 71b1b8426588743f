"""Two real ranks, laid out in every way: the same curve as one rank, killed and resumed or not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.worker import train
from tests.tasks.train.ranks import (
    WAYS,
    check_division,
    follows,
    losses,
    needs_deepspeed,
    pass_on,
    resumed_after,
    run_and_kill,
    run_ranks,
    tensors,
)
from tests.tasks.train.weighing_worker import Held, Weigh

# Each way once; the others, and those that share rows (context parallelism), are `extended`. Full
# weights go through all four in the chains below too.
IN_CI = (("ddp", "lora"), ("fsdp2", "full"), ("zero2", "full"), ("zero3", "lora"))
CELLS = [
    pytest.param(
        way,
        kind,
        marks=[pytest.mark.slow if (way, kind) in IN_CI else pytest.mark.extended]
        + [needs_deepspeed] * ("zero" in way),
        id=f"{way}-{kind}",
    )
    for way in WAYS
    for kind in ("lora", "full")
]
STEPS = 20
SPEC = {"max_steps": STEPS, "warmup_steps": 3}
KINDS = {"lora": {}, "full": {"adapter": None, "learning_rate": 1e-3}}


def saved_in_parts(job) -> bool:
    """Whether ranks saved parts of tensors."""
    for path in (job.out.parents[1] / "store" / job.checkpoints.key).glob("**/shard-*.safetensors"):
        with safe_open(path, "pt") as file:
            parts = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        if any(any(part["saved_offsets"]) for part in parts.values()):
            return True
    return False


def check_reading(way, job, alone):
    """Ranks that share rows read each a part of every row, others half of the rows."""
    (whole,), held = Held.read(alone.work), Held.read(job.work)
    assert sum(rank.tokens for rank in held) >= whole.tokens
    for rank in held:
        assert rank.forwards == (whole.forwards if "cp" in way else whole.forwards / 2)
        assert "cp" not in way or rank.tokens < 0.6 * whole.tokens


@pytest.fixture
def job_of(make_job):
    """job_of(name, kind, way, key): 20 steps of 4 rows, a checkpoint at every fourth step."""

    def make(name, kind, way="ddp", key=None):
        placement = {
            # Two micro-batches of a rank in each step, or four of the only one.
            "micro_batch_size": 1,
            "sharding": WAYS[way],
            "saving": Cadence(steps=4),
            "evaluation": Cadence(steps=10),
        }
        return make_job(name, SPEC | KINDS[kind], placement, key)

    return make


@pytest.mark.parametrize(("way", "kind"), CELLS)
def test_two_ranks_follow_one_and_lose_nothing_when_killed(job_of, way, kind, file_bytes):
    alone = job_of("alone", kind)
    train(alone, [Weigh(alone.work)])
    calm = job_of("calm", kind, way, "checkpoints/calm")
    run_ranks(calm, 2)
    check_reading(way, calm, alone)
    assert saved_in_parts(calm) == ("fsdp2" in way)
    assert follows(calm, alone)

    killed = job_of("killed", kind, way, "checkpoints/killed")
    run_and_kill(killed, 2, step=11, rank=1)
    assert not killed.out.exists()
    resumed = job_of("resumed", kind, way, "checkpoints/killed")
    assert resumed_after(run_ranks(resumed, 2)) == 8
    assert losses(resumed.metrics_path) == losses(calm.metrics_path)
    assert file_bytes(resumed.out) == file_bytes(calm.out)


# From two ranks to one and back for each way, and from way to way with as many ranks.
CHAINS = {
    "whole-weights": [("ddp", 2), ("ddp", 1), ("zero2", 2), ("ddp", 1), ("ddp", 2)],
    "divided-weights": [("zero3", 2), ("ddp", 1), ("fsdp2", 2), ("ddp", 1), ("zero3", 2)],
    "ways": [("fsdp2", 2), ("ddp", 1), ("zero3", 2), ("ddp", 2), ("zero2", 2)],
}
CHAINED = [
    pytest.param(chain, kind, marks=pytest.mark.slow if in_ci else pytest.mark.extended)
    for chain in CHAINS
    for kind in KINDS
    for in_ci in [kind == "full" and chain != "ways"]
]


@needs_deepspeed
@pytest.mark.parametrize(("chain", "kind"), CHAINED)
def test_a_checkpoint_fits_every_other_way_and_number_of_ranks(job_of, chain, kind):
    alone = job_of("alone", kind)
    train(alone)
    last = pass_on(job_of, kind, CHAINS[chain])
    assert follows(last, alone)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_fits_another_context_parallel_size(job_of, kind):
    """Two ranks that share rows, then one, then four of which two each share rows."""
    alone = job_of("alone", kind)
    train(alone)
    last = pass_on(job_of, kind, [("cp-fsdp2", 2), ("ddp", 1), ("cp-fsdp2", 4)])
    assert follows(last, alone)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bfloat16_keeps_float32_weights_under_fsdp(make_job, kind):
    spec = SPEC | KINDS[kind] | {"dtype": "bfloat16"}
    alone = make_job("alone", spec)
    train(alone)
    sharded = make_job("sharded", spec, {"sharding": WAYS["fsdp2"]})
    run_ranks(sharded, 2)
    assert losses(sharded.metrics_path) == pytest.approx(losses(alone.metrics_path), abs=2e-2)
    if kind == "lora":
        assert all(tensor.dtype == torch.float32 for tensor in tensors(sharded).values())


WHOLE, HALF = Held(100, 100, 40, 40), Held(51, 100, 20, 40)


@pytest.mark.parametrize(
    ("way", "held"),
    [
        ("fsdp2", WHOLE),  # what FSDP2 on CPUs once was
        ("fsdp2", Held(51, 100, 40, 40)),
        ("cp-fsdp2", WHOLE),
        ("zero2", WHOLE),
        ("zero3", Held(100, 100, 20, 40)),
        ("ddp", HALF),
        ("cp", HALF),
    ],
)
def test_what_does_not_divide_as_it_should_is_found(job_of, way, held):
    job = job_of("a", "full", way)
    good = {"ddp": WHOLE, "cp": WHOLE, "zero2": Held(100, 100, 20, 40)}.get(way, HALF)
    check_division(job, [good, good], 2)
    with pytest.raises(AssertionError):
        check_division(job, [good, held], 2)
    with pytest.raises(AssertionError):
        check_division(job, [good], 2)

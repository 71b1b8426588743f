"""What the recipe may ask of FSDP2 and DeepSpeed beside their plain forms: one rank's result."""

from __future__ import annotations

import json
from typing import Any

import pytest

from regrow.configs.load import parse_recipe
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.spec import AdapterSpec, TrainPlacement
from regrow.tasks.train.worker import train
from tests.tasks.train.ranks import (
    FSDP,
    ROOT,
    follows,
    losses,
    needs_deepspeed,
    resumed_after,
    run_and_kill,
    run_ranks,
    zero,
)

STEPS = 8
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "full": {"adapter": None, "learning_rate": 1e-3}}


def fsdp(**options: Any) -> Sharding:
    return Sharding(fsdp=FSDP | options)


def zero2_on_host() -> Sharding:
    """ZeRO-2 whose optimizer steps in the host's memory; no shipped file asks for it."""
    config = json.loads(json.dumps(zero(2).deepspeed))
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return Sharding(deepspeed=config | {"zero_force_ds_cpu_optimizer": False})


def shipped(name: str) -> Sharding:
    """DeepSpeed as a shipped file says, in float32, for which the results are compared."""
    config = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())
    return Sharding(deepspeed=config | {"bf16": {"enabled": "auto"}})


FSDP_WAYS = {
    "copies": Sharding(fsdp=FSDP, dp_replicate_size=2),  # of four ranks: two of two shards
    "offload": fsdp(cpu_offload=True),
    "no-wrap": fsdp(auto_wrap_policy="NO_WRAP"),
    "load-once": fsdp(cpu_ram_efficient_loading=True),
    "load-once-offload": fsdp(cpu_offload=True, cpu_ram_efficient_loading=True),
}
ZERO_WAYS = {
    "zero1": zero(1),
    "zero2-offload": zero2_on_host(),
    "zero3-offload-params": shipped("zero3_bf16_cpuoffload_params"),
    "zero3-offload-all": shipped("zero3_bf16_cpuoffload_all"),
}
WAYS = FSDP_WAYS | ZERO_WAYS


@pytest.fixture
def job_of(make_job):
    """job_of(name, kind, sharding, key): 8 steps of 4 rows, a checkpoint after the fourth."""

    def make(name, kind, sharding=None, key=None):
        placement = {
            "micro_batch_size": 1,
            "sharding": sharding or Sharding(),
            "saving": Cadence(steps=4),
            "evaluation": Cadence(steps=4),
        }
        return make_job(name, {"max_steps": STEPS} | KINDS[kind], placement, key)

    return make


@pytest.mark.extended
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "way", [*FSDP_WAYS, *(pytest.param(way, marks=needs_deepspeed) for way in ZERO_WAYS)]
)
def test_each_option_leaves_the_result_as_it_was_killed_and_resumed(job_of, way, kind):
    alone = job_of("alone", kind)
    train(alone)
    ranks = 2 * WAYS[way].dp_replicate_size
    killed = job_of("killed", kind, WAYS[way], "checkpoints/a")
    run_and_kill(killed, ranks, step=6, rank=1)
    resumed = job_of("resumed", kind, WAYS[way], "checkpoints/a")
    assert resumed_after(run_ranks(resumed, ranks)) == 4
    assert follows(resumed, alone)


@pytest.mark.extended
def test_what_is_computed_again_drops_what_it_dropped_before(make_job):
    recipe = parse_recipe(
        {
            "base_model": "a/b",
            "datasets": [{"path": "c/d", "type": "alpaca"}],
            "learning_rate": 1e-2,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "fsdp_config": {"activation_checkpointing": True},
        }
    ).recipe
    wish = TrainPlacement.from_recipe(recipe, "a/b")
    dropout = AdapterSpec(r=4, alpha=8, dropout=0.5, target_linear=True)
    spec = {"max_steps": STEPS, "adapter": dropout}
    once = make_job("once", spec, {"sharding": wish.sharding})
    recomputed = {"sharding": wish.sharding, "gradient_checkpointing": wish.gradient_checkpointing}
    again = make_job("again", spec, recomputed)
    run_ranks(once, 2)
    run_ranks(again, 2)
    assert losses(again.metrics_path) == losses(once.metrics_path)
    assert json.loads(again.result_path.read_text())["timing"]["recomputes"] == "full"

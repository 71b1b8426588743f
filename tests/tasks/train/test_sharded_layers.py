"""Four real ranks, two for each layer, in two groups under FSDP2, train as one rank does."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.modeling.sharded_layers import check_shared_weight
from regrow.tasks.stage import StageError
from regrow.tasks.train import parallel
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.worker import train
from tests.tasks.train.ranks import FSDP, follows, pass_on, resumed_after, run_and_kill, run_ranks
from tests.tasks.train.tiny_models import write_llama

KINDS = {"lora": {}, "full": {"adapter": None, "learning_rate": 1e-3}}
BOTH = Sharding(fsdp=FSDP, tensor_parallel_size=2)
GATHERED = Sharding(fsdp=FSDP | {"reshard_after_forward": False}, tensor_parallel_size=2)


@pytest.fixture
def job_of(make_job, monkeypatch, tmp_path):
    """job_of(name, kind, sharding, key, steps): rows of 4, two micro-batches on each of two groups.

    The embedding, which is the head too, has rows for four even parts.
    """
    monkeypatch.setattr("tests.tasks.train.ranks.MODULE", "tests.tasks.train.cpu_tensor_parallel")
    base = write_llama(tmp_path / "base", vocab_size=100)

    def make(name, kind, sharding=None, key=None, steps=12):
        spec = {"max_steps": steps, "warmup_steps": 2} | KINDS[kind]
        placement = {
            "sharding": sharding or Sharding(),
            "micro_batch_size": 1,
            "saving": Cadence(steps=4),
            "evaluation": Cadence(steps=3),
        }
        return dataclasses.replace(make_job(name, spec, placement, key), base_model=base)

    return make


@pytest.mark.slow
def test_sharded_parts_of_layers_follow_one_rank(job_of):
    alone, both = (job_of(*what, steps=3) for what in (("alone", "full"), ("both", "full", BOTH)))
    train(alone)
    run_ranks(both, 4)
    assert follows(both, alone, weights=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_layers_that_are_computed_again_are_gathered_again(job_of, kind):
    alone, both = (job_of(*what, steps=3) for what in (("alone", kind), ("both", kind, BOTH)))
    place = dataclasses.replace(both.placement, gradient_checkpointing=True)
    train(alone)
    run_ranks(dataclasses.replace(both, placement=place), 4)
    assert follows(both, alone, weights=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize("sharding", [BOTH, GATHERED], ids=["reshards", "keeps-gathered"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sharded_parts_of_layers_train_as_whole_ones_when_killed(job_of, kind, sharding):
    alone = job_of("alone", kind)
    train(alone)
    killed = job_of("killed", kind, sharding, "checkpoints/killed")
    run_and_kill(killed, 4, step=9, rank=3)
    resumed = job_of("resumed", kind, sharding, "checkpoints/killed")
    assert resumed_after(run_ranks(resumed, 4)) == 8
    assert follows(resumed, alone, weights=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_of_sharded_parts_goes_on_whole_and_back(job_of, kind):
    alone = job_of("alone", kind)
    train(alone)
    last = pass_on(job_of, kind, [(BOTH, 4), (None, 1), (BOTH, 4)], steps=12)
    assert follows(last, alone, weights=1e-5)


def test_a_shared_weight_that_is_cut_unevenly_is_refused():
    shared = SimpleNamespace(weight=torch.zeros(98, 2))
    model = SimpleNamespace(
        get_input_embeddings=lambda: shared, get_output_embeddings=lambda: shared
    )
    check_shared_weight(model, 2)
    with pytest.raises(StageError, match="98 rows, which 4 processes"):
        check_shared_weight(model, 4)
    model.get_output_embeddings = lambda: SimpleNamespace(weight=torch.zeros(98, 2))
    check_shared_weight(model, 4)


@pytest.mark.parametrize(
    ("sharding", "spec", "why"),
    [
        (dataclasses.replace(BOTH, tensor_parallel_size=3), {}, "3 does not make 4 training"),
        (dataclasses.replace(BOTH, dp_shard_size=4), {}, "2 .* dp_shard_size 4 does not make 4"),
        (dataclasses.replace(BOTH, dp_replicate_size=2), {}, "no dp_replicate_size"),
        (BOTH, {"quantization": Quantization(4)}, "no quantized base"),
        (Sharding(fsdp=FSDP | {"cpu_offload": True}, tensor_parallel_size=2), {}, "offload_params"),
    ],
)
def test_what_cannot_be_sharded_too_is_refused(make_job, monkeypatch, sharding, spec, why):
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    monkeypatch.setattr(parallel, "_accelerate_takes_it", lambda device: True)
    job = make_job("a", spec, {"sharding": sharding})
    with pytest.raises(StageError, match=why):
        parallel.parallel_settings(job.spec, job.placement)


def test_neighbours_divide_layers_and_groups_of_them_read_different_rows(make_job, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    monkeypatch.setattr(parallel, "_accelerate_takes_it", lambda device: True)
    job = make_job("a", {}, {"sharding": BOTH, "micro_batch_size": 1})
    settings = parallel.parallel_settings(job.spec, job.placement)
    # Transformers lays the model out while it loads it: Accelerate is not to do it again.
    assert settings == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}

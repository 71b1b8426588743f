"""The loss that balances experts: Transformers' own for a row, however rows are split."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from regrow.tasks.modeling.expert_balance import Routers, balance_losses
from regrow.tasks.modeling.load import load_model
from regrow.tasks.stage import StageError
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.metrics import read_metrics
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.worker import train
from tests.tasks.train.killed import KillAt, Killed
from tests.tasks.train.ranks import WAYS, run_ranks
from tests.tasks.train.tiny_models import tiny_mixtral

BALANCED = {"router_aux_loss": True, "router_aux_loss_coef": 0.5}


@pytest.fixture(scope="session")
def mixtral_dir(tmp_path_factory) -> Path:
    """A random Mixtral of 2 layers and 4 experts, two for each token."""
    out = tmp_path_factory.mktemp("tiny-mixtral")
    model = tiny_mixtral()
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.data += 0.05
        if "gate.weight" in name:  # far from balanced: most tokens like the first expert
            parameter.data[0] += 0.1
    model.save_pretrained(out)
    return out


@pytest.fixture
def moe_job(make_job, mixtral_dir):
    """make_job for the mixture, all weights trained."""

    def make(name, spec=None, placement=None, key=None) -> WorkerJob:
        spec = {"adapter": None, "learning_rate": 1e-3, "max_steps": 4} | (spec or {})
        placement = {"base_model": str(mixtral_dir)} | (placement or {})
        job = make_job(name, spec, placement, key)
        return dataclasses.replace(job, base_model=mixtral_dir)

    return make


def test_of_one_row_it_is_what_transformers_adds():
    torch.manual_seed(0)
    logits = tuple(torch.randn(30, 4, requires_grad=True) for _ in range(3))
    theirs = load_balancing_loss_func(logits, 4, 2)
    torch.testing.assert_close(balance_losses(logits, (30,), 2)[0], theirs)


def test_padding_and_other_rows_do_not_count():
    torch.manual_seed(0)
    logits = [torch.randn(40, 4, requires_grad=True) for _ in range(3)]
    both = balance_losses(logits, (12, 20), 2)
    for row, (start, end) in enumerate([(0, 12), (12, 32)]):
        alone = balance_losses([layer[start:end] for layer in logits], (end - start,), 2)
        torch.testing.assert_close(both[row], alone[0])
    both.sum().backward()
    assert (logits[0].grad[32:] == 0).all()
    assert logits[0].grad[:32].abs().sum() > 0


def test_even_use_of_experts_is_the_least():
    even = torch.zeros(8, 4)
    even[torch.arange(8), torch.arange(8) % 4] = even[
        torch.arange(8), (torch.arange(8) + 1) % 4
    ] = 9
    uneven = torch.zeros(8, 4)
    uneven[:, :2] = 9
    with torch.no_grad():
        low, high = (balance_losses([x], (8,), 2).item() for x in (even, uneven))
    assert low == pytest.approx(2, abs=1e-3)
    assert high > 3.5


def weights(job) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(job.out.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture
def one_row_at_a_time(moe_job):
    job = moe_job("one", BALANCED, {"micro_batch_size": 1})
    train(job)
    return weights(job)


@pytest.mark.parametrize(
    "place",
    [
        {"micro_batch_size": 4},
        {"gradient_checkpointing": True},
        {"kernels": ("experts", "cross_entropy")},
    ],
    ids=str,
)
def test_any_split_and_way_gives_the_same_weights(moe_job, one_row_at_a_time, place):
    job = moe_job("other", BALANCED, place)
    train(job)
    other = weights(job)
    assert max((one_row_at_a_time[n] - other[n]).abs().max().item() for n in other) < 1e-4


def test_experts_become_balanced_and_the_reports_say_so(moe_job):
    spec = {"max_steps": 8, "learning_rate": 1e-2, "router_aux_loss_coef": 5.0}
    job = moe_job("balanced", BALANCED | spec, {"logging_steps": 1})
    result = train(job)
    seen = [r["router_aux_loss"] for r in read_metrics(job.metrics_path) if "loss" in r]
    assert sum(seen[-3:]) < sum(seen[:3])
    assert all("router_aux_loss" in r for r in result["history"] if "loss" in r)


def test_without_it_nothing_is_reported_and_validation_stays_plain(moe_job):
    at_start = {"learning_rate": 1e-9, "max_steps": 4}
    plain = train(moe_job("plain", at_start))
    balanced = train(moe_job("balanced", at_start | BALANCED))
    assert not any("router_aux_loss" in record for record in plain["history"])
    losses = [[e["loss"] for e in result["eval_losses"]] for result in (plain, balanced)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param("ddp", marks=pytest.mark.extended), "fsdp2"])
def test_two_ranks_balance_as_one(moe_job, way):
    """The mean over the rows of the global batch, whichever rank computes them."""
    place = {"micro_batch_size": 1, "logging_steps": 1}
    alone = moe_job("alone", BALANCED, place)
    train(alone)
    both = moe_job("both", BALANCED, place | {"sharding": WAYS[way]})
    run_ranks(both, 2)
    for name in ("loss", "router_aux_loss", "grad_norm"):
        ours, theirs = ([r[name] for r in steps(job)] for job in (both, alone))
        assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = weights(both), weights(alone)
    assert max((ours[n] - theirs[n]).abs().max().item() for n in theirs) < 1e-4


def steps(job) -> list[dict]:
    return [record for record in read_metrics(job.metrics_path) if "loss" in record]


def test_a_resumed_training_is_the_undisturbed_one(moe_job):
    whole = moe_job("whole", BALANCED)
    train(whole)
    job = moe_job("short", BALANCED, {"saving": Cadence(steps=2)}, key="k")
    with pytest.raises(Killed):
        train(job, [KillAt(3)])
    train(job)
    ours, theirs = weights(job), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_beside_it_trains(moe_job):
    adapter = AdapterSpec(r=4, alpha=8, target_linear=True, target_parameters=("gate.weight",))
    job = moe_job("adapter", BALANCED | {"adapter": adapter})
    assert all(r["router_aux_loss"] >= 1 for r in train(job)["history"] if "loss" in r)


def test_a_model_without_experts_says_so(model_dir):
    with pytest.raises(StageError, match=r"output_router_logits: .*LlamaForCausalLM"):
        Routers(load_model(model_dir, dtype="float32"))

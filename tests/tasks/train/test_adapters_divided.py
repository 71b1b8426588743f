"""Adapters on a divided base are computed by our kernels, which round a layer's output once.

PEFT adds an adapter's output to what its layer has given already, in bfloat16: what is smaller than
half a step of that number is lost, which is most of an adapter in its first updates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from regrow.tasks.forecast.job_setting import _kernels
from regrow.tasks.modeling.adapter import add_adapter
from regrow.tasks.modeling.kernels import swap_kernels
from regrow.tasks.modeling.load import load_model
from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.spec import TrainPlacement
from regrow.tasks.train.worker import train
from tests.gloo_ranks import on_ranks
from tests.tasks.modeling.models import packed_batch
from tests.tasks.train.ranks import losses, needs_deepspeed, run_ranks

FSDP = {"version": 2, "reshard_after_forward": True, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
DEEPSPEED = Path(__file__).parents[3] / "configs" / "deepspeed"
SPEC = {"max_steps": 12, "warmup_steps": 2}
KERNELS = ("attention", "mlp", "rms_norm", "cross_entropy")


@pytest.fixture
def job_of(make_job):
    """job_of(name, sharding, **spec): with all kernels, one row of a rank in a micro-batch."""

    def make(name: str, sharding: Sharding, **spec: Any) -> Any:
        changes = {"micro_batch_size": 1, "gradient_checkpointing": True, "sharding": sharding}
        return make_job(name, SPEC | spec, changes | {"kernels": KERNELS})

    return make


def quantized(directory: Path) -> Any:
    """In nf4, under an adapter that has learnt something, computed by our kernels."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}
    settings["bnb_4bit_compute_dtype"] = "bfloat16"
    base = load_model(directory, dtype="bfloat16", quantization=Quantization(4, settings))
    torch.manual_seed(0)
    model = add_adapter(base, r=4, alpha=8, target_linear=True)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
    swap_kernels(model, ("attention", "mlp"))
    return model.train()


def computed(model: Any) -> tuple[float, dict[str, list[Any]], list[str]]:
    """(loss, gradients of the adapter, names of the layers whose own forward was called)."""
    called: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.register_forward_hook(lambda *_, name=name: called.append(name))  # type: ignore
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**packed_batch(), use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    return loss.item(), {n: g.tolist() for n, g in whole.items()}, called


def on_two_ranks(directory: Path) -> tuple[Any, Any]:
    model: Any = quantized(directory)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    packed = [p for n, p in model.named_parameters() if n.endswith("q_proj.base_layer.weight")]
    assert packed
    assert all(isinstance(p, DTensor) for p in packed), "FSDP2 divides the quantized weights"
    return computed(model), computed(quantized(directory))


@pytest.mark.slow
def test_fsdp2_gathers_weights_in_4_bits_for_the_kernels(tiny_llama_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    for ours, right in on_ranks(on_two_ranks, 2, tmp_path, tiny_llama_dir):
        assert ours[2] == right[2] == []
        assert ours[0] == pytest.approx(right[0], abs=1e-6)
        for name, gradient in right[1].items():
            torch.testing.assert_close(torch.tensor(ours[1][name]), torch.tensor(gradient))


def test_a_forecast_counts_with_the_kernels_that_run():
    for stage, kept in ((2, KERNELS), (3, ("attention", "mlp", "rms_norm"))):
        sharding = Sharding(deepspeed={"zero_optimization": {"stage": stage}})
        placement = TrainPlacement("model", sharding=sharding, kernels=KERNELS)
        assert _kernels(placement) == kept
    by_size = Sharding(fsdp=FSDP | {"auto_wrap_policy": "SIZE_BASED_WRAP"})
    assert by_size.kernels_apart == ("attention", "mlp", "experts", "cross_entropy")


@needs_deepspeed
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, id="lora", marks=pytest.mark.slow),
        pytest.param(
            {"adapter": None, "learning_rate": 1e-3}, id="full", marks=pytest.mark.extended
        ),
    ],
)
def test_zero_3_gathers_what_the_kernels_take(job_of, kind):
    alone = job_of("alone", Sharding(), **kind)
    train(alone)
    zero3 = json.loads((DEEPSPEED / "zero3.json").read_text())
    job = job_of("zero3", Sharding(deepspeed=zero3), **kind)
    said = run_ranks(job, 2)
    assert any("attention in 2 modules, mlp in 2 modules" in line for line in said), said
    assert losses(job.metrics_path) == pytest.approx(losses(alone.metrics_path), abs=1e-4)

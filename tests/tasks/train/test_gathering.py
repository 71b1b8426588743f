"""FSDP2 that sends rounded matrices: the numbers of one process, float32 states, nothing lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from regrow.tasks.modeling.attention import register
from regrow.tasks.modeling.batches import IGNORED, rows_to_learn
from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
from regrow.tasks.modeling.loss_head import LossTerms
from regrow.tasks.train.gathering import (
    _lay_out,
    _leaves_one_empty,
    _why_not,
    reshard,
    rounds_before_sending,
)
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.spec import AdapterSpec, TrainSpec
from regrow.tasks.train.trainers.loop import follow_autocast
from regrow.tasks.train.worker import train
from tests.gloo_ranks import on_ranks
from tests.tasks.train.ranks import losses, run_and_kill, run_ranks

FSDP = {"version": 2, "reshard_after_forward": True, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tiny(family: str, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "gemma": (GemmaConfig, GemmaForCausalLM),
    }[family]
    made = model(config(**SMALL, tie_word_embeddings=tied))
    for name, weight in made.named_parameters():
        if "norm" in name:  # numbers that bfloat16 does not have
            weight.data += 0.001 * torch.randn(weight.shape)
    return made


def layers_of(model: Any) -> list[Any]:
    return list(model.model.layers)


def computed(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of rows that are the same on every rank, and all gradients in full."""
    follow_autocast(model.get_input_embeddings())
    model.gradient_checkpointing_enable()
    model.train()
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (1, 2048), generator=random)
    ids[:, ::2] = 7  # its row of the embedding's gradient is a sum over many tokens
    labels = ids.clone()
    labels[:, ::3] = IGNORED
    lengths = torch.tensor([0, 1000, 2048], dtype=torch.int32)
    rows = rows_to_learn(torch.nn.functional.pad(labels[0, 1:], (0, 1), value=IGNORED)) | {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(1000), torch.arange(1048)])[None],
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": 1048,
        "max_length_k": 1048,
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**rows, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: whole(p.grad) for name, p in model.named_parameters()}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def with_kernels(model: Any) -> Any:
    register()
    model.set_attn_implementation("regrow_packed")
    swap_kernels(model, KERNELS, LossTerms(), whole_layers=True)
    return model


def on_two_ranks(family: str, tied: bool) -> dict[str, Any]:
    """What two ranks compute, what they gather, and what they hold before and after."""
    model: Any = with_kernels(tiny(family, tied))
    layers = layers_of(model)
    assert _why_not(model, layers, 2) == ""
    _lay_out(model, layers, torch.bfloat16, True, {"offload_policy": OffloadPolicy()})
    seen: dict[str, set[torch.dtype]] = {"norm": set(), "matrix": set()}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        for name, weight in layers[0].named_parameters():
            assert not isinstance(weight, DTensor)
            seen["norm" if "norm" in name else "matrix"].add(weight.dtype)

    layers[0].mlp.register_forward_hook(note)
    loss, gradients = computed(model)
    expected_loss, expected = computed(with_kernels(tiny(family, tied)))
    model.zero_grad()
    held = {name: (type(p), p.dtype) for name, p in model.named_parameters()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ids = torch.arange(8)[None]
        lengths = torch.tensor([0, 8], dtype=torch.int32)
        keys = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
        model(ids, position_ids=ids, max_length_q=8, max_length_k=8, **keys)
    reshard(model)
    after = {name: (type(p), p.dtype) for name, p in model.named_parameters()}
    return {
        "loss": loss - expected_loss,
        "gradients": {
            name: ((gradients[name] - wanted).norm() / wanted.norm()).item()
            for name, wanted in expected.items()
        },
        "seen": seen,
        "held": set(held.values()),
        "after": set(after.values()),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("gemma", True)]
)
def test_rounded_matrices_and_exact_norms_give_the_loss_of_autocast(
    family: str, tied: bool, tmp_path: Path
):
    for found in on_ranks(on_two_ranks, 2, tmp_path, family, tied):
        assert found["loss"] == pytest.approx(0, abs=1e-6)
        assert found["seen"] == {"norm": {torch.float32}, "matrix": {torch.bfloat16}}
        assert found["held"] == found["after"]
        assert {dtype for _, dtype in found["held"]} == {torch.float32}
        # Of a matrix one rounding to 8 bits more, where the kernels give float32 gradients.
        assert max(found["gradients"].values()) < 0.01, found["gradients"]


SPEC = {
    "dtype": "bfloat16",
    "adapter": None,
    "learning_rate": 1e-3,
    "max_steps": 12,
    "warmup_steps": 3,
}


@pytest.fixture
def job_of(make_job):
    """job_of(name, key, **placement): 12 steps of 4 rows in bfloat16, kept at every fourth."""

    def make(name, key=None, **placement):
        every = {"saving": Cadence(steps=4), "evaluation": Cadence(steps=4)}
        kernels = {"kernels": ("attention", "mlp", "rms_norm", "cross_entropy")}
        changes = {"micro_batch_size": 1, "gradient_checkpointing": True}
        return make_job(name, SPEC, changes | every | kernels | placement, key)

    return make


@pytest.mark.extended
def test_a_training_that_sends_rounded_matrices_loses_nothing_when_killed(job_of, file_bytes):
    """Also checkpoints are float32 and fit one process."""
    sharding = Sharding(fsdp=FSDP)
    alone = job_of("alone")
    train(alone)
    calm = job_of("calm", "checkpoints/calm", sharding=sharding)
    said = run_ranks(calm, 2)
    assert any("FSDP sends matrices in bfloat16" in line for line in said)
    assert losses(calm.metrics_path) == pytest.approx(losses(alone.metrics_path), abs=1e-3)

    killed = job_of("killed", "checkpoints/killed", sharding=sharding)
    run_and_kill(killed, 2, step=7, rank=1)
    resumed = job_of("resumed", "checkpoints/killed", sharding=sharding)
    said = run_ranks(resumed, 2)
    assert any("resuming after step" in line for line in said)
    assert losses(resumed.metrics_path) == losses(calm.metrics_path)
    assert file_bytes(resumed.out) == file_bytes(calm.out)

    course = job_of("other", "checkpoints/other", sharding=sharding)
    run_and_kill(course, 2, step=7, rank=0)
    one = job_of("one", "checkpoints/other")
    train(one)
    assert losses(one.metrics_path) == pytest.approx(losses(alone.metrics_path), abs=1e-3)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"reshard_after_forward": False}, {}),
        ({}, {"unfrozen": ("model.layers.1", "model.norm")}),
    ],
)
def test_what_fsdp_is_asked_for_goes_with_rounded_matrices(make_job, options, change):
    spec = SPEC | change
    alone = make_job("alone", spec)
    train(alone)
    calm = make_job("calm", spec, {"sharding": Sharding(fsdp=FSDP | options)})
    said = run_ranks(calm, 2)
    assert any("FSDP sends matrices in bfloat16" in line for line in said)
    assert losses(calm.metrics_path) == pytest.approx(losses(alone.metrics_path), abs=1e-3)


def test_experts_and_unknown_layers_are_sent_as_they_are():
    config = Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16)
    mixture = Qwen3MoeForCausalLM(config)
    assert "large weights" in _why_not(mixture, list(mixture.model.layers), 2)
    assert "layers" in _why_not(mixture, [], 2)
    dense: Any = tiny("llama", False)
    assert "33 parts" in _why_not(dense, layers_of(dense), 33)


def test_only_whole_models_in_bfloat16_travel_rounded():
    spec = TrainSpec(
        base_model_digest="0" * 64,
        dtype="bfloat16",
        global_batch_size=1,
        num_epochs=1,
        learning_rate=1e-4,
    )
    fsdp = Sharding(fsdp=FSDP)
    assert rounds_before_sending(spec, fsdp)
    assert not rounds_before_sending(spec, Sharding())
    for change in ({"dtype": "float32"}, {"adapter": AdapterSpec(r=1, alpha=1)}, {"fp8": True}):
        assert not rounds_before_sending(dataclasses.replace(spec, **change), fsdp)
    for change in (
        {"cpu_ram_efficient_loading": True},
        {"auto_wrap_policy": "SIZE_BASED_WRAP"},
    ):
        assert not rounds_before_sending(spec, Sharding(fsdp=FSDP | change))


def test_a_weight_with_too_few_rows_is_known_as_torch_divides_it():
    for rows in range(1, 140):
        for processes in range(1, 50):
            parts = torch.empty(rows).chunk(processes)
            assert _leaves_one_empty(rows, processes) == (len(parts) < processes)

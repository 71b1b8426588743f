"""Two real ranks that each hold a part of every layer train as one rank does."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.modeling.quantized_parts import divide_adapters
from regrow.tasks.modeling.tensor_parallel import (
    check_accumulation,
    check_adapter,
    check_divided,
    check_vocabulary,
)
from regrow.tasks.stage import StageError
from regrow.tasks.train import parallel
from regrow.tasks.train.readers import Reader
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.spec import AdapterSpec
from regrow.tasks.train.worker import train
from tests.tasks.train.ranks import (
    follows,
    largest_difference,
    losses,
    needs_deepspeed,
    pass_on,
    resumed_after,
    run_and_kill,
    run_ranks,
    zero,
)
from tests.tasks.train.tiny_models import write_llama

STEPS = 20
SPEC = {"max_steps": STEPS, "warmup_steps": 3}
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
KINDS = {
    "lora": {},
    "full": {"adapter": None, "learning_rate": 1e-3},
    "qlora": {"quantization": Quantization(4, NF4)},
    "double": {"quantization": Quantization(4, NF4 | {"bnb_4bit_use_double_quant": True})},
}
TWO = Sharding(tensor_parallel_size=2)


@pytest.fixture
def job_of(make_job, monkeypatch):
    """job_of(name, kind, sharding, key): 20 steps of 4 rows in two micro-batches."""
    monkeypatch.setattr("tests.tasks.train.ranks.MODULE", "tests.tasks.train.cpu_tensor_parallel")

    def make(name, kind, sharding=None, key=None):
        placement = {
            "sharding": sharding or Sharding(),
            "saving": Cadence(steps=4),
            "evaluation": Cadence(steps=10),
        }
        return make_job(name, SPEC | KINDS[kind], placement, key)

    return make


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_divided_layers_train_as_whole_ones_and_lose_nothing_when_killed(job_of, kind, file_bytes):
    alone = job_of("alone", kind, key="checkpoints/alone")
    result = train(alone)
    killed = job_of("killed", kind, TWO, "checkpoints/killed")
    run_and_kill(killed, 2, step=11, rank=1)
    resumed = job_of("resumed", kind, TWO, "checkpoints/killed")
    assert resumed_after(run_ranks(resumed, 2)) == 8
    assert follows(resumed, alone, weights=1e-4)
    found = json.loads(resumed.result_path.read_text())
    for name in ("tokens", "supervised_tokens", "trainable_parameters"):
        assert found[name] == result[name]
    for ours, theirs in zip(found["eval_losses"], result["eval_losses"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.fixture
def wide_job_of(job_of, tmp_path):
    """job_of on a base of which 64 numbers in a row, that share a scale, are of one rank.

    (bitsandbytes 0.50.2 dequantizes wrongly on CPUs where a layer's inputs are no multiple of 64.)
    """
    base = write_llama(tmp_path / "model", hidden_size=128, intermediate_size=256)
    return lambda *args, **keys: dataclasses.replace(job_of(*args, **keys), base_model=base)


@pytest.mark.extended
def test_layers_divided_in_4_bits_train_as_whole_ones_when_killed(wide_job_of, file_bytes):
    alone = wide_job_of("alone", "qlora")
    train(alone)
    killed = wide_job_of("killed", "qlora", TWO, "checkpoints/killed")
    run_and_kill(killed, 2, step=11, rank=1)
    resumed = wide_job_of("resumed", "qlora", TWO, "checkpoints/killed")
    assert resumed_after(run_ranks(resumed, 2)) == 8
    assert follows(resumed, alone, weights=1e-4)
    ours, theirs = file_bytes(resumed.out), file_bytes(alone.out)
    assert ours.keys() == theirs.keys()
    assert json.loads(ours["adapter_config.json"]) == json.loads(theirs["adapter_config.json"])


@pytest.mark.extended
def test_scales_of_parts_in_8_bits_leave_the_curve_as_it_was(wide_job_of):
    """Double quantization rounds them otherwise than those of the whole; losses are around 4.4."""
    alone, divided = wide_job_of("alone", "double"), wide_job_of("divided", "double", TWO)
    train(alone)
    run_ranks(divided, 2)
    ours, theirs = losses(divided.metrics_path), losses(alone.metrics_path)
    apart = max(abs(ours[step] - theirs[step]) for step in theirs)
    print(f"losses within {apart:.1e}, weights within {largest_difference(divided, alone):.1e}")
    assert 0 < apart < 2e-3


@pytest.mark.extended
def test_a_checkpoint_of_layers_in_4_bits_goes_on_whole_and_back(wide_job_of):
    alone = wide_job_of("alone", "qlora")
    train(alone)
    last = pass_on(wide_job_of, "qlora", [(TWO, 2), (None, 1), (TWO, 2)])
    assert follows(last, alone, weights=1e-4)


@needs_deepspeed
@pytest.mark.extended
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_of_divided_layers_goes_on_whole_and_back(job_of, kind):
    """Also under ZeRO-2, whose optimizer does not know the names of what it steps."""
    alone = job_of("alone", kind)
    train(alone)
    last = pass_on(job_of, kind, [(TWO, 2), (None, 1), (TWO, 2), (zero(2), 2), (TWO, 2)])
    assert follows(last, alone, weights=1e-4)


def test_processes_that_divide_layers_read_the_same_rows_and_count_them_once():
    readers = [Reader.of(TWO, rank, 4) for rank in range(4)]
    assert [(r.rank, r.count, r.counts) for r in readers] == [
        (0, 2, True),
        (0, 2, False),
        (1, 2, True),
        (1, 2, False),
    ]
    assert {r.context for r in readers} == {(0, 1)}


def test_processes_that_share_rows_have_each_a_part():
    readers = [Reader.of(Sharding(context_parallel_size=2), rank, 4) for rank in range(4)]
    assert [(r.rank, r.context) for r in readers] == [
        (0, (0, 2)),
        (0, (1, 2)),
        (1, (0, 2)),
        (1, (1, 2)),
    ]
    assert [r.counts for r in readers] == [True, False, True, False]


@pytest.mark.parametrize(
    ("processes", "spec", "on_gpu", "why"),
    [
        (4, {}, True, "2 of 4 training processes"),
        (2, {"quantization": Quantization(8)}, True, "in 4 bits alone"),
        (2, {"quantization": Quantization(4, experts=True)}, True, "in 4 bits alone"),
        (
            2,
            {"optimizer": "muon", "reinit_weights": True},
            True,
            "no optimizer: muon, .*reinit_wei",
        ),
        (2, {"loraplus_lr_ratio": 2.0}, True, "no learning rate for some layers"),
        (2, {}, False, "on GPUs only"),
    ],
)
def test_what_cannot_be_divided_is_refused(make_job, monkeypatch, processes, spec, on_gpu, why):
    monkeypatch.setattr(parallel, "world_size", lambda: processes)
    monkeypatch.setattr(parallel, "_accelerate_takes_it", lambda device: on_gpu)
    job = make_job("a", spec, {"sharding": TWO})
    with pytest.raises(StageError, match=why):
        parallel.parallel_settings(job.spec, job.placement)


def test_processes_that_are_no_groups_are_refused(make_job, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    job = make_job("a", placement={"sharding": Sharding(context_parallel_size=2)})
    with pytest.raises(StageError, match="3 training processes in all are no groups of 2"):
        parallel.parallel_settings(job.spec, job.placement)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"init": "pissa"}, "'pissa' need whole layers"),
        ({"dora": True}, "DoRA"),
        ({"trained_whole": True}, "lora_modules_to_save"),
    ],
)
def test_adapters_that_need_whole_layers_are_refused(changes, why):
    plain = AdapterSpec(r=4, alpha=8)
    check_adapter(plain.init, dora=False, trained_whole=False)
    with pytest.raises(StageError, match=why):
        check_adapter(**({"init": True, "dora": False, "trained_whole": False} | changes))


def test_a_divided_embedding_does_not_grow():
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=0)
        )
    check_vocabulary(model, 9)
    with pytest.raises(StageError, match="10 tokens, more than"):
        check_vocabulary(model, 10)


def test_norms_whose_gradients_would_be_summed_too_often_are_refused():
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.device("meta"):
        qwen3 = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=4))
        llama = LlamaForCausalLM(LlamaConfig(**sizes))
    check_accumulation(llama)
    with pytest.raises(StageError, match="k_norm, q_norm of this architecture"):
        check_accumulation(qwen3)
    names = [
        (n, SimpleNamespace(requires_grad="norm" not in n)) for n, _ in qwen3.named_parameters()
    ]
    frozen = SimpleNamespace(tp_plan=qwen3.tp_plan, named_parameters=lambda: names)
    check_accumulation(frozen)


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", (tmp_path / "meeting").as_uri(), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_an_adapter_that_was_not_divided_with_its_layer_is_refused(one_process):
    """As PEFT 0.21.0 leaves it; found on two H200, in the first forward pass."""

    def divided(weight: torch.Tensor, way: Shard | Replicate) -> nn.Parameter:
        return nn.Parameter(DTensor.from_local(weight.detach(), one_process, [way]))

    layer = nn.Linear(4, 4)
    layer.weight = divided(layer.weight, Shard(0))
    adapted = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(StageError, match=r"PEFT .* does not divide adapters"):
        check_divided(adapted)
    (lora,) = (m for m in adapted.modules() if isinstance(m, LoraLayer))
    low = lora.lora_B["default"]
    low.weight = divided(low.weight, Shard(0))  # pyright: ignore[reportArgumentType]
    check_divided(adapted)


def test_an_adapter_on_a_part_in_4_bits_is_divided_as_it_was_drawn(one_process):
    """PEFT 0.21.2 takes the bytes of the base for the rows of the adapter."""
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    layer._hf_quantized_needs_local_tp = True  # as Transformers' own quantizers mark it
    model = nn.Sequential(layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with pytest.raises(StageError, match=r"PEFT .* does not divide adapters"):
        check_divided(adapted)
    (lora,) = (m for m in adapted.modules() if isinstance(m, LoraLayer))
    low, drawn = lora.lora_B["default"], lora.lora_B["default"].weight.detach().clone()
    wrong = DTensor.from_local(
        drawn, one_process, [Shard(0)], shape=torch.Size((1024, 2)), stride=(2, 1)
    )
    low.weight = nn.Parameter(wrong)  # pyright: ignore[reportArgumentType]
    assert divide_adapters(adapted)
    assert isinstance(low.weight, DTensor)
    assert low.weight.requires_grad
    assert torch.equal(low.weight.full_tensor(), drawn)
    check_divided(adapted)

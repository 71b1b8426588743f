"""Training on quantized experts: resumed, merged, and on two processes as on one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from regrow.tasks.merge import run as merge
from regrow.tasks.merge.spec import MergePlacement, MergeSpec
from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.stage import Stage, StageJob
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.worker import train
from tests.tasks.train.killed import KillAt, Killed
from tests.tasks.train.ranks import losses, run_ranks
from tests.tasks.train.tiny_models import tiny_mixtral

pytest.importorskip("bitsandbytes")

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
ADAPTER = AdapterSpec(
    r=4,
    alpha=8,
    target_modules=("q_proj", "v_proj"),
    target_parameters=("experts.down_proj", "experts.gate_up_proj"),
)
KINDS = {
    "nf4": Quantization(4, NF4, experts=True),
    "int8": Quantization(8, experts=True),
}
FSDP = {
    "version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
    "cpu_ram_efficient_loading": True,
    "state_dict_type": "FULL_STATE_DICT",
}


@pytest.fixture(scope="session")
def mixtral_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny-mixtral")
    tiny_mixtral(hidden_size=64, intermediate_size=64).save_pretrained(out)
    return out


@pytest.fixture
def moe_job(make_job, mixtral_dir):
    def make(name, kind, placement=None, key=None):
        spec = {"adapter": ADAPTER, "quantization": KINDS[kind], "max_steps": 5}
        job = make_job(name, spec, {"base_model": str(mixtral_dir)} | (placement or {}), key)
        return dataclasses.replace(job, base_model=mixtral_dir)

    return make


class Silent:
    def progress(self, *args):
        pass

    def log(self, message):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_and_is_merged_into_the_plain_experts(moe_job, mixtral_dir, tmp_path, kind):
    whole = moe_job("whole", kind)
    result = train(whole)
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in result["history"] if "loss" in r)
    job = moe_job("killed", kind, {"saving": Cadence(steps=2)}, key="k")
    with pytest.raises(Killed):
        train(job, [KillAt(3)])
    train(job)
    ours, theirs = (load_file(j.out / "adapter_model.safetensors") for j in (job, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    stage = Stage(
        "merge",
        1,
        MergeSpec("0" * 64, "float32", KINDS[kind]),
        "regrow.tasks.merge.run:run",
        placement=MergePlacement(str(mixtral_dir)),
    )
    out = tmp_path / "merged"
    out.mkdir()
    inputs = {"prepare": whole.prepared, "train": whole.out}
    merged = merge.run(StageJob(stage, inputs, {}, out, tmp_path, Silent(), None))
    assert merged["merge_error"] < 1e-4 * merged["logit_scale"] < merged["adapter_effect"]
    assert merged["quantization_effect"] > 0
    assert merged["trained_on"].endswith("experts too")
    before, after = (load_file(d / "model.safetensors") for d in (mixtral_dir, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("experts" in name for name in changed)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("kind", "sharding"),
    [("nf4", {}), ("nf4", {"fsdp": FSDP}), ("int8", {"fsdp": FSDP})],
    ids=["nf4-ddp", "nf4-fsdp2", "int8-fsdp2"],
)
def test_two_processes_train_as_one(moe_job, kind, sharding):
    one = moe_job("one", kind)
    train(one)
    two = moe_job("two", kind, {"sharding": Sharding(**sharding)})
    run_ranks(two, 2)
    ours, theirs = losses(two.metrics_path), losses(one.metrics_path)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-4
    result = json.loads(two.result_path.read_text())
    assert result["timing"]["world_size"] == 2
    weights = [load_file(job.out / "adapter_model.safetensors") for job in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0]) < 1e-3

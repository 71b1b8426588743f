"""The merged model does what base and adapter did, and a merge that does not is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow.tasks.merge import run as merge
from regrow.tasks.merge.fidelity import compare, logits_of, probe_batch
from regrow.tasks.merge.spec import MergePlacement, MergeSpec
from regrow.tasks.modeling.adapter import add_adapter, load_adapter
from regrow.tasks.modeling.load import load_model
from regrow.tasks.modeling.rounding import round_weights
from regrow.tasks.modeling.rows import SCHEMA
from regrow.tasks.stage import Stage, StageError, StageJob


class Silent:
    def progress(self, *args):
        pass

    def log(self, message):
        pass


@pytest.fixture(scope="module")
def prepared(tiny_llama_dir, tmp_path_factory) -> Path:
    """Three validation rows of three examples, 700 tokens in all: more than are looked at."""
    out = tmp_path_factory.mktemp("prepared")
    random = np.random.default_rng(0)
    rows = []
    for lengths in ([100, 30, 70], [150, 1, 99], [200, 25, 25]):
        ids = random.integers(0, 49152, sum(lengths))
        rows.append({"input_ids": ids, "loss_mask": ids * 0, "seq_lens": lengths})
    (out / "validation").mkdir()
    name = "validation/shard-00000.arrow"
    with pa.ipc.new_file(str(out / name), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    entry = {
        "shards": [{"file": name, "rows": 3}],
        "rows": 3,
        "examples": 9,
        "tokens": 700,
        "supervised_tokens": 0,
    }
    (out / "index.json").write_text(json.dumps({"splits": {"validation": entry}}))
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(out / "tokenizer")
    return out


def make_adapter(base: Path, out: Path, strength: float, **settings) -> Path:
    """An adapter with random weights; `strength` is the size of the matrices B."""
    model = add_adapter(load_model(base, dtype="bfloat16"), **({"r": 8, "alpha": 16} | settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)
            elif "modules_to_save" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * strength
    model.save_pretrained(out)
    return out


@pytest.fixture
def make_job(tiny_llama_dir, prepared, tmp_path):
    def make(adapter: Path, name: str = "merge", dtype: str = "bfloat16") -> StageJob:
        stage = Stage(
            "merge",
            1,
            MergeSpec("0" * 64, dtype),
            "regrow.tasks.merge.run:run",
            placement=MergePlacement(str(tiny_llama_dir)),
        )
        out = tmp_path / name
        out.mkdir()
        inputs = {"prepare": prepared, "train": adapter}
        return StageJob(stage, inputs, {}, out, tmp_path, Silent(), None)

    return make


LINEAR = {"target_linear": True}


@pytest.mark.parametrize(
    "settings",
    [LINEAR, LINEAR | {"rslora": True}, LINEAR | {"dora": True}, {"target_modules": ["down_proj"]}],
    ids=["lora", "rslora", "dora", "one_target"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merged_equals_base_and_adapter(
    make_job, tiny_llama_dir, tmp_path, file_names, settings, dtype
):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", 0.05, **settings)
    job = make_job(adapter, dtype=dtype)
    result = merge.run(job)
    assert result["tokens"] == 512
    assert 0 < result["rms_logit_difference"] <= result["allowed_difference"]
    assert result["adapter_effect"] > 0.01 * result["logit_scale"]
    assert result["merge_error"] < 1e-5 * result["logit_scale"]
    if dtype == "float32":
        assert result["rms_logit_difference"] < 1e-5 * result["logit_scale"]
    model = AutoModelForCausalLM.from_pretrained(job.out)
    assert model.dtype == getattr(torch, dtype)
    assert AutoTokenizer.from_pretrained(job.out).chat_template
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= file_names(job.out)
    assert not [name for name in file_names(job.out) if "adapter" in name]


@pytest.fixture
def file_names():
    return lambda directory: {path.name for path in directory.rglob("*") if path.is_file()}


def test_the_bytes_are_the_same_each_time(make_job, tiny_llama_dir, tmp_path):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", 0.05, **LINEAR)
    outs = []
    for name in ("first", "second"):
        job = make_job(adapter, name)
        merge.run(job)
        outs.append({p.name: p.read_bytes() for p in job.out.rglob("*") if p.is_file()})
    assert outs[0] == outs[1]
    assert str(tmp_path).encode() not in b"".join(
        data for name, data in outs[0].items() if name.endswith(".json")
    )


def test_modules_trained_whole_are_taken_over(make_job, tiny_llama_dir, tmp_path):
    settings = LINEAR | {"modules_to_save": ["norm"]}
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", 0.05, **settings)
    job = make_job(adapter)
    merge.run(job)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    merged = AutoModelForCausalLM.from_pretrained(job.out)
    assert not torch.equal(merged.model.norm.weight, base.model.norm.weight.bfloat16())


class WrongScale:
    """A loaded adapter that merges with its scale wrong."""

    def __init__(self, adapted, factor: float) -> None:
        self.adapted, self.factor = adapted, factor

    def eval(self):
        return self.adapted.eval()

    def merge_and_unload(self, **kwargs):
        for module in self.adapted.modules():
            if isinstance(module, BaseTunerLayer):
                module.scale_layer(self.factor)
        return self.adapted.merge_and_unload(**kwargs)


@pytest.mark.parametrize("strength", [0.05, 1e-3], ids=["strong", "weak"])
@pytest.mark.parametrize("factor", [0.5, 1.1, 2.0, 0.0])
def test_a_wrong_scale_is_refused(
    make_job, tiny_llama_dir, tmp_path, monkeypatch, factor, strength
):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", strength, **LINEAR)
    monkeypatch.setattr(
        merge, "load_adapter", lambda *args: WrongScale(load_adapter(*args), factor)
    )
    with pytest.raises(StageError, match="before any rounding"):
        merge.run(make_job(adapter))


def test_weights_stored_wrongly_are_refused(make_job, tiny_llama_dir, tmp_path, monkeypatch):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", 0.05, **LINEAR)

    def round_wrongly(model, dtype):
        round_weights(model, dtype)
        with torch.no_grad():
            model.model.norm.weight *= 2

    monkeypatch.setattr(merge, "round_weights", round_wrongly)
    with pytest.raises(StageError, match="is allowed"):
        merge.run(make_job(adapter))


def test_numbers_that_are_none_are_refused():
    x = torch.randn(3, 5)
    broken = x.clone()
    broken[0, 0] = math.nan
    assert compare(x - 1, x, x, x).fault(0.25) is None
    assert compare(x - 1, x, x, broken).fault(0.25)
    assert compare(x - 1, x, broken, x).fault(0.25)


def test_an_adapter_of_another_model_is_refused(make_job, tiny_llama_dir, tmp_path):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", 0.05, **LINEAR)
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    torch.manual_seed(1)
    settings = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).config
    settings.hidden_size, settings.head_dim = config["hidden_size"] // 2, 8
    AutoModelForCausalLM.from_config(settings).save_pretrained(other)
    job = make_job(adapter)
    stage = dataclasses.replace(job.stage, placement=MergePlacement(str(other)))
    with pytest.raises(StageError, match="does not fit the model"):
        merge.run(dataclasses.replace(job, stage=stage))


@pytest.mark.slow
def test_real_model_keeps_an_adapter_and_half_of_it_is_refused(smollm2_dir, prepared, tmp_path):
    adapter = make_adapter(smollm2_dir, tmp_path / "adapter", 1e-2, r=16, alpha=32, **LINEAR)
    batch = probe_batch(prepared)
    model = load_model(smollm2_dir, dtype="bfloat16").float()
    old = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    base = logits_of(model, batch)
    adapted_model = load_adapter(model, adapter)
    adapted = logits_of(adapted_model, batch)
    merged = adapted_model.merge_and_unload(safe_merge=True)
    exact = logits_of(merged, batch)
    new = {name: weight.detach().clone() for name, weight in merged.named_parameters()}
    round_weights(merged, torch.bfloat16)
    stored = logits_of(merged.float(), batch)
    right = compare(base, adapted, exact, stored)
    assert right.fault(0.25) is None, right
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            weight.copy_((old[name] + new[name]) / 2)
    half = compare(base, adapted, logits_of(merged, batch), stored)
    assert half.fault(0.25) is not None, half

"""The merged model does what base and adapter did, and a merge that does not is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from regrow.tasks.merge import base_model as merge_base
from regrow.tasks.merge import lazy, write
from regrow.tasks.merge import run as merge
from regrow.tasks.merge.base_model import open_base
from regrow.tasks.merge.fidelity import compare, probe_batch
from regrow.tasks.merge.spec import MergePlacement, MergeSpec
from regrow.tasks.modeling.adapter import add_adapter, load_adapter
from regrow.tasks.modeling.load import DTYPES, load_model
from regrow.tasks.modeling.model_files import ShardWriter
from regrow.tasks.modeling.quantization import Quantization
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


def make_adapter(base: Path, out: Path, strength: float, seed: int = 1, **settings) -> Path:
    """An adapter with random weights; `strength` is the size of the matrices B."""
    settings = {"r": 8, "alpha": 16} | settings
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the matrices A
        model = add_adapter(load_model(base, dtype="bfloat16"), **settings)
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


@pytest.mark.parametrize("strength", [0.05, 1e-3], ids=["strong", "weak"])
@pytest.mark.parametrize("factor", [0.5, 1.1, 2.0, 0.0])
def test_a_wrong_scale_is_refused(
    make_job, tiny_llama_dir, tmp_path, monkeypatch, factor, strength
):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", strength, **LINEAR)

    @contextlib.contextmanager
    def merged_wrongly(unit):
        for layer in unit.modules():
            if isinstance(layer, lazy.BaseTunerLayer):
                layer.scale_layer(factor)
        with right(unit):
            yield
        for layer in unit.modules():
            if isinstance(layer, lazy.BaseTunerLayer):
                layer.unscale_layer()

    right = lazy.merged
    monkeypatch.setattr(lazy, "merged", merged_wrongly)
    with pytest.raises(StageError, match="before any rounding"):
        merge.run(make_job(adapter))


def test_weights_stored_wrongly_are_refused(make_job, tiny_llama_dir, tmp_path, monkeypatch):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", 0.05, **LINEAR)

    class WritesWrongly(ShardWriter):
        def add(self, name, tensor):
            super().add(name, tensor * 2 if name == "model.norm.weight" else tensor)

    monkeypatch.setattr(write, "ShardWriter", WritesWrongly)
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


def merged_by_peft(base: Path, adapter: Path, dtype: str, out: Path) -> Path:
    """The whole model in float32, merged by PEFT and stored by Transformers."""
    model = load_model(base, dtype=dtype).float()
    merged = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
    round_weights(merged, DTYPES[dtype])
    merged.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def untied_dir(tiny_llama_dir, tmp_path_factory) -> Path:
    """A Llama whose output head is a matrix of its own, in several files."""
    out = tmp_path_factory.mktemp("untied")
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny_llama_dir, tie_word_embeddings=False)
    LlamaForCausalLM(config).bfloat16().save_pretrained(out, max_shard_size="3MB")
    assert len(list(out.glob("*.safetensors"))) > 1
    return out


SETTINGS = {
    "lora": LINEAR,
    "rslora": LINEAR | {"rslora": True},
    "dora": LINEAR | {"dora": True},
    "patterns": LINEAR | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3.0}},
    "one_layer": LINEAR | {"layers": [1]},
    "norm": LINEAR | {"modules_to_save": ["norm"]},
    "embedding": LINEAR | {"modules_to_save": ["embed_tokens"]},
    "tokens": LINEAR | {"trainable_tokens": [5, 7]},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("ends", ["tied", "untied"])
def test_layer_by_layer_gives_the_bytes_of_the_whole_model(
    tiny_llama_dir, untied_dir, tmp_path, kind, dtype, ends
):
    where = tiny_llama_dir if ends == "tied" else untied_dir
    adapter = make_adapter(where, tmp_path / "adapter", 0.05, **SETTINGS[kind])
    whole = load_file(merged_by_peft(where, adapter, dtype, tmp_path / "a") / "model.safetensors")
    base = open_base(where, dtype, 0, False)
    assert base.streamed
    (tmp_path / "b").mkdir()
    write.write_merged(base, load_adapter(base.model, adapter), dtype, tmp_path / "b")
    ours = load_file(tmp_path / "b" / "model.safetensors")
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in "ab"]
    if (kind, ends) == ("embedding", "tied"):  # PEFT unties the head, to no other effect
        assert torch.equal(whole.pop("lm_head.weight"), whole["model.embed_tokens.weight"]) or (
            dtype == "bfloat16"
        )
        configs[0]["tie_word_embeddings"] = True
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert configs[0] == configs[1]


def test_resting_layers_hold_no_memory_and_wake_as_the_files_say(untied_dir):
    base = open_base(untied_dir, "bfloat16", 0, False)
    stored = sum(p.untyped_storage().nbytes() for p in base.model.parameters())
    assert stored < 4 * len(list(base.model.parameters())) + 1
    real = dict(load_model(untied_dir, dtype="bfloat16").named_parameters())
    assert set(base.weights.names.values()) == set(real)
    for parameter, name in base.weights.names.items():
        with base.weights.awake([parameter], base.read):
            assert torch.equal(parameter, real[name].float())
        assert parameter.untyped_storage().nbytes() == 4


def test_new_tokens_have_the_embedding_that_training_gave_them(tiny_llama_dir, untied_dir):
    for where in (tiny_llama_dir, untied_dir):
        base = open_base(where, "bfloat16", 49200, False)
        model = load_model(where, dtype="bfloat16")
        merge_base.grow_embeddings(model, 49200)
        for name, weight in model.named_parameters():
            assert torch.equal(base.read(name), weight.float()), name
        assert base.model.config.vocab_size == 49200


def test_a_large_model_is_stored_in_several_files_with_an_index(tmp_path):
    writer = ShardWriter(tmp_path, most_bytes=100)
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture(scope="session")
def mixtral_dir(tmp_path_factory, tiny_llama_dir) -> Path:
    """A mixture of experts, whose files name each expert and whose modules hold them together."""
    out = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(2)
    config = MixtralConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).bfloat16().save_pretrained(out)
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ],
    ids=["attention", "experts"],
)
def test_experts_are_merged_and_stored_under_their_files_names(
    make_job, mixtral_dir, tmp_path, settings, file_names
):
    adapter = make_adapter(mixtral_dir, tmp_path / "adapter", 0.2, **settings)
    job = make_job(adapter)
    placement = MergePlacement(str(mixtral_dir))
    job = dataclasses.replace(job, stage=dataclasses.replace(job.stage, placement=placement))
    result = merge.run(job)
    assert result["merge_error"] < 1e-5 * result["logit_scale"] < result["adapter_effect"]
    before = load_file(mixtral_dir / "model.safetensors")
    after = load_file(job.out / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("experts" in name for name in changed) == ("target_parameters" in settings)


NF4 = Quantization(4, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True})


@pytest.mark.parametrize("quantization", [NF4, Quantization(8)], ids=["nf4", "int8"])
def test_an_adapter_of_a_quantized_base_goes_into_the_unquantized_one(
    make_job, tiny_llama_dir, tmp_path, quantization
):
    pytest.importorskip("bitsandbytes")
    adapter = make_adapter(tiny_llama_dir, tmp_path / "adapter", 0.05, **LINEAR)
    job = make_job(adapter, "quantized")
    spec = MergeSpec("0" * 64, "bfloat16", quantization)
    result = merge.run(dataclasses.replace(job, stage=dataclasses.replace(job.stage, spec=spec)))
    plain = make_job(adapter, "plain")
    merge.run(plain)
    ours, theirs = (load_file(j.out / "model.safetensors") for j in (job, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (result["base"], result["trained_on"]) == ("bfloat16", str(quantization))
    # What it says of the quantization is what the quantized model itself does.
    batch = probe_batch(job.inputs["prepare"])
    quantized = load_model(tiny_llama_dir, dtype="float32", quantization=quantization)
    trained = load_adapter(quantized, adapter)
    original = load_adapter(load_model(tiny_llama_dir, dtype="bfloat16").float(), adapter)
    with torch.no_grad():
        difference = trained(**batch).logits.float() - original(**batch).logits
    seen = difference.double().square().mean().sqrt().item()
    # Where the base has 8 bits, its inputs have so too, which is not measured.
    assert result["quantization_effect"] == pytest.approx(
        seen, rel=0.15 if quantization is NF4 else 0.5
    )
    assert result["quantization_effect"] > 0


@pytest.mark.parametrize(("tokens", "fault"), [(1, False), (5, False), (50, True)])
def test_tokens_that_rounding_tips_over_are_left_out_unless_they_are_many(tokens, fault):
    base = torch.randn(100, 8)
    adapted = base + 0.5 * torch.randn(100, 8)
    stored = adapted + 0.01 * torch.randn(100, 8)
    stored[:tokens] = torch.randn(tokens, 8)
    assert bool(compare(base, adapted, adapted, stored).fault(0.25)) == fault
    for nothing in (math.nan, math.inf):
        stored[0, 0] = nothing
        assert compare(base, adapted, adapted, stored).fault(0.25)


def test_a_mistake_in_merging_is_seen_at_a_single_token():
    base = torch.randn(100, 8)
    adapted = base + 0.5 * torch.randn(100, 8)
    merged = adapted.clone()
    merged[7] += 0.05
    assert "of one token" in str(compare(base, adapted, merged, adapted).fault(0.25))


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits[0].float()


@pytest.mark.slow
def test_real_model_keeps_an_adapter_and_half_of_it_is_refused(smollm2_dir, prepared, tmp_path):
    # This seed's adapter has one token that rounding tips over (fidelity.JUMPING).
    adapter = make_adapter(smollm2_dir, tmp_path / "adapter", 1e-2, 3, r=16, alpha=32, **LINEAR)
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
    assert right.max_logit_difference > 100 * right.rms_logit_difference
    assert right.fault(0.25) is None, right
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            weight.copy_((old[name] + new[name]) / 2)
    half = compare(base, adapted, logits_of(merged, batch), stored)
    assert half.fault(0.25) is not None, half

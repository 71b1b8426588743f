"""Models load whole or with an error that says what to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from regrow.tasks.modeling.attention import NAME
from regrow.tasks.modeling.load import grow_embeddings, load_model, load_tokenizer
from regrow.tasks.stage import StageError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(out)
    return out


@pytest.fixture
def model_dir(source, tmp_path):
    """A copy to damage."""
    return shutil.copytree(source, tmp_path / "model")


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_loads_in_the_dtype_and_with_the_attention_asked_for(model_dir):
    model = load_model(model_dir, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == NAME
    generating = load_model(model_dir, dtype="float32", attention="sdpa")
    assert generating(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.dtype == torch.float32


def test_a_model_loaded_for_packed_rows_is_stored_without_a_trace_of_it(model_dir, tmp_path):
    load_model(model_dir, dtype="float32").save_pretrained(tmp_path / "again")
    assert NAME not in (tmp_path / "again" / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def remove(name):
    return lambda directory: (directory / name).unlink()


def only_pickles(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def lose_a_weight(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def cut_short(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no directory"),
        (remove("config.json"), "no config.json"),
        (remove("model.safetensors"), r"holds no \*\.safetensors"),
        (only_pickles, "pytorch_model.bin are pickles"),
        (lambda d: change_config(d, model_type="llama9"), "not of an architecture"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
        (lambda d: change_config(d, hidden_size=32), "wrong shape|cannot be loaded"),
        (lambda d: change_config(d, num_hidden_layers=3), "lack"),
        (lose_a_weight, "lack model.layers.1.mlp.down_proj.weight"),
        (cut_short, "cannot be loaded"),
    ],
)
def test_what_is_wrong_is_said(model_dir, damage, message):
    damage(model_dir)
    with pytest.raises(StageError, match=message):
        load_model(model_dir, dtype="float32")


def test_a_tokenizer_that_is_not_there_is_said(tmp_path):
    with pytest.raises(StageError, match="no tokenizer directory"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_as_the_mean_of_the_old(model_dir, tied):
    change_config(model_dir, tie_word_embeddings=tied)
    model = load_model(model_dir, dtype="float32")
    old = model.get_input_embeddings().weight.detach().clone()
    assert grow_embeddings(model, 43) == 3
    new = model.get_input_embeddings().weight
    assert torch.equal(new[:40], old)
    torch.testing.assert_close(new[40:], old.mean(0).expand(3, -1))
    assert (model.get_output_embeddings().weight is new) == tied
    assert model.config.vocab_size == 43
    assert grow_embeddings(model, 43) == grow_embeddings(model, 5) == 0


def test_a_base_stored_in_fp8_is_dequantized(tmp_path):
    """Blocks of 128 x 128 numbers share a scale, as DeepSeek stores them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    stored = {}
    for name, weight in plain.items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        rows, columns = (size // 128 for size in weight.shape)
        blocks = weight.float().view(rows, 128, columns, 128)
        scale = blocks.abs().amax((1, 3)) / 448  # the largest number in e4m3
        small = (blocks / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = small, scale
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "config.json"
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    settings = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(settings))
    model = load_model(tmp_path, dtype="bfloat16")
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, plain[name], rtol=0.07, atol=1e-3)
    model.save_pretrained(tmp_path / "again")  # in numbers that its config.json tells of
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == plain.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in model.named_parameters())
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()

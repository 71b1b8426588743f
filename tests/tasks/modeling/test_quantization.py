"""A quantized base trains below a float32 adapter; what cannot be trained is refused with why."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from regrow.configs.load import parse_recipe
from regrow.tasks.modeling.load import load_model
from regrow.tasks.modeling.quantization import Quantization, require_package
from regrow.tasks.stage import StageError, canonical

RECIPE = {
    "base_model": "a/b",
    "datasets": [{"path": "c/d", "type": "alpaca"}],
    "learning_rate": 2e-4,
    "adapter": "qlora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
}


def of_recipe(**changes):
    return Quantization.from_recipe(parse_recipe(RECIPE | changes).recipe)


def test_qlora_is_nf4_with_double_quantization_and_the_recipes_type():
    found = of_recipe()
    assert found == Quantization(
        4,
        {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
    )
    assert Quantization.from_json(canonical(found)) == found
    assert of_recipe(adapter="lora", load_in_8bit=True) == Quantization(8)
    assert of_recipe(adapter="lora") is None
    assert of_recipe(adapter="lora", load_in_4bit=True) == found
    single = of_recipe(bnb_config_kwargs={"bnb_4bit_use_double_quant": False})
    assert single.settings["bnb_4bit_use_double_quant"] is False
    assert str(found) == "nf4, double quantization"


@pytest.mark.parametrize(("bits", "kind"), [(4, torch.uint8), (8, torch.int8)])
def test_linear_layers_are_small_and_all_else_is_not(tiny_llama_dir, bits, kind):
    pytest.importorskip("bitsandbytes")
    model = load_model(tiny_llama_dir, dtype="bfloat16", quantization=Quantization(bits))
    for name, parameter in model.named_parameters():
        assert (parameter.dtype == kind) == ("_proj" in name), name


def test_arguments_that_bitsandbytes_does_not_take_are_named():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(StageError, match="bnb_config_kwargs"):
        Quantization(4, {"bnb_4bit_compute_dtype": 7}).config()


def test_a_missing_package_is_named_with_its_key():
    with pytest.raises(StageError, match=r"load_in_4bit: .* pip install no-such"):
        require_package("no-such", "no_such_module", "load_in_4bit")


@pytest.mark.parametrize("method", ["awq", "compressed-tensors"])
def test_a_base_stored_quantized_otherwise_is_refused(tiny_llama_dir, tmp_path, method):
    where = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, where)
    config = json.loads((where / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (where / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=rf"stored quantized \({method}\)"):
        load_model(where, dtype="bfloat16")


def test_gradients_are_the_same_after_a_validation(tiny_llama_dir):
    pytest.importorskip("bitsandbytes")
    model = load_model(tiny_llama_dir, dtype="float32", quantization=Quantization(4))
    model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.arange(12)[None]
    ends = torch.tensor([0, 12], dtype=torch.int32)
    batch = {"input_ids": ids, "labels": ids, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    batch |= {"max_length_q": 12, "max_length_k": 12}
    gradients = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
        model.eval()
        with torch.no_grad():
            model(**batch)
    torch.testing.assert_close(*gradients)

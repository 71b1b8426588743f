"""First values from the base are taken off again; those from the data leave the base alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regrow.tasks.modeling.adapter import add_adapter, load_adapter
from regrow.tasks.modeling.first_values import (
    changes_base,
    initialise_from_data,
    keep_first_values,
)
from regrow.tasks.modeling.load import load_model
from regrow.tasks.modeling.rows import Row
from regrow.tasks.stage import StageError
from regrow.tasks.train.export import save_adapter

IDS = torch.arange(20)[None]
BATCH = {
    "input_ids": IDS,
    "position_ids": IDS,
    "cu_seq_lens_q": torch.tensor([0, 20], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 20], dtype=torch.int32),
    "max_length_q": 20,
    "max_length_k": 20,
}


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_stored_adapter_fits_the_original_base(tiny_llama_dir, tmp_path, init, rslora):
    model = load_model(tiny_llama_dir, dtype="float32")
    plain = logits(model)
    settings = {"r": 4, "alpha": 8, "target_linear": True, "rslora": rslora, "init": init}
    adapted = add_adapter(model, **settings)
    assert changes_base(init)
    # At the start nothing has changed but through rounding.
    torch.testing.assert_close(logits(adapted), plain, rtol=0, atol=1e-5)
    keep_first_values(adapted, tmp_path / "first")
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.05
    trained = logits(adapted)
    save_adapter(adapted, tmp_path / "out", tmp_path / "first")
    again = load_adapter(load_model(tiny_llama_dir, dtype="float32"), tmp_path / "out")
    assert (trained - plain).std() > 1e-2
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-4)


def rows(count, length=40):
    random = np.random.default_rng(0)
    mask = np.ones(length, dtype=np.uint8)
    mask[0] = 0
    lengths = np.array([length])
    return [Row(random.integers(3, 999, length), mask, lengths) for _ in range(count)]


def test_eva_takes_directions_of_the_data_and_changes_nothing_yet(tiny_llama_dir, tmp_path):
    model = load_model(tiny_llama_dir, dtype="float32")
    plain = logits(model)
    adapted = add_adapter(model, r=4, alpha=8, target_linear=True, init="eva")
    initialise_from_data(adapted, rows(8))
    assert torch.equal(logits(adapted), plain)
    assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    # PEFT divides the ranks anew; the stored adapter knows them.
    save_adapter(adapted, tmp_path)
    again = load_adapter(load_model(tiny_llama_dir, dtype="float32"), tmp_path)
    shapes = {n: p.shape for n, p in adapted.named_parameters() if "lora_A" in n}
    assert shapes == {n: p.shape for n, p in again.named_parameters() if "lora_A" in n}


def test_too_little_data_for_eva_is_said(tiny_llama_dir):
    adapted = add_adapter(
        load_model(tiny_llama_dir, dtype="float32"), r=16, alpha=8, target_linear=True, init="eva"
    )
    with pytest.raises(StageError, match="needs 64 supervised tokens for a rank of 16"):
        initialise_from_data(adapted, rows(1))

"""ReLoRA's restarts: the model computes what it did, and nothing of earlier rounds is lost."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from regrow.tasks.modeling.adapter import add_adapter
from regrow.tasks.modeling.rounds import Rounds
from regrow.tasks.train.relora import Pruning, prune

IDS = torch.arange(12)[None]


def tiny():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads)).eval()


def learn_something(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_restarts_change_nothing_and_the_whole_is_one_adapter(tmp_path):
    model = add_adapter(
        tiny(), r=4, alpha=8, target_linear=True, rank_pattern={"q_proj": 2}, dropout=0.5
    )
    model.eval()
    rounds = Rounds(model, torch.float32)
    bare = logits(model)
    for seed in range(3):
        learn_something(model)
        before = logits(model)
        rounds.finish()
        rounds.restart(seed)
        assert torch.allclose(logits(model), before, atol=1e-5)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert not [name for name in trained if "earlier" in name]
    assert (before - bare).abs().max() > 0.1

    rounds.write(tmp_path / "rounds")
    learn_something(model)
    last = logits(model)
    again = add_adapter(tiny(), r=4, alpha=8, target_linear=True, rank_pattern={"q_proj": 2}).eval()
    resumed = Rounds(again, torch.float32)
    resumed.read(tmp_path / "rounds")
    assert torch.allclose(logits(again), before, atol=1e-5)

    rounds.finish()
    rounds.save_adapter(tmp_path / "whole")
    whole = PeftModel.from_pretrained(tiny(), str(tmp_path / "whole")).eval()
    assert torch.allclose(logits(whole), last, atol=1e-5)
    assert whole.peft_config["default"].r == 16


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_both_moments_lose_the_same_share(method):
    weight = nn.Parameter(torch.randn(40, 50))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.randn(40, 50)
    optimizer.step()
    before = optimizer.state[weight]["exp_avg"].clone()
    prune(optimizer, Pruning(method, 0.9), seed=5)
    first, second = (optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq"))
    gone = first == 0
    assert gone.sum() == 1800
    assert torch.equal(gone, second == 0)
    if method == "magnitude":
        assert before[gone].abs().max() <= before[~gone].abs().min()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_eight_bit_moments_lose_theirs_by_value():
    import bitsandbytes as bnb

    # It knows weights that stay in 32 bits by their place in memory, also those of earlier tests.
    bnb.optim.GlobalOptimManager.get_instance().initialize()
    weight = nn.Parameter(torch.randn(100, 50))
    optimizer = bnb.optim.AdamW8bit([weight], betas=(0.0, 0.999))
    weight.grad = torch.randn(100, 50) * torch.logspace(-3, 3, 100)[:, None]  # scales that differ
    optimizer.step()
    state = optimizer.state[weight]
    assert state["state1"].dtype == torch.uint8
    prune(optimizer, Pruning("magnitude", 0.5), seed=5)
    zero = state["qmap1"].abs().argmin()
    gone = state["state1"] == zero
    assert 2500 <= gone.sum() < 2600  # some were 0 before
    assert weight.grad[gone].abs().median() < weight.grad[~gone].abs().median() / 100
    assert (state["state2"][gone] == state["qmap2"].abs().argmin()).all()

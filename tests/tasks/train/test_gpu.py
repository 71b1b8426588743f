"""On a GPU: packed training equals training on the examples alone, and a resume goes on."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from regrow.tasks.modeling import attention
from regrow.tasks.modeling.batches import flatten
from regrow.tasks.train.worker import train
from tests.tasks.train.killed import KillAt, Killed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


class Row:
    def __init__(self, lengths):
        random = np.random.default_rng(len(lengths))
        self.seq_lens = np.array(lengths)
        self.input_ids = random.integers(3, 97, sum(lengths))
        self.loss_mask = (random.random(sum(lengths)) < 0.5).astype(np.uint8)
        self.loss_mask[np.cumsum([0, *lengths[:-1]])] = 0


def on_gpu(batch):
    return {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}


def gradients(model):
    return torch.cat([p.grad.float().flatten() for p in model.parameters()])


@pytest.mark.parametrize("autocast", [True, False], ids=["float32_weights", "bfloat16_weights"])
@pytest.mark.parametrize("window", [None, 9])
def test_packed_equals_each_example_alone(window, autocast):
    """In bfloat16 both sides round; each is compared with float32 on the examples alone."""
    attention.register()
    torch.manual_seed(0)
    if window:
        plain = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window))
    else:
        plain = LlamaForCausalLM(LlamaConfig(**SIZES))
    plain = plain.cuda().train()
    packed = copy.deepcopy(plain)
    packed.set_attn_implementation(attention.NAME)
    if not autocast:
        packed.bfloat16()
    row = Row([3, 200, 1, 64, 17])
    items = int(row.loss_mask.sum())
    batch = on_gpu(flatten([row]))
    bounds = batch["cu_seq_lens_q"].tolist()
    loss = 0.0
    for start, end in pairwise(bounds):
        part = {"input_ids": batch["input_ids"][:, start:end]}
        part["labels"] = batch["labels"][:, start:end]
        one = plain(**part, num_items_in_batch=items).loss
        one.backward()
        loss += one.item()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        packed_loss = packed(**batch, num_items_in_batch=items).loss
    packed_loss.backward()
    assert packed_loss.item() == pytest.approx(loss, rel=3e-3)
    right, found = gradients(plain), gradients(packed)
    assert (found - right).norm() < 0.03 * right.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_follows_the_cpu(make_job, dtype):
    spec = {"dtype": dtype, "num_epochs": 3}
    cpu = train(make_job("cpu", spec))
    gpu = train(make_job("gpu", spec, {"device": "cuda", "dataloader_num_workers": 1}))
    assert gpu["timing"]["device"].startswith("NVIDIA")
    for ours, theirs in zip(gpu["history"], cpu["history"], strict=True):
        for name in ("loss", "eval_loss"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-2)


def test_a_resumed_run_ends_where_the_undisturbed_one_does(make_job, capsys):
    spec, placement = {"dtype": "bfloat16"}, {"device": "cuda"}
    whole = make_job("whole", spec, placement)
    train(whole)
    with pytest.raises(Killed):
        train(make_job("killed", spec, placement, "checkpoints/a"), [KillAt(7)])
    resumed = make_job("resumed", spec, placement, "checkpoints/a")
    train(resumed)
    name = "adapter_model.safetensors"
    expected, found = load_file(whole.out / name), load_file(resumed.out / name)
    same = all(torch.equal(expected[key], found[key]) for key in expected)
    with capsys.disabled():
        print("\nresume on the GPU is equal to the byte:", same)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], atol=2e-3, rtol=0)

"""NEFTune's noise is as strong in a pack as in an example by itself."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regrow.tasks.modeling.adapter import add_adapter
from regrow.tasks.train.noise import EmbeddingNoise

WIDTH, ALPHA = 256, 5.0


def noise(model, lengths):
    """What the hooks add to the embeddings of a pack."""
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    seen = []
    layer = model.get_input_embeddings()
    clean = layer.weight[3].detach()
    handle = layer.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    ids = torch.full((1, sum(lengths)), 3)
    with torch.no_grad():
        model(input_ids=ids, cu_seq_lens_q=cu_seqlens)
    handle.remove()
    return seen[0][0] - clean


def make(adapter):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=WIDTH,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )
    model = add_adapter(model, r=2, alpha=2, target_linear=True) if adapter else model
    EmbeddingNoise(ALPHA).attach(model)
    return model


def test_examples_side_by_side_get_theirs():
    model = make(False)
    hooks = EmbeddingNoise(ALPHA)
    hooks.attach(model)
    hooks._remember(model, (), {"cu_seq_lens_q": torch.tensor([0, 4, 104])})
    found = hooks._add(model.train(), (), torch.zeros(2, 100, WIDTH))
    for part, length in zip(found, (4, 100), strict=True):
        most = ALPHA / (length * WIDTH) ** 0.5
        assert 0.9 * most < part.abs().max() <= most


def test_each_example_gets_noise_of_its_own_length():
    for adapter in (False, True):
        model = make(adapter).train()
        found = noise(model, [4, 100])
        for part, length in ((found[:4], 4), (found[4:], 100)):
            most = ALPHA / (length * WIDTH) ** 0.5
            assert 0.9 * most < part.abs().max() <= most
            assert abs(part.mean()) < 0.1 * most
        assert noise(model.eval(), [4, 100]).abs().max() == 0

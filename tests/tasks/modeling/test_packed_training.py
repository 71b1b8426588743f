"""Training on packed rows equals training on the examples one by one: loss and every gradient."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from regrow.tasks.modeling import attention
from regrow.tasks.modeling.batches import flatten

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    # A window far shorter than the examples: it must count within each, and be applied at all.
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=6),
    # Sliding and full layers in turns, and soft caps on scores and logits.
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
}
LENGTHS = [3, 61, 1, 17, 30]
EAGER_ONLY = {"gemma2"}  # sdpa has no soft cap


def examples(lengths, seed=0):
    """Random tokens; about half are learnt, never the first of an example."""
    random = np.random.default_rng(seed)
    found = []
    for length in lengths:
        mask = random.random(length) < 0.5
        mask[0] = False
        ids = random.integers(3, SIZES["vocab_size"], length, dtype=np.int32)
        found.append((ids, mask.astype(np.uint8)))
    return found


def pack(found):
    return SimpleNamespace(
        input_ids=np.concatenate([ids for ids, _ in found]),
        loss_mask=np.concatenate([mask for _, mask in found]),
        seq_lens=np.array([len(ids) for ids, _ in found], dtype=np.int32),
    )


def tiny(name, implementation):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])  # models share their config otherwise
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.float().train()


def padded_loss(model, found, num_items):
    """The plain way: one example a line, padded on the right, an attention mask."""
    longest = max(len(ids) for ids, _ in found)
    ids = torch.zeros(len(found), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    seen = torch.zeros_like(ids)
    for line, (tokens, mask) in enumerate(found):
        ids[line, : len(tokens)] = torch.from_numpy(tokens)
        seen[line, : len(tokens)] = 1
        learnt = torch.from_numpy(mask.astype(bool))
        labels[line, : len(tokens)][learnt] = ids[line, : len(tokens)][learnt]
    return model(
        input_ids=ids, attention_mask=seen, labels=labels, num_items_in_batch=num_items
    ).loss


@pytest.mark.parametrize("plain", ["eager", "sdpa"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_packed_loss_and_gradients_equal_those_of_padded_examples(name, plain):
    if plain == "sdpa" and name in EAGER_ONLY:
        pytest.skip("sdpa has no soft cap")
    attention.register()
    found = examples(LENGTHS)
    num_items = int(sum(mask.sum() for _, mask in found))
    expected = tiny(name, plain)
    loss = padded_loss(expected, found, num_items)
    loss.backward()

    model = tiny(name, attention.NAME)
    # Two rows in one batch, and padding behind: neither may show.
    batch = flatten([pack(found[:2]), pack(found[2:])], pad_to=128)
    packed_loss = model(**batch, num_items_in_batch=num_items).loss
    packed_loss.backward()

    torch.testing.assert_close(packed_loss, loss, atol=1e-5, rtol=1e-5)
    right = dict(expected.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            right[parameter_name].grad,
            atol=1e-5,
            rtol=1e-4,
            msg=lambda text, at=parameter_name: f"{at}: {text}",
        )


def test_the_window_of_the_tiny_mistral_matters():
    """Else the test above could pass without any window."""
    found = examples(LENGTHS)
    windowed, full = tiny("mistral", "eager"), tiny("mistral", "eager")
    full.config.sliding_window = None
    assert abs(padded_loss(windowed, found, 50) - padded_loss(full, found, 50)) > 1e-4


def test_a_dummy_batch_has_zero_loss_and_zero_gradients():
    attention.register()
    model = tiny("llama", attention.NAME)
    loss = model(**flatten([]), num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_plain_inference_is_refused_rather_than_wrong():
    attention.register()
    model = tiny("llama", attention.NAME).eval()
    with pytest.raises(ValueError, match="sdpa"):
        model(input_ids=torch.ones(2, 5, dtype=torch.long))
    batch = flatten([pack(examples([5]))])
    with pytest.raises(ValueError, match="attention_mask"):
        model(**batch, attention_mask=torch.ones(1, 5))


def test_attention_dropout_is_refused():
    attention.register()
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES, attention_dropout=0.1), attn_implementation=attention.NAME
    ).train()
    with pytest.raises(ValueError, match="dropout"):
        model(**flatten([pack(examples([5]))]))


def test_attention_sinks_are_refused():
    attention.register()
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    with pytest.raises(ValueError, match="s_aux"):
        model(**flatten([pack(examples([5]))]))


def test_autocast_over_float32_weights_works():
    """Rotary embeddings leave q and k in float32 there, and v in bfloat16."""
    attention.register()
    model = tiny("llama", attention.NAME)
    batch = flatten([pack(examples(LENGTHS))])
    exact = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**batch).loss
    assert rounded != exact
    assert abs(rounded - exact) < 0.02 * exact

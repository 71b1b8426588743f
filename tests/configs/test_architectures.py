"""The names of layers that rules know are those of Transformers' classes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from regrow.configs.architectures import ARCHITECTURES

_LEAF = (torch.nn.Linear, torch.nn.Embedding, Conv1D)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_has_the_layers_that_are_said(kind):
    layers = ARCHITECTURES[kind]
    config = AutoConfig.for_model(kind)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {name for name, module in model.named_modules() if isinstance(module, _LEAF)}
    said = set(layers.modules(1))
    # Depending on config.json DeepSeek has the one or the other; of experts not all are told.
    optional = {"embed_out"} | {name for name in said if ".self_attn.q_" in name}
    assert said - found <= (optional if "deepseek" in kind else {"embed_out"})
    assert layers.has_experts or found - said == set()

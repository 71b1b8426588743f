"""Rules that need facts of the model and its tokenizer: from files to what the author reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regrow.configs.facts import ModelFacts, facts_at_hand
from regrow.configs.faults import RecipeError
from regrow.configs.load import Loaded, load_recipe
from regrow.configs.rules.facts import FACT_RULES

PLAIN = {"num_hidden_layers": 4, "max_position_embeddings": 4096, "vocab_size": 4}
TOKENS = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<end>"}]}
CHAT = "datasets: [{path: org/t, type: chat_template}]"
LORA = "adapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true"

# rule -> (config.json beside what is plain, added lines, key at fault or noticed, what is said)
CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "the_model_is_described": ({"hidden_size": "wide"}, "", "base_model", "hidden_size: 'wide'"),
    "the_tokenizer_is_described": (
        {"tokenizer_config.json": "[1, "},
        "",
        "base_model",
        "tokenizer_config.json is no JSON map",
    ),
    "stored_weights_can_be_merged_into": (
        {"quantization_config": {"quant_method": "awq"}},
        "",
        "base_model",
        "stored quantized (awq)",
    ),
    "plain_weights_need_no_dequantizing": (
        {},
        "model_quantization_config: Mxfp4Config\n"
        "model_quantization_config_kwargs: {dequantize: true}",
        "model_quantization_config",
        "stored plain",
    ),
    "layers_keep_examples_apart": (
        {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
        "output_router_logits: true",
        "output_router_logits",
        "layers (linear_attention) compute examples side by side",
    ),
    "experts_are_there": (
        {"model_type": "llama"},
        "output_router_logits: true",
        "output_router_logits",
        "a model of the kind llama has no experts",
    ),
    "layers_are_there": (
        {},
        f"{LORA}\npeft_layers_to_transform: [3, 4]",
        "peft_layers_to_transform",
        "the model has 4 layers",
    ),
    "targets_are_layers": (
        {"model_type": "llama"},
        f"{LORA.replace('lora_target_linear: true', 'lora_target_modules: [c_attn, Wqkv]')}",
        "lora_target_modules",
        "kind llama has no layer c_attn, Wqkv",
    ),
    "rows_are_as_long_as_positions": (
        {},
        "sequence_len: 8192",
        "sequence_len",
        "at most 4096 tokens",
    ),
    "conversations_have_a_template": ({}, CHAT, "datasets[0].type", "no chat template of its own"),
    "ends_of_turns_are_tokens": (
        {},
        f"{CHAT}\nchat_template: chatml\neot_tokens: [<end>, <fin>]",
        "eot_tokens[1]",
        "no token <fin>",
    ),
    "ends_have_one_rule": (
        {"tokenizer_config.json": json.dumps({"eos_token": {"content": "</s>"}})},
        "datasets: [{path: org/t, type: chat_template, train_on_eot: last}]\n"
        "chat_template: chatml\neot_tokens: [</s>]\nspecial_tokens: {pad_token: </s>}\n"
        "tokens: [</s>]",
        "datasets[0].train_on_eot",
        "`train_on_eos: turn` says otherwise",
    ),
    "ends_of_turns_are_printed": (
        {"tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}<end>"})},
        f"{CHAT}\neot_tokens: [<end>, b]",
        "eot_tokens",
        "the chat template does not print b",
    ),
    "new_tokens_can_be_learnt": (
        {},
        f"{LORA}\ntokens: [<x>, <y>]",
        "tokens",
        "an adapter cannot learn it",
    ),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PLAIN))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENS))
    return folder


def read(model: Path, minimal: str, added: str, **more: Any) -> Loaded:
    text = minimal.replace("org/model", str(model)).replace("sequence_len: 1024\n", "")
    if added.startswith("datasets"):
        text = text.replace("datasets:\n  - path: org/data\n    type: alpaca\n", "")
    if "sequence_len" not in added:
        added += "\nsequence_len: 1024"
    path = model.parent / "recipe.yaml"
    path.write_text(f"{text}{added}\n")
    return load_recipe(path, **more)


@pytest.mark.parametrize("rule", CASES)
def test_a_fact_that_does_not_fit_is_told(model, minimal, rule):
    config, added, key, why = CASES[rule]
    if "tokenizer_config.json" in config:
        (model / "tokenizer_config.json").write_text(config["tokenizer_config.json"])
    (model / "config.json").write_text(json.dumps(PLAIN | config))
    try:
        told = [str(notice) for notice in read(model, minimal, added).notices]
    except RecipeError as error:
        told = [str(fault) for fault in error.faults if fault.line]
    assert [line for line in told if key in line and why in line]


def test_each_rule_has_its_case():
    assert [rule.name for rule in FACT_RULES] == list(CASES)


@pytest.mark.parametrize("rule", CASES)
def test_what_is_not_known_is_no_fault(minimal, load, rule):
    """The model is on the hub, and nothing of it is here."""
    _, added, _, _ = CASES[rule]
    base = minimal
    if added.startswith("datasets"):
        base = minimal.replace("datasets:\n  - path: org/data\n    type: alpaca\n", "")
    load(base.replace("sequence_len: 1024\n", "") + f"{added}\n")


def test_a_vocabulary_that_cannot_be_read_tells_nothing(model, minimal):
    for text in ("[1, ", '{"model": {"vocab": {"<fin>": 0}}, "added_tokens": 3}'):
        (model / "tokenizer.json").write_text(text)
        assert read(model, minimal, "eot_tokens: [<fin>]")


@pytest.mark.parametrize("text", ["[1, ", "[]", "\0", "{" * 90_000, "3", '"x"', "null"])
def test_a_broken_model_is_a_fault(model, minimal, text):
    (model / "config.json").write_text(text)
    with pytest.raises(RecipeError, match="says what is no JSON map"):
        read(model, minimal, "")


@pytest.mark.parametrize(
    "odd",
    [
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": True},
        {"hidden_size": 64.5},
        {"vocab_size": {}},
        {"head_dim": 0},
        {"max_position_embeddings": "long"},
        {"quantization_config": "gptq"},
        {"text_config": 3},
        {"text_config": {"num_hidden_layers": "x"}},
    ],
)
def test_sizes_that_no_model_has_are_faults(model, minimal, odd):
    (model / "config.json").write_text(json.dumps(PLAIN | odd))
    with pytest.raises(RecipeError, match="json says"):
        read(model, minimal, "")


@pytest.mark.parametrize(
    ("kind", "targets", "told"),
    [
        ("llama", "[q_proj, v_proj]", None),
        ("llama", "[self_attn.q_proj, lm_head, embed_tokens]", None),
        ("llama", r"'model.layers.[\d]+.(mlp|self_attn).(up|down|q|k|v|o)_proj'", None),
        ("llama", r"'.*\.layers\.(0|1)\.self_attn\.(q|k|v|o)_proj|.*\.mlp\.up_proj'", None),
        ("llama", "all-linear", None),
        ("llama", "[q_proj, in_proj, out_proj]", "has no layer in_proj, out_proj; its layers are"),
        ("llama", r"'model.language_model.layers.[\d]+.mlp.up_proj'", "has no layer model.lang"),
        ("llama", "[proj]", "has no layer proj. Its layers are q_proj, k_proj"),
        ("gpt2", "[c_attn]", None),
        ("gpt2", "[q_proj]", "Its layers are c_attn, c_proj, c_fc"),
        ("phi3", "[qkv_proj, o_proj]", None),
        ("phi3", "[q_proj]", "Its layers are qkv_proj, o_proj, gate_up_proj, down_proj"),
        ("qwen3_moe", "[q_proj, gate, up_proj, experts.gate_up_proj]", None),
        ("qwen3_moe", "[Wqkv]", "has no layer Wqkv"),
        ("mixtral", "[w1, w2, w3]", None),
        ("a_new_one", "[anything]", None),
    ],
)
def test_targets_are_looked_for_in_known_architectures(model, minimal, kind, targets, told):
    (model / "config.json").write_text(json.dumps(PLAIN | {"model_type": kind}))
    lora = f"{LORA.replace('lora_target_linear: true', '')}\nlora_target_modules: {targets}"
    try:
        lines = [str(notice) for notice in read(model, minimal, lora).notices]
    except RecipeError as error:
        lines = [str(fault) for fault in error.faults]
    found = [line for line in lines if "lora_target_modules" in line]
    assert [told in line for line in found] == ([True] if told else [])


@pytest.mark.parametrize(("kind", "told"), [("llama", 1), ("qwen3_moe", 0), ("a_new_one", 0)])
def test_quantized_experts_are_looked_for(model, minimal, kind, told):
    (model / "config.json").write_text(json.dumps(PLAIN | {"model_type": kind}))
    added = f"{LORA}\nload_in_4bit: true\nquantize_moe_experts: true"
    lines = [str(notice) for notice in read(model, minimal, added).notices]
    assert sum("ignored quantize_moe_experts because a model" in line for line in lines) == told


def test_mistral_common_needs_no_template_of_the_tokenizers(model, minimal):
    assert read(model, minimal, f"{CHAT}\ntokenizer_use_mistral_common: true")


def test_layers_left_out_that_are_not_there_are_told(model, minimal):
    (model / "config.json").write_text(json.dumps(PLAIN | {"model_type": "llama"}))
    loaded = read(model, minimal, f"{LORA}\nlora_exclude_modules: [vision_tower, q_proj]")
    assert any("has no layer vision_tower" in str(notice) for notice in loaded.notices)


def test_the_hubs_cache_is_looked_into(tmp_path, minimal, load):
    folder = tmp_path / "hub" / "models--org--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc\n")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    stored = {"quantization_config": {"quant_method": "awq"}}
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(PLAIN | stored))
    path = tmp_path / "recipe.yaml"
    path.write_text(minimal)
    with pytest.raises(RecipeError, match="stored quantized"):
        load_recipe(path, environment={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert load_recipe(path, environment={"HF_HUB_CACHE": str(tmp_path / "none")})


def test_odd_values_are_no_facts():
    odd = {"num_hidden_layers": True, "vocab_size": "many", "layer_types": "x", "text_config": 3}
    facts = ModelFacts.from_config(odd)
    assert facts == ModelFacts(odd=facts.odd)
    assert len(facts.odd) == 3
    assert facts_at_hand("a\0b", None, None, {}, True).model is None


def test_an_end_that_the_template_prints_is_not_told(model, minimal):
    settings = {"chat_template": "{{ x }}{{ eos_token }}", "eos_token": "<end>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    told = [str(n) for n in read(model, minimal, f"{CHAT}\neot_tokens: [<end>]").notices]
    assert not [line for line in told if "does not print" in line]


def test_an_eos_token_of_the_recipes_own_needs_no_tokenizer(load, minimal):
    entry = "type: chat_template\n    train_on_eot: last"
    text = minimal.replace("type: alpaca", entry) + "eot_tokens: [</s>]\n"
    assert load(text)
    with pytest.raises(RecipeError, match="one of `eot_tokens` and the eos token"):
        load(f"{text}special_tokens: {{eos_token: </s>}}\n")

"""Every key of Axolotl has one honest status: a field, another name, no effect, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from regrow.configs.faults import RecipeError
from regrow.configs.load import load_recipe, parse_recipe
from regrow.configs.recipe import Recipe
from regrow.configs.sections.data import Dataset
from regrow.configs.vocabulary import (
    ANYWAY,
    DATASET_READ_OTHERWISE,
    DATASET_WORDS,
    OFF,
    READ_OTHERWISE,
    REFUSED_VALUES,
    RENAMED_VALUES,
    WORDS,
    Refused,
    Renamed,
    is_off,
    needs_no_word,
)

AXOLOTL_KEYS = (Path(__file__).parent / "axolotl_keys.txt").read_text().split()


SCHEMA_KEYS = (Path(__file__).parent / "axolotl_schema.txt").read_text().split()
"""All keys that Axolotl 0.18 and its plugins declare, those of entries behind `datasets[].`."""


def recipe_with(key: str, value: Any) -> dict[str, Any]:
    """A smallest recipe with `value` at `key`, written as datasets[].type."""
    base = {
        "base_model": "org/model",
        "datasets": [{"path": "org/data", "type": "alpaca"}],
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4,
    }
    for part in reversed(re.findall(r"\[\]|[^.\[\]]+", key)):
        value = [value] if part == "[]" else {part: value}
    (top,) = value
    if top == "datasets" and isinstance(value[top][0], dict):
        return {**base, "datasets": [{**base["datasets"][0], **value[top][0]}]}
    return {**base, **value}


def told_about(key: str, value: Any) -> str:
    """All that is said about a recipe with `value` at `key`; "unknown key" never is."""
    try:
        notices, faults = parse_recipe(recipe_with(key, value)).notices, ()
    except RecipeError as error:
        notices, faults = error.notices, error.faults
    said = "\n".join(map(str, (*notices, *faults)))
    assert "unknown key" not in said
    return said


def is_field(key: str) -> bool:
    top, *below = re.findall(r"[^.\[\]]+", key)
    if top not in Recipe.model_fields:
        return False
    return top != "datasets" or not below or below[0] in Dataset.model_fields


@pytest.mark.parametrize("key", AXOLOTL_KEYS)
def test_every_key_in_use_is_a_field_or_is_spoken_of(key):
    said = told_about(key, "x")
    top, *below = re.findall(r"[^.\[\]]+", key)
    assert is_field(key) or (below[0] if top == "datasets" else top) in said


@pytest.mark.parametrize("key", sorted(WORDS))
def test_what_happens_anyway_is_accepted_without_a_word_and_nothing_else(key):
    if isinstance(WORDS[key], Renamed):
        return
    silent = parse_recipe(recipe_with("seed", 42))
    for value in (None, False, True, "", [], {}, 0):
        if isinstance(WORDS[key], Refused) and value is True:
            continue
        loaded = parse_recipe(recipe_with(key, value))
        assert loaded.recipe == silent.recipe
        quiet = is_off(key, value) if isinstance(WORDS[key], Refused) else needs_no_word(key, value)
        said = set(map(str, loaded.notices)) - set(map(str, silent.notices))
        assert len(said) == (not quiet)
        assert quiet or key in str(said)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("use_mlflow: false", "ignored use_mlflow because MLflow records every run"),
        ("use_mlflow: true", None),
        ("tokenizer_use_fast: false", "ignored tokenizer_use_fast because the model's and"),
        ("tokenizer_use_fast: true", None),
        ("tokenizer_legacy: false", "ignored tokenizer_legacy because the model's and"),
        ("merge_lora: false", "ignored merge_lora because merging is a stage of every run"),
        ("merge_lora: true", None),
        ("wandb_project: x\nwandb_watch: false", "wandb: reports go there when"),
        ("wandb_watch: false", None),
        ("data_seed: 0", "ignored data_seed because neither Axolotl nor Regrow reads it"),
        ("hf_use_auth_token: false", "ignored hf_use_auth_token because the Hugging Face token"),
        ("hf_use_auth_token: true", None),
        ("pretrain_multipack_attn: false", "ignored pretrain_multipack_attn because attention is"),
        ("auto_resume_from_checkpoints: false", "ignored auto_resume_from_checkpoints because a"),
        ("auto_resume_from_checkpoints: true", None),
        ("resume_from_checkpoint: true", None),
        ("save_safetensors: false", "ignored save_safetensors because weights are only ever"),
        ("dataloader_pin_memory: false", "ignored dataloader_pin_memory because it changes speed"),
        ("mlp_kernel: false", "ignored mlp_kernel because Regrow chooses its kernels itself"),
        ("peft_autocast_adapter_dtype: false", "ignored peft_autocast_adapter_dtype because adap"),
        (
            "include_tkps: false",
            "ignored include_tkps because every report has the tokens a second",
        ),
        ("ddp: false", "ignored ddp because Regrow places a run on its devices itself"),
        ("strict: false", None),
        ("strict: true", None),
        ("use_kernels: false", None),
        ("torch_compile: false", None),
        ("gptq: false", None),
        ("gptq: true", "ignored gptq because a base stored as GPTQ is known by its config.json"),
        ("torch_dtype: bfloat16", None),
        ("torch_dtype: auto", None),
        ("torch_dtype: float32", "ignored torch_dtype because `bf16` decides the type"),
        ("bf16: false\ntorch_dtype: torch.float32", None),
        ("bf16: false\ntorch_dtype: bfloat16", "ignored torch_dtype because `bf16` decides"),
        ("hub_model_id: me/x\npush_to_hub: true", None),
        ("hub_model_id: me/x\npush_to_hub: false", "set hub_model_id: null because `push_to_hub"),
        ("push_to_hub: false", None),
        (
            "gradient_checkpointing: true\nactivation_offloading: true",
            "set gradient_checkpointing: offload because `activation_offloading` asks for it",
        ),
        (
            "gradient_checkpointing: true\nactivation_offloading: legacy",
            "set gradient_checkpointing: offload because `activation_offloading` asks for it",
        ),
        ("gradient_checkpointing: offload\nactivation_offloading: true", None),
        (
            "gradient_checkpointing: selective\nactivation_offloading: true",
            "ignored activation_offloading because `gradient_checkpointing: selective` says how",
        ),
        (
            "gradient_checkpointing: true\nselective_checkpointing: true",
            "set gradient_checkpointing: selective because `selective_checkpointing` asks",
        ),
        (
            "gradient_checkpointing: true\nselective_checkpointing: {save: [mlp]}",
            "ignored selective_checkpointing because beside a layer's input",
        ),
    ],
)
def test_a_word_is_said_where_something_else_happens_than_is_asked_for(
    notices_of, minimal, written, told
):
    anyway = notices_of(minimal)
    said = [notice for notice in notices_of(f"{minimal}{written}\n") if notice not in anyway]
    assert [line.startswith(told) for line in said] == ([True] if told else [])


def test_words_and_fields_do_not_overlap():
    assert not WORDS.keys() & Recipe.model_fields.keys()
    assert not DATASET_WORDS.keys() & Dataset.model_fields.keys()


def test_every_key_that_is_read_otherwise_is_spoken_of():
    for key in READ_OTHERWISE:
        assert key in told_about(key, "x"), key
    for key in DATASET_READ_OTHERWISE:
        value = [{"type": "sharegpt" if "human" in key or "model" in key else "chat_template"}]
        value[0][key] = "x"
        assert told_about("datasets", value), key


def test_renamed_keys_end_at_a_field_or_a_refusal():
    for word in WORDS.values():
        if isinstance(word, Renamed):
            assert word.to in Recipe.model_fields or isinstance(WORDS[word.to], Refused)


def test_refused_words_have_a_reason_and_a_remedy():
    for word in [*WORDS.values(), *DATASET_WORDS.values()]:
        if isinstance(word, Refused):
            assert word.why
            assert word.remedy
    assert ANYWAY.keys() <= WORDS.keys()
    assert OFF.keys() <= WORDS.keys() | DATASET_WORDS.keys()
    assert REFUSED_VALUES.keys() <= Recipe.model_fields.keys()


@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        ("dataset_processes: 3", "dataset_num_proc", 3),
        ("evaluation_strategy: no", "eval_strategy", "no"),
        ("noisy_embedding_alpha: 5", "neftune_noise_alpha", 5.0),
        ("model_revision: abc", "revision_of_model", "abc"),
        ("type_of_model: LlamaForCausalLM", "model_type", "LlamaForCausalLM"),
        ("adam_eps: 1e-5", "adam_epsilon", 1e-5),
        ("save_steps: ''\nearly_stopping_patience: ''\nflash_attention: ''", "save_steps", None),
        ("wandb_project: x\nwandb_run_name: y", "wandb_name", "y"),
        (
            "adapter: qlora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\n"
            "bnb_4bit_quant_type: fp4",
            "bnb_config_kwargs",
            {"bnb_4bit_quant_type": "fp4"},
        ),
        ("bfloat16: true", "bf16", True),
        ("float32: true", "bf16", False),
        ("flash_attention: true", "attn_implementation", "regrow_packed"),
        ("attn_implementation: kernels-community/x", "attn_implementation", "regrow_packed"),
        ("warmup_steps: 0.1", "warmup_ratio", 0.1),
        ("gradient_checkpointing: offload_disk", "gradient_checkpointing", "offload"),
        ("save_strategy: no", "save_strategy", "no"),
        ("sequence_parallel_degree: 2", "context_parallel_size", 2),
        ("tensor_parallel_size: 2", "tensor_parallel_size", 2),
        ("tensor_parallel_size: 2\nexpert_parallel_size: 2", "tensor_parallel_size", 2),
        ("tensor_parallel_size: 2\nfsdp_config: {}", "tensor_parallel_size", 2),
        *(
            (f"tensor_parallel_size: 2\ndp_shard_size: 2\n{more}: 2\nfsdp_config: {{}}", key, value)
            for more in ("dp_replicate_size", "context_parallel_size")
            for key, value in (("tensor_parallel_size", 1), ("dp_shard_size", 4), (more, 2))
        ),
        ("context_parapllel_size: 2", "context_parallel_size", 2),
    ],
)
def test_old_names_and_shapes_are_read(load, minimal, written, field, value):
    assert getattr(load(f"{minimal}{written}\n").recipe, field) == value


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("dataset_processes: 3", "read dataset_processes as dataset_num_proc because"),
        ("flash_attention: true", "read flash_attention as regrow_packed because"),
        ("use_otel_metrics: true", "ignored use_otel_metrics because MLflow records every run"),
        ("wandb_name: y", "ignored wandb_name because no `wandb` project means no reports"),
        ("wandb_project: x\nuse_wandb: false", "ignored wandb_project because `use_wandb: false`"),
        ("wandb_project: x", "wandb: reports go there when wandb is installed where training runs"),
        ("comet_project_name: x", "comet_ml: reports go there when comet-ml is installed"),
        ("wandb_log_model: end", "ignored wandb_log_model because models are kept in the artifact"),
        (
            "wandb_project: x\nwandb_run_id: run-7",
            "set wandb_name: run-7 because `wandb_run_id` is given",
        ),
        ("fp16: true", "set bf16: true because `fp16: true` asks for 16 bits"),
        ("float16: true", "set bf16: true because `float16: true` asks for 16 bits"),
        ("bf16: true\nfp16: true", "ignored fp16 because `bf16` comes first"),
        ("save_safetensors: false", "ignored save_safetensors because weights are only ever"),
        ("max_packed_sequence_len: 1024", "set sample_packing: true because"),
        ("max_packed_sequence_len: 2048", "set sequence_len: 2048 because"),
        ("eta_min: 2e-5", "set cosine_min_lr_ratio: 0.1 because `eta_min` is 2e-05"),
        ("logging_steps: 0.2", "set logging_steps: 1 because a share of all steps"),
        ("eval_max_new_tokens: 0", "set eval_table_size: 0 because `eval_max_new_tokens: 0` asks"),
        ("push_dataset_to_hub: me", "ignored push_dataset_to_hub because prepared data is kept"),
        (
            "expert_parallel_size: 2\ndp_shard_size: 2\nfsdp_config: {}",
            "set dp_shard_size: 4 because `expert_parallel_size` divides weights 2 times more",
        ),
        (
            "eval_causal_lm_metrics: [perplexity]\ndo_causal_lm_eval: true",
            "ignored eval_causal_lm_metrics, do_causal_lm_eval because the perplexity",
        ),
        (
            "model_config: {output_router_logits: true, router_aux_loss_coef: 0.1}",
            "read model_config.router_aux_loss_coef as router_aux_loss_coef because the loss",
        ),
        (
            "model_config: {router_aux_loss_coef: 0.1}",
            "ignored model_config because without `output_router_logits` experts are not",
        ),
        ("data_seed: 7", "ignored data_seed because neither Axolotl nor Regrow reads it"),
        (
            "adapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\n"
            "unfrozen_parameters: [^lm_head.*]",
            "ignored unfrozen_parameters because with `adapter` the base is frozen",
        ),
        (
            "plugins: [axolotl.integrations.liger.LigerPlugin]",
            "ignored axolotl.integrations.liger.LigerPlugin because Regrow chooses",
        ),
        (
            "heads_k_stride: 2",
            "ignored heads_k_stride because keys and values are gathered at once",
        ),
        ("ring_attn_func: varlen_llama3", "ignored ring_attn_func because keys and values are"),
        ("rl_beta: 0.1", "ignored rl_beta because training with `rl`"),
        ("dataset_prepared_path: out", "ignored dataset_prepared_path because prepared data"),
        ("gradient_checkpointing: unsloth", "set gradient_checkpointing: offload because that is"),
        ("gradient_checkpointing: offload_disk", "set gradient_checkpointing: offload because"),
        ("optimizer: adamw_hf", "set optimizer: adamw_torch because Transformers has taken"),
        ("gc_steps: 5", "ignored gc_steps because torch gives memory that it holds back"),
        (
            "saves_per_epoch: 2\nsave_strategy: epoch",
            "set save_strategy: steps because `saves_per_epoch` says how often",
        ),
        (
            "adapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\nrelora_steps: 9",
            "set relora: true because `relora_steps` asks for restarts",
        ),
        (
            "adapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\nrelora_steps: 9\n"
            "relora_warmup_steps: 2",
            "read relora_warmup_steps as jagged_restart_warmup_steps because that is its name now",
        ),
        ("relora_steps:\nrelora_warmup_steps: 9", "ignored relora_warmup_steps because"),
        (
            "relora: false\nrelora_steps: 9\nrelora_warmup_steps: 2\nrelora_anneal_steps: 1",
            "ignored relora_steps, relora_warmup_steps, relora_anneal_steps because `relora` is",
        ),
        (
            "adapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\nrelora: true\n"
            "jagged_restart_steps: 9\nrelora_warmup_steps: 2",
            "read relora_warmup_steps as jagged_restart_warmup_steps because that is its name now",
        ),
        ("gptq_groupsize: 128", "ignored gptq_groupsize because `gptq` is off"),
        ("fp32_norm_classes: [RMSNorm]", "ignored fp32_norm_classes because `fp32_norms` is off"),
        ("bench_dataset: org/b", "ignored bench_dataset because `do_bench_eval` is off"),
        (
            "eval_causal_lm_metrics: [sacrebleu]",
            "ignored eval_causal_lm_metrics because `do_causal_lm_eval` is off",
        ),
        (
            "torch_compile: false\ntorch_compile_options: {max_autotune: true}",
            "ignored torch_compile_options because `torch_compile` is off",
        ),
        ("qgalore_rank: 64", "ignored qgalore_rank because `optimizer` is not q_galore_adamw8bit"),
        ("max_memory: {0: 20GiB, cpu: 9GiB}", "ignored max_memory because Regrow places a run"),
    ],
)
def test_what_is_done_to_a_recipe_is_said(notices_of, minimal, written, said):
    assert [notice for notice in notices_of(f"{minimal}{written}\n") if notice.startswith(said)]


@pytest.mark.parametrize(
    ("written", "key", "why"),
    [
        ("rl: ebft", "rl", "energy-based fine-tuning is not here yet"),
        ("ebft: {feature_layers: [1]}", "ebft", "energy-based fine-tuning is not here yet"),
        ("processor_type: AutoProcessor", "processor_type", "training on images or audio"),
        (
            "tensor_parallel_size: 2\ndeepspeed: zero2.json",
            "tensor_parallel_size",
            "are not divided this way",
        ),
        (
            "model_config: {output_router_logits: true, router_aux_loss_coef: 0.02, rope_theta: 1}",
            "model_config.rope_theta",
            "changing the model's configuration or weights is not here yet",
        ),
        ("overrides_of_model_config: {rope_theta: 1}", "overrides_of_model_config", "not here yet"),
        ("eta_min: 1e-6\nlr_scheduler: linear", "eta_min", "only a cosine ends at it"),
        ("eta_min: 1", "eta_min", "expected a number from 0 to `learning_rate`"),
        (
            "do_causal_lm_eval: true",
            "do_causal_lm_eval",
            "this evaluation is not here",
        ),
        ("fp32_norms: true", "fp32_norms", "keeping norms in float32"),
        ("attn_implementation: fp8", "attn_implementation", "attention in 8 bits is not here"),
        ("plugins: [my.Plugin]", "plugins[0]", "this plugin's function is not here"),
        ("optimizer: lomo", "optimizer", "keeps no state"),
        ("optimizer: flash_adamw", "optimizer", "a package that Regrow does not use"),
        (
            "dsv4_fp8_nonexpert_mode: keep",
            "dsv4_fp8_nonexpert_mode",
            "a base stored in FP8 is dequantized when it is loaded",
        ),
        ("bf16: true\nfloat32: true", "float32", "`bf16` says otherwise"),
        ("float32: true\nfp16: true", "fp16", "`float32` says otherwise"),
        ("resume_from_checkpoint: out/checkpoint-9", "resume_from_checkpoint", "of elsewhere"),
        ("hub_model_id: a/b\npush_to_hub: maybe", "push_to_hub", "expected true or false"),
        (
            "gradient_checkpointing: true\nactivation_offloading: cpu",
            "activation_offloading",
            "expected true or false",
        ),
        ("use_ray: 3", "use_ray", "expected true or false"),
        ("wandb_run_name: a\nwandb_name: b", "wandb_run_name", "it is read as `wandb_name`"),
        ("push_to_hub: true", "push_to_hub", "it names no destination"),
        ("activation_offloading: true", "activation_offloading", "`gradient_checkpointing` is off"),
        ("selective_checkpointing: true", "selective_checkpointing", "is off"),
        ("max_packed_sequence_len: x", "max_packed_sequence_len", "expected a whole number"),
        ("attn_implementation: flash", "attn_implementation", "no such attention"),
        (
            "attn_implementation: sdpa\nflash_attention: true",
            "flash_attention",
            "`attn_implementation: sdpa` says otherwise",
        ),
        (
            "dataset_processes: 2\ndataset_num_proc: 3",
            "dataset_processes",
            "it is the old name of `dataset_num_proc`",
        ),
        (
            "noisy_embedding_alpha: 2\nneftune_noise_alpha: 3",
            "noisy_embedding_alpha",
            "it is the old name of `neftune_noise_alpha`",
        ),
    ],
)
def test_what_would_not_happen_is_refused(faults_of, minimal, written, key, why):
    (fault,) = faults_of(f"{minimal}{written}\n")
    assert fault.key == key
    assert why in fault.why
    assert fault.line
    assert fault.line >= 9


def test_sizes_of_one_split_nothing(load, minimal):
    load(minimal + "tensor_parallel_size: 1\ncontext_parallel_size: 1\ndp_shard_size: 1\n")


def dataset(*lines: str) -> str:
    return "".join(f"    {line}\n" for line in lines)


def with_dataset(minimal: str, *lines: str) -> str:
    return minimal.replace("    type: alpaca\n", dataset(*lines))


def test_old_message_fields_become_mappings(load, minimal):
    lines = ("type: chat_template", "message_field_role: from", "message_field_content: value")
    entry = load(with_dataset(minimal, *lines)).recipe.datasets[0]
    assert entry.message_property_mappings == {"role": "from", "content": "value"}


def test_reasoning_keys_become_a_mapping(load, minimal):
    lines = ("type: chat_template", "field_thinking: thoughts", "template_thinking_key: thinking")
    entry = load(with_dataset(minimal, *lines)).recipe.datasets[0]
    assert entry.message_property_mappings == {
        "role": "role",
        "content": "content",
        "thinking": "thoughts",
    }


def test_a_mapping_of_one_property_leaves_the_other(load, minimal):
    lines = ("type: chat_template", "message_property_mappings: {content: value}")
    entry = load(with_dataset(minimal, *lines)).recipe.datasets[0]
    assert entry.message_property_mappings == {"content": "value", "role": "role"}


@pytest.mark.parametrize(
    ("lines", "key", "why"),
    [
        (["type: sharegpt.load_glaive"], "type", "Axolotl removed it"),
        (["type: {field_instructions: q}"], "type.field_instructions", "unknown key"),
        (["type: [oasst]"], "type", "expected text"),
        (["type: alpaca", "train_on_split: x"], "train_on_split", "do not read it"),
        (["type: alpaca", "field_chosen: x"], "field_chosen", "no method is named"),
        (
            [
                "type: chat_template",
                "message_field_role: from",
                "message_property_mappings: {role: who}",
            ],
            "message_field_role",
            "`message_property_mappings.role` says otherwise",
        ),
    ],
)
def test_datasets_that_would_be_read_otherwise_are_refused(faults_of, minimal, lines, key, why):
    (fault,) = faults_of(with_dataset(minimal, *lines))
    assert fault.key == f"datasets[0].{key}"
    assert why in fault.why
    assert fault.line


def entry_of(load, minimal, *lines):
    return load(with_dataset(minimal, *lines)).recipe.datasets[0]


def test_no_type_at_all_is_missing_and_an_empty_one_means_tokens(load, minimal):
    assert entry_of(load, minimal, "type:").type == "pretokenized"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("alpaca_chat.load", "alpaca_chat"),
        ("pretrain", "completion"),
        ("chat_template.default", "chat_template"),
        ("context_qa.load_v2", "context_qa.load_v2"),
    ],
)
def test_the_function_that_axolotl_calls_anyway_may_be_named(load, minimal, written, read):
    assert entry_of(load, minimal, f"type: {written}").type == read


def test_a_map_is_a_prompt(load, minimal):
    lines = ("type:", "  field_instruction: q", "  format: '{instruction}: {input}'")
    prompt = entry_of(load, minimal, *lines).type
    assert (prompt.field_instruction, prompt.field_output) == ("q", "output")
    assert (prompt.format, prompt.no_input_format) == ("{instruction}: {input}", "{instruction} ")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["type: sharegpt"], {"field_messages": "conversations"}),
        (["type: sharegpt:chat", "field_messages: talk"], {"field_messages": "talk"}),
        (
            ["type: sharegpt.load_role"],
            {"message_property_mappings": {"role": "role", "content": "value"}},
        ),
        (
            ["type: sharegpt.load_guanaco"],
            {
                "message_property_mappings": {"role": "role", "content": "text"},
                "roles": {"user": ("prompter",)},
            },
        ),
        (["type: sharegpt.load_ultrachat"], {"field_messages": "messages"}),
        (
            ["type: sharegpt", "field_human: Bob", "field_model: bot"],
            {"roles": {"user": ("Bob",), "assistant": ("bot",)}},
        ),
        (
            ["type: sharegpt", "field_human: Bob"],
            {"roles": {"user": ("Bob",), "assistant": ("gpt",)}},
        ),
        (["type: sharegpt", "conversation: chatml"], {"chat_template": "chatml"}),
        (
            ["type: sharegpt", "conversation: chatml", "chat_template: llama3"],
            {"chat_template": "llama3"},
        ),
    ],
)
def test_sharegpt_is_a_chat_template_of_other_names(load, notices_of, minimal, lines, expected):
    entry = entry_of(load, minimal, *lines)
    assert entry.type == "chat_template"
    assert {name: getattr(entry, name) for name in expected} == expected
    said = notices_of(with_dataset(minimal, *lines))
    assert any(notice.startswith("read datasets[0].type as chat_template") for notice in said)


def test_a_map_of_tokens_is_special_tokens(load, faults_of, minimal):
    text = minimal + "tokens:\n  bos_token: <s>\n  eos_token: </s>\n"
    recipe = load(text).recipe
    assert recipe.tokens == ()
    assert recipe.special_tokens.eos_token == "</s>"
    (fault,) = faults_of(text + "special_tokens:\n  eos_token: <end>\n")
    assert (fault.key, fault.line) == ("tokens.eos_token", 11)


def test_every_key_that_axolotl_declares_has_a_status():
    top = {*Recipe.model_fields, *WORDS, *READ_OTHERWISE}
    of_entries = {*Dataset.model_fields, *DATASET_WORDS, *DATASET_READ_OTHERWISE}
    known = top | {f"datasets[].{name}" for name in of_entries}
    assert set(SCHEMA_KEYS) <= known
    assert len(SCHEMA_KEYS) > 500


def test_the_example_keys_are_a_list_of_names():
    assert len(AXOLOTL_KEYS) == 399
    assert yaml.safe_load("\n".join(AXOLOTL_KEYS[:1])) == "base_model"


def test_files_of_a_kind_need_no_path(load, minimal):
    text = minimal.replace("path: org/data", "ds_type: json\n    data_files: [https://x/a.json]")
    assert load(text).recipe.datasets[0].path == "json"


def test_files_of_a_kind_need_no_path_in_an_extended_recipe(minimal, tmp_path):
    text = minimal.replace("path: org/data", "ds_type: json\n    data_files: a.json")
    (tmp_path / "sub").mkdir()
    (tmp_path / "json").mkdir()  # not what `ds_type` means
    (tmp_path / "sub/json").mkdir()
    (tmp_path / "sub/a.json").write_text("{}")
    (tmp_path / "sub/base.yaml").write_text(text)
    (tmp_path / "own.yaml").write_text("extends: sub/base.yaml\n")
    (entry,) = load_recipe(tmp_path / "own.yaml").recipe.datasets
    assert (entry.path, entry.data_files) == ("json", (str(tmp_path / "sub/a.json"),))


@pytest.mark.parametrize("key", ["dion_bogus", "qgalore_rnak"])
def test_a_misspelt_key_of_an_optimizer_is_a_fault(faults_of, minimal, key):
    assert [fault.key for fault in faults_of(f"{minimal}{key}: 1\n")] == [key]


@pytest.mark.parametrize("steps", ["abc", "-5", "true"])
def test_steps_of_relora_that_are_none_are_one_fault(faults_of, minimal, steps):
    (fault,) = faults_of(f"{minimal}relora_steps: {steps}\n")
    assert fault.key == "relora_steps"


def test_relora_that_is_off_restarts_nothing(load, minimal):
    recipe = load(f"{minimal}relora: false\nrelora_steps: 9\n").recipe
    assert (recipe.relora, recipe.jagged_restart_steps) == (False, None)


def test_values_are_renamed_for_keys_that_refuse_none(load, minimal, monkeypatch):
    monkeypatch.setitem(RENAMED_VALUES, "lr_scheduler", {"cosinus": ("cosine", "of the name")})
    assert load(f"{minimal}lr_scheduler: cosinus\n").recipe.lr_scheduler == "cosine"

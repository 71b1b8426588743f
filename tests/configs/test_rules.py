"""Each rule between keys: from YAML text to the message its author reads."""

from __future__ import annotations

import pytest

from regrow.configs.rules import adapter, batch, data, model, schedule
from regrow.configs.rules.all_rules import ALL_RULES
from regrow.configs.rules.rule import Rule
from regrow.configs.sections.data import CHAT_TEMPLATES
from regrow.tasks.prepare.templates import TEMPLATES

LORA = "adapter: lora\nlora_r: 8\nlora_alpha: 16\n"

# rule -> cases of (lines added to the smallest recipe, key at fault, part of the reason)
CASES: dict[str, list[tuple[str, str, str]]] = {
    "there_is_training_data": [("datasets: []", "datasets", "the list is empty")],
    "validation_data_is_said_once": [
        (
            "val_set_size: 0.1\ntest_datasets: [{path: org/t, type: alpaca}]",
            "val_set_size",
            "`test_datasets` says already",
        )
    ],
    "val_set_size_is_a_share_or_a_number": [
        ("val_set_size: 1.0", "val_set_size", "must be below 1"),
        ("val_set_size: 2.5", "val_set_size", "must be below 1"),
    ],
    "shards_and_index_fit": [
        (
            "test_datasets: [{path: org/t, type: alpaca, shards: 4, shards_idx: 4}]",
            "test_datasets[0].shards_idx",
            "with shards: 4 the last one is 3",
        ),
        (
            "test_datasets: [{path: org/t, type: alpaca, shards_idx: 4}]",
            "test_datasets[0].shards_idx",
            "`shards` is not given",
        ),
    ],
    "dataset_code_is_never_run": [
        (
            "test_datasets: [{path: org/t, type: alpaca, trust_remote_code: true}]",
            "test_datasets[0].trust_remote_code",
            "never run",
        )
    ],
    "jinja_templates_have_text": [
        ("chat_template: jinja", "chat_template", "`chat_template_jinja` is not given"),
        (
            "chat_template: chatml\nchat_template_jinja: '{{ x }}'",
            "chat_template_jinja",
            "`chat_template: chatml` says otherwise",
        ),
    ],
    "chat_templates_are_known": [
        ("chat_template: llama99", "chat_template", "there is no such template"),
        (
            "chat_template: tokenizer_default_fallback_x",
            "chat_template",
            "there is no such template",
        ),
        (
            "test_datasets: [{path: org/t, type: chat_template, chat_template: x}]",
            "test_datasets[0].chat_template",
            "there is no such template",
        ),
    ],
    "some_length_is_left": [("min_sample_len: 1025", "min_sample_len", "no example can be")],
    "no_passwords_in_addresses": [
        ("store: s3://me:pw@bucket/x", "store", "secrets do not belong"),
        ("mlflow_tracking_uri: http://me:pw@host", "mlflow_tracking_uri", "secrets do not"),
        (
            "test_datasets: [{path: 'https://me:pw@host/x.json', type: alpaca}]",
            "test_datasets[0].path",
            "secrets do not belong",
        ),
    ],
    "the_global_batch_is_said": [
        ("gradient_accumulation_steps: null", "micro_batch_size", "is not said"),
    ],
    "the_batch_keys_agree": [
        ("batch_size: 16", "batch_size", "micro_batch_size * gradient_accumulation_steps is 8"),
    ],
    "the_batch_divides_evenly": [
        ("gradient_accumulation_steps: null\nbatch_size: 5", "batch_size", "no multiple of"),
        ("gradient_accumulation_steps: null\nbatch_size: 1", "batch_size", "no multiple of"),
        ("micro_batch_size: null\nbatch_size: 6", "batch_size", "gradient_accumulation_steps, 4"),
    ],
    "warmup_is_said_once": [
        ("warmup_steps: 10\nwarmup_ratio: 0.1", "warmup_steps", "`warmup_ratio: 0.1` says"),
    ],
    "saving_is_said_once": [
        ("save_steps: 10\nsaves_per_epoch: 1", "save_steps", "`saves_per_epoch` says otherwise"),
    ],
    "validating_is_said_once": [
        (
            "val_set_size: 0.1\neval_steps: 10\nevals_per_epoch: 1",
            "eval_steps",
            "`evals_per_epoch` says otherwise",
        ),
    ],
    "saving_fits_its_strategy": [
        ("save_strategy: epoch\nsave_steps: 10", "save_steps", "`save_strategy: epoch`"),
        ("save_strategy: no\nsaves_per_epoch: 2", "saves_per_epoch", "`save_strategy: no`"),
    ],
    "validating_fits_its_strategy": [
        (
            "val_set_size: 0.1\neval_strategy: epoch\neval_steps: 10",
            "eval_steps",
            "`eval_strategy: epoch`",
        ),
        (
            "val_set_size: 0.1\neval_strategy: no\nevals_per_epoch: 2",
            "evals_per_epoch",
            "`eval_strategy: no`",
        ),
    ],
    "saving_by_steps_has_steps": [
        ("save_strategy: steps", "save_strategy", "neither `save_steps` nor"),
    ],
    "validating_by_steps_has_steps": [
        ("val_set_size: 9\neval_strategy: steps", "eval_strategy", "neither `eval_steps` nor"),
    ],
    "validating_needs_data": [
        ("eval_steps: 10", "eval_steps", "there is no validation data"),
        ("eval_strategy: epoch", "eval_strategy", "there is no validation data"),
    ],
    "steps_are_whole_or_a_share": [
        ("save_steps: 2.5", "save_steps", "a whole number, or a share"),
        ("val_set_size: 9\neval_steps: 7.5", "eval_steps", "a whole number, or a share"),
    ],
    "a_lowest_rate_needs_a_cosine": [
        ("lr_scheduler: linear\ncosine_min_lr_ratio: 0.1", "cosine_min_lr_ratio", "no meaning"),
    ],
    "schedulers_have_their_arguments": [
        ("lr_scheduler: cosine_with_min_lr", "lr_scheduler", "no lowest learning rate"),
        ("lr_scheduler: warmup_stable_decay", "lr_scheduler", "no decay"),
    ],
    "the_schedule_can_be_repeated": [
        ("lr_scheduler: reduce_lr_on_plateau", "lr_scheduler", "no result could be repeated"),
    ],
    "lora_is_complete": [
        ("adapter: lora\nlora_alpha: 8\nlora_target_linear: true", "lora_r", "needs a rank"),
        ("adapter: lora\nlora_r: 8\nlora_target_linear: true", "lora_alpha", "needs a scale"),
        (LORA, "lora_target_linear", "needs layers to adapt"),
    ],
    "target_patterns_are_valid": [
        (LORA + "lora_target_modules: '(q'", "lora_target_modules", "not a regular expression"),
    ],
    "one_pattern_stands_alone": [
        (LORA + "lora_target_modules: [q_proj, 'v.*']", "lora_target_modules", "is a pattern"),
    ],
    "a_pattern_excludes_all_linear_layers": [
        (
            LORA + "lora_target_modules: '.*_proj'\nlora_target_linear: true",
            "lora_target_modules",
            "takes every linear layer already",
        ),
    ],
    "adapters_leave_the_base_alone": [
        ("peft_init_lora_weights: pissa", "peft_init_lora_weights", "changes the base weights"),
    ],
    "quantized_bases_are_not_here_yet": [
        (
            "adapter: qlora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true",
            "adapter",
            "a quantized base model is not here yet",
        ),
        (
            LORA + "lora_target_linear: true\nload_in_8bit: true",
            "load_in_8bit",
            "a quantized base model is not here yet",
        ),
    ],
    "quantized_weights_are_not_trained": [
        ("load_in_4bit: true", "load_in_4bit", "cannot be trained without an adapter"),
        (
            LORA + "lora_target_linear: true\nload_in_4bit: true\nload_in_8bit: true",
            "load_in_8bit",
            "`load_in_4bit` says otherwise",
        ),
    ],
    "adapters_start_anew": [("lora_model_dir: out", "lora_model_dir", "is not here yet")],
    "sharding_is_not_here_yet": [
        ("deepspeed: zero2.json", "deepspeed", "DeepSpeed is not here yet"),
        ("fsdp: [full_shard]", "fsdp", "FSDP is not here yet"),
        ("fsdp_config: {offload_params: true}", "fsdp_config", "FSDP is not here yet"),
    ],
    "one_way_of_sharding": [
        ("deepspeed: z.json\nfsdp_config: {a: 1}", "deepspeed", "FSDP is asked for as well"),
    ],
    "float16_is_refused": [("fp16: true", "fp16", "training in float16 is not here")],
    "only_causal_language_models": [
        ("model_type: AutoModelForSequenceClassification", "model_type", "only causal"),
    ],
    "tokenizer_classes_are_tokenizers": [
        ("tokenizer_type: Llama", "tokenizer_type", "not a tokenizer's class"),
    ],
    "the_model_has_its_own_config": [
        ("base_model_config: org/other", "base_model_config", "is not here yet"),
    ],
}


def changed(minimal: str, added: str) -> str:
    """The smallest recipe with lines added, or put in the place of its own."""
    lines = [line for line in added.splitlines() if line]
    keys = {line.partition(":")[0] for line in lines}
    kept = minimal
    for key in keys & {"datasets", "micro_batch_size", "gradient_accumulation_steps"}:
        block = next(line for line in kept.splitlines() if line.startswith(f"{key}:")) + "\n"
        kept = kept.replace(block, "")
    if "datasets" in keys:
        kept = kept.replace("  - path: org/data\n    type: alpaca\n", "")
    return kept + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("rule", "added", "key", "why"),
    [(rule, *case) for rule, cases in CASES.items() for case in cases],
)
def test_a_broken_rule_is_reported(faults_of, minimal, rule, added, key, why):
    text = changed(minimal, added)
    found = [fault for fault in faults_of(text) if fault.key == key and why in fault.why]
    assert len(found) == 1
    assert found[0].remedy
    if f"{key}:" in text:
        assert text.splitlines()[found[0].line - 1].startswith(key)


def test_the_smallest_recipe_breaks_no_rule(load, minimal):
    """So each fault above comes from the lines added."""
    assert load(minimal).recipe


def test_each_rule_has_its_case_and_its_place():
    assert {rule.name for rule in ALL_RULES} == CASES.keys()
    modules = (adapter, batch, data, model, schedule)
    written = {v.name for m in modules for v in vars(m).values() if isinstance(v, Rule)}
    assert written == CASES.keys()
    assert len(ALL_RULES) == len(CASES)


def test_each_rule_says_what_it_is():
    assert all(rule.check.__doc__ for rule in ALL_RULES)


@pytest.mark.parametrize(
    "added",
    [
        "val_set_size: 0.1\nevals_per_epoch: 4\nsaves_per_epoch: 1",
        "val_set_size: 500\neval_steps: 0.25\nsave_steps: 100",
        "val_set_size: 0.0\nevals_per_epoch: 4",
        "eval_strategy: no\nsave_strategy: no",
        "warmup_steps: 0\nwarmup_ratio: 0.1",
        "batch_size: 8",
        "gradient_accumulation_steps: null\nbatch_size: 16",
        "chat_template: tokenizer_default_fallback_chatml",
        "chat_template_jinja: '{{ messages }}'",
        LORA + "lora_target_modules: '.*\\.(q|v)_proj'",
        LORA + "lora_target_modules: [q_proj, v_proj]\nlora_target_linear: true",
        "fsdp: []\nfsdp_config:\ndeepspeed:",
        "model_type: MistralForCausalLM\ntokenizer_type: LlamaTokenizerFast",
        "base_model_config: org/model",
    ],
)
def test_what_runs_breaks_no_rule(load, minimal, added):
    load(changed(minimal, added))


def test_the_named_chat_templates_are_those_that_exist():
    assert set(CHAT_TEMPLATES) == set(TEMPLATES)

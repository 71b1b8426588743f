"""Every field of a recipe is read by a stage or a flow, or its author is told that it is not."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

import pytest

from regrow.configs import unread
from regrow.configs.faults import RecipeError
from regrow.configs.recipe import Recipe
from regrow.configs.sections.data import Dataset

ROOT = Path(__file__).parents[2]

# Read by no stage: (lines of a recipe, what its author is told).
TOLD: dict[str, tuple[str, str]] = {
    "model_type": ("model_type: LlamaForCausalLM", "ignored model_type because"),
    "tokenizer_type": ("tokenizer_type: LlamaTokenizer", "ignored tokenizer_type because"),
    "base_model_config": ("base_model_config: org/other", "is not here yet"),
    "attn_implementation": ("attn_implementation: sdpa", "read attn_implementation as regrow_pack"),
    "fsdp_version": ("fsdp_version: 2", "ignored fsdp_version because `fsdp_config` is not given"),
    "hub_strategy": (
        "hub_model_id: me/mine\nhub_strategy: every_save",
        "ignored hub_strategy because only the finished model is pushed",
    ),
    "metric_for_best_model": (
        "metric_for_best_model: loss",
        "ignored metric_for_best_model because no best model is looked for",
    ),
    "greater_is_better": (
        "greater_is_better: false",
        "ignored greater_is_better because no best model is looked for",
    ),
    "model_quantization_config": (
        "model_quantization_config: Mxfp4Config",
        "such weights are trained and merged dequantized",
    ),
    "model_quantization_config_kwargs": (
        "model_quantization_config_kwargs: {dequantize: true}",
        "ignored model_quantization_config_kwargs because `model_quantization_config` is not given",
    ),
}

LORA = "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
FSDP = "fsdp_config: {auto_wrap_policy: NO_WRAP, "

# finder -> cases of (added lines, the whole of what is ignored, part of the reason)
CASES: dict[str, list[tuple[str, list[str], str]]] = {
    "keys_of_conversations": [
        ("eot_tokens: [<e>]", ["eot_tokens"], "no dataset holds conversations"),
        ("default_system_message: Hi", ["default_system_message"], "no dataset holds"),
        ("chat_template_kwargs: {a: 1}", ["chat_template_kwargs"], "no dataset holds"),
    ],
    "templates_of_datasets": [
        (
            "test_datasets: [{path: org/t, type: alpaca, chat_template: chatml}]",
            ["chat_template"],
            "`type: alpaca` renders no conversations",
        ),
        (
            "test_datasets: [{path: org/t, type: {field_output: a}, chat_template: chatml}]",
            ["chat_template"],
            "a map of prompts renders no conversations",
        ),
    ],
    "places_of_datasets": [
        (
            "test_datasets: [{path: 'https://x/t.json', type: alpaca, name: main}]",
            ["name"],
            "is not on the hub",
        ),
        (
            "test_datasets: [{path: 's3://b/data', type: alpaca, revision: v1}]",
            ["revision"],
            "is not on the hub",
        ),
    ],
    "keys_of_the_hub": [
        ("hub_private_repo: false", ["hub_private_repo"], "`hub_model_id` is not given"),
        ("base_model: ./\nrevision_of_model: v1", ["revision_of_model"], "a local directory"),
    ],
    "keys_of_validation": [
        ("evals_per_epoch: 2", ["evals_per_epoch"], "there is no validation data"),
        ("eval_sample_packing: false", ["eval_sample_packing"], "there is no validation data"),
        ("eval_sequence_len: 99", ["eval_sequence_len"], "there is no validation data"),
        ("eval_batch_size: 9", ["eval_batch_size"], "there is no validation data"),
        ("eval_table_size: 3", ["eval_table_size"], "there is no validation data"),
        ("eval_steps: 9", ["eval_steps"], "there is no validation data"),
        ("eval_strategy: epoch", ["eval_strategy"], "there is no validation data"),
        ("eval_max_new_tokens: 9", ["eval_max_new_tokens"], "there are no prompts"),
        ("validation_leakage: keep", ["validation_leakage"], "there is no validation data"),
        (
            "val_set_size: 9\nvalidation_leakage: keep",
            ["validation_leakage"],
            "is not trained on",
        ),
    ],
    "keys_of_the_best_model": [
        ("save_strategy: no\nsave_total_limit: 2", ["save_total_limit"], "keeps no checkpoint"),
        ("loss_watchdog_patience: 5", ["loss_watchdog_patience"], "threshold` is not given"),
    ],
    "keys_of_adapters": [
        (
            LORA + "lora_model_dir: org/adapter",
            ["lora_r", "lora_alpha", "lora_target_linear"],
            "the adapter in `lora_model_dir` has its own",
        ),
        (LORA + "loraplus_lr_embedding: 1e-5", ["loraplus_lr_embedding"], "is not given"),
        (
            LORA + "peft_init_lora_weights: gaussian\npeft: {loftq_config: {loftq_bits: 4}}",
            ["peft.loftq_config"],
            "`peft_init_lora_weights: gaussian` says otherwise",
        ),
    ],
    "keys_of_restarts": [
        ("relora_prune_ratio: 0.5", ["relora_prune_ratio"], "`relora` is off"),
        ("relora_prune_method: random", ["relora_prune_method"], "`relora` is off"),
    ],
    "keys_of_optimizers": [
        ("optimizer: sgd\nadam_beta1: 0.5", ["adam_beta1"], "`optimizer: sgd` does not use it"),
        ("adam_beta3: 0.9", ["adam_beta3"], "adamw_torch_fused` does not use it"),
        ("adam_epsilon2: 1e-9", ["adam_epsilon2"], "adamw_torch_fused` does not use it"),
        ("optim_target_modules: [attn]", ["optim_target_modules"], "does not use it"),
    ],
    "keys_of_memory": [
        (
            "gradient_checkpointing_kwargs: {use_reentrant: true}",
            ["gradient_checkpointing_kwargs"],
            "`gradient_checkpointing` is off",
        ),
        ("bnb_config_kwargs: {bnb_4bit_quant_type: fp4}", ["bnb_config_kwargs"], "not quantized"),
        (
            FSDP + "transformer_layer_cls_to_wrap: [A]}",
            ["fsdp_config.transformer_layer_cls_to_wrap"],
            "`auto_wrap_policy: NO_WRAP` does not use it",
        ),
        (FSDP + "min_num_params: 9}", ["fsdp_config.min_num_params"], "does not use it"),
        (
            "fsdp_config: {min_num_params: 9}",
            ["fsdp_config.min_num_params"],
            "`auto_wrap_policy: TRANSFORMER_BASED_WRAP` does not use it",
        ),
        (
            "fsdp_config: {state_dict_type: FULL_STATE_DICT}",
            ["fsdp_config.state_dict_type"],
            "always sharded",
        ),
        (
            "fsdp_config: {mixed_precision_policy: bf16}",
            ["fsdp_config.mixed_precision_policy"],
            "held in",
        ),
    ],
    "keys_of_ray": [
        ("ray_num_workers: 4", ["ray_num_workers"], "it is for `launcher: ray`"),
        ("resources_per_worker: {CPU: 2}", ["resources_per_worker"], "it is for `launcher: ray`"),
    ],
    "keys_of_reporters": [
        ("wandb_name: x", ["wandb_name"], "no `wandb` project"),
        ("wandb_project: x\nwandb_mode: disabled", ["wandb_project"], "`wandb_mode: disabled`"),
        ("comet_project_name: x\nuse_comet: false", ["comet_project_name"], "`use_comet: false`"),
        ("trackio_run_name: x", ["trackio_run_name"], "no `trackio` project"),
        ("swanlab_workspace: x", ["swanlab_workspace"], "no `swanlab` project"),
    ],
    "classes_by_name": [("model_type: LlamaForCausalLM", ["model_type"], "own files decide it")],
    "epochs_beside_steps": [("max_steps: 3\nnum_epochs: 2", ["num_epochs"], "decides")],
    "names_of_runs": [("run_name: a\nmlflow_run_name: b", ["mlflow_run_name"], "`run_name: a`")],
}


def changed(minimal: str, added: str) -> str:
    return (
        minimal.replace(
            "base_model: org/model\n", "" if "base_model:" in added else "base_model: org/model\n"
        )
        + added
        + "\n"
    )


@pytest.mark.parametrize(
    ("added", "keys", "why"), [case for cases in CASES.values() for case in cases]
)
def test_a_key_that_nothing_reads_is_told(load, minimal, added, keys, why):
    told = [n for n in load(changed(minimal, added)).notices if n.action == "ignored"]
    assert [key for notice in told for key in notice.keys] == keys
    assert why in told[0].why


@pytest.mark.parametrize(
    ("added", "keys"),
    [(added, keys) for cases in CASES.values() for added, keys, _ in cases if "." not in keys[0]],
)
def test_what_is_ignored_decides_nothing(load, minimal, added, keys):
    text, fields = changed(minimal, added), Recipe.model_fields
    mine = [key for key in keys if key in fields and key not in unread.SPOKEN_OF]
    without = [line for line in text.splitlines() if line.partition(":")[0] not in mine]
    if "test_datasets" in added:
        for name in ("chat_template: chatml", "name: main", "revision: v1"):
            without = [line.replace(f", {name}", "") for line in without]
    ignoring, silent = load(text).recipe, load("\n".join(without)).recipe
    kept = {key: getattr(silent, key) for key in unread.SPOKEN_OF}
    assert ignoring.model_copy(update=kept) == silent
    assert ignoring.given().keys() == load("\n".join(without)).recipe.given().keys() or not mine


def test_what_needs_what_is_ignored_is_ignored_too(load, minimal):
    loaded = load(minimal + "loraplus_lr_ratio: 16\nloraplus_lr_embedding: 1e-5\n")
    assert loaded.recipe == load(minimal).recipe
    (notice,) = [n for n in loaded.notices if n.action == "ignored"]
    assert notice.keys == ("loraplus_lr_ratio", "loraplus_lr_embedding")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("warmup_steps: 0\nwarmup_ratio: 0.1", "warmup_steps: 0"),
        ("warmup_steps: 5\nwarmup_ratio: 0", "warmup_steps: 5"),
        ("warmup_steps: 5\ncosine_min_lr_ratio: 0", "warmup_steps: 5"),
        (
            "warmup_steps: 5\ncosine_min_lr_ratio: 0.1",
            "warmup_steps: 5\ncosine_min_lr_ratio: 0.1\nlr_scheduler_kwargs: {min_lr_rate: 0.1}",
        ),
        ("max_steps: 9\nnum_epochs: 4", "max_steps: 9"),
        ("optimizer: sgd\nadam_beta1: 0.5\nadam_beta3: 0.5", "optimizer: sgd"),
        ("lora_r: 8\nlora_dropout: 0.1\nloraplus_lr_ratio: 4\nlora_model_dir: org/a", "seed: 42"),
    ],
)
def test_what_means_the_same_is_the_same(load, minimal, one, other):
    recipes = [load(f"{minimal}{lines}\n").recipe for lines in (one, other)]
    assert recipes[0] == recipes[1]


def test_each_finder_has_its_cases():
    assert [find.__name__ for find in unread._FINDS] == list(CASES)


def test_the_smallest_recipe_has_nothing_unread(load, minimal):
    assert not [notice for notice in load(minimal).notices if notice.action == "ignored"]


def test_keys_are_read_where_their_ground_is_given(load, minimal):
    text = minimal.replace("type: alpaca", "type: chat_template") + (
        "eot_tokens: [<e>]\ndefault_system_message: Hi\nval_set_size: 9\neval_batch_size: 3\n"
        "chat_template: chatml\nwandb_project: x\nwandb_name: y\n"
    )
    assert not [notice for notice in load(text).notices if notice.action == "ignored"]


def test_a_template_that_nothing_renders_changes_no_key(load, minimal):
    own = minimal.replace("type: alpaca", "type: alpaca\n    chat_template: chatml")
    assert load(own).recipe.datasets == load(minimal).recipe.datasets


def names_in(code: str) -> set[str]:
    """Attributes that are read, and texts that may name one for `getattr`."""
    nodes = list(ast.walk(ast.parse(code)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return attributes | {text for text in texts if isinstance(text, str)}


def read_outside_configs() -> set[str]:
    files = [path for folder in ("tasks", "flows") for path in (ROOT / folder).rglob("*.py")]
    found = {name for path in files for name in names_in(path.read_text(encoding="utf-8"))}
    properties = inspect.getmembers(Recipe, lambda member: isinstance(member, property))
    for name, its in properties:
        if name in found:
            found |= names_in(textwrap.dedent(inspect.getsource(its.fget)))
    return found


def test_every_field_is_read_or_spoken_of():
    found = read_outside_configs()
    assert {name for name in Recipe.model_fields if name not in found} <= TOLD.keys()
    assert {name for name in Dataset.model_fields if name not in found} == set()


@pytest.mark.parametrize("field", TOLD)
def test_fields_that_no_stage_reads_are_spoken_of(load, minimal, field):
    added, said = TOLD[field]
    try:
        told = [str(notice) for notice in load(f"{minimal}{added}\n").notices]
    except RecipeError as error:
        told = [str(fault) for fault in error.faults]
    assert [line for line in told if said in line]

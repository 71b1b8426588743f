"""What a recipe says and nothing reads: a notice for each such key.

So no key is without effect in silence. Each function gets the filled-in recipe and the keys that
its author gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from regrow.configs.faults import Notice
from regrow.configs.local_paths import is_on_the_hub
from regrow.configs.optimizers import LOW_RANK
from regrow.configs.recipe import Recipe
from regrow.configs.sections.adapter import AdapterSection
from regrow.configs.sections.data import Dataset
from regrow.configs.sections.dataset_types import is_own_code

Unread = tuple[str, str]
"""(key, why nothing reads it)."""

Find = Callable[[Recipe, frozenset[str]], Iterator[Unread]]


def unread(as_given: Recipe, recipe: Recipe, given: frozenset[str]) -> Iterator[Notice]:
    """A notice for every key that was given a value of its own and is read by nothing.

    Args:
        as_given: the recipe before it was filled in, which takes unread templates away.
    """
    for find in _FINDS:
        # Filling in takes these out of the datasets.
        of_entries = find in (templates_of_datasets, places_of_datasets)
        source = as_given if of_entries else recipe
        for key, why in find(source, given):
            yield Notice("ignored", (key,), why)


def said(recipe: Recipe, given: frozenset[str], *keys: str) -> list[str]:
    """Those of `keys` to which the author gave another value than the default."""
    fields = Recipe.model_fields
    return [
        key
        for key in keys
        if key in given and getattr(recipe, key) not in (fields[key].default, None, (), "")
    ]


def reads_conversations(recipe: Recipe, entry: Dataset) -> bool:
    """Whether a dataset's rows are rendered with a chat template."""
    if recipe.data_kind != "sft":
        return recipe.data_kind != "steps"
    return isinstance(entry.type, str) and (
        entry.type == "chat_template" or is_own_code(entry.type)
    )


def keys_of_conversations(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """What decides how conversations are rendered needs a dataset of conversations."""
    entries = (*recipe.datasets, *recipe.test_datasets)
    if recipe.tokenizer_use_mistral_common:
        for key in said(recipe, given, "eot_tokens", "chat_template_kwargs"):
            yield key, "mistral-common writes each conversation in its own way"
    if any(reads_conversations(recipe, entry) for entry in entries):
        return
    why = "no dataset holds conversations (`type: chat_template`)"
    keys = ("eot_tokens", "default_system_message", "chat_template_kwargs")
    for key in said(recipe, given, *keys):
        yield key, why


def templates_of_datasets(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """A dataset's own template needs conversations, too."""
    for entry in (*recipe.datasets, *recipe.test_datasets):
        if not reads_conversations(recipe, entry):
            for key in ("chat_template", "chat_template_jinja"):
                if getattr(entry, key) is not None:
                    yield key, f"{_type(entry)} renders no conversations"


def places_of_datasets(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """What chooses among the files of a dataset needs a dataset with a choice."""
    for entry in (*recipe.datasets, *recipe.test_datasets):
        for key in ("name", "revision"):
            if getattr(entry, key) is not None and not is_on_the_hub(entry.path):
                yield key, f"{entry.path} is not on the hub, where datasets have a {key}"


def keys_of_the_hub(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """Commits and private repositories are matters of the hub."""
    if said(recipe, given, "revision_of_model") and not is_on_the_hub(recipe.base_model):
        yield "revision_of_model", "`base_model` is a local directory"
    if recipe.hub_model_id is None:
        for key in said(recipe, given, "hub_private_repo", "hub_strategy"):
            yield key, "`hub_model_id` is not given"
    elif recipe.hub_strategy != "end":
        yield "hub_strategy", "only the finished model is pushed"


def keys_of_validation(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """How validation is done needs validation data."""
    if recipe.validates:
        if said(recipe, given, "validation_leakage") and not recipe.test_datasets:
            yield "validation_leakage", "what is held back from `datasets` is not trained on"
        return
    keys = ("evals_per_epoch", "eval_sample_packing", "eval_sequence_len", "eval_batch_size")
    if "val_set_size" not in given:  # beside 0 these are a fault
        keys += ("eval_steps", *(() if recipe.eval_strategy == "no" else ("eval_strategy",)))
    for key in said(recipe, given, *keys, "eval_table_size", "validation_leakage"):
        yield key, "there is no validation data"
    if not recipe.eval_prompts:
        for key in said(recipe, given, "eval_max_new_tokens"):
            yield key, "there are no prompts: neither validation data nor `eval_prompts`"


def keys_of_the_best_model(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """What the best model is best in, where none is looked for."""
    seeks = recipe.load_best_model_at_end or recipe.save_strategy == "best"
    if not seeks and recipe.lr_scheduler != "reduce_lr_on_plateau":
        for key in given & {"metric_for_best_model", "greater_is_better"}:
            yield key, "no best model is looked for: see `load_best_model_at_end`"
    if recipe.save_strategy == "no":
        for key in said(recipe, given, "save_total_limit"):
            yield key, "`save_strategy: no` keeps no checkpoint"
    if not recipe.output_router_logits:
        for key in said(recipe, given, "router_aux_loss_coef"):
            yield key, "`output_router_logits` is off"
    if recipe.loss_watchdog_threshold is None:
        for key in said(recipe, given, "loss_watchdog_patience"):
            yield key, "`loss_watchdog_threshold` is not given"


def keys_of_adapters(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """What needs an adapter; what one that is gone on with has already; what needs another key."""
    if not recipe.uses_adapter:
        for key, field in AdapterSection.model_fields.items():
            if getattr(recipe, key) not in (field.default, 0, ()):
                yield key, "`adapter` is not set, so all weights are trained"
        return
    if recipe.lora_model_dir:
        keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", *_OF_FRESH)
        for key in said(recipe, given, *keys):
            yield key, "the adapter in `lora_model_dir` has its own"
    if recipe.loraplus_lr_ratio is None:
        for key in said(recipe, given, "loraplus_lr_embedding"):
            yield key, "`loraplus_lr_ratio` is not given"
    if recipe.peft.loftq_config and recipe.peft_init_lora_weights != "loftq":
        first = recipe.peft_init_lora_weights
        yield "peft.loftq_config", f"`peft_init_lora_weights: {first}` says otherwise"


_OF_FRESH = (
    *("lora_target_linear", "lora_target_parameters", "lora_modules_to_save"),
    *("lora_exclude_modules", "lora_rank_pattern", "lora_alpha_pattern", "peft_use_rslora"),
    *("peft_use_dora", "peft_layers_to_transform", "peft_layers_pattern"),
    "peft_trainable_token_indices",
)


def keys_of_restarts(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """What ReLoRA takes out of the optimizer's moments, where nothing restarts."""
    if not recipe.relora:
        for key in said(recipe, given, "relora_prune_method", "relora_prune_ratio"):
            yield key, "`relora` is off"


def keys_of_optimizers(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """Arguments that the chosen optimizer does not have."""
    why = f"`optimizer: {recipe.optimizer}` does not use it"
    adams = ("adam", "ademamix", "came", "lion", "muon", "radam")
    if not any(name in recipe.optimizer for name in adams):
        for key in said(recipe, given, "adam_beta1", "adam_beta2", "adam_epsilon"):
            yield key, why
    if not any(name in recipe.optimizer for name in ("ademamix", "came")):
        for key in said(recipe, given, "adam_beta3"):
            yield key, why
    if "came" not in recipe.optimizer:
        for key in said(recipe, given, "adam_epsilon2"):
            yield key, why
    if recipe.optimizer not in LOW_RANK and recipe.optim_target_modules:
        yield "optim_target_modules", why


def keys_of_memory(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """How activations are recomputed, weights are quantized and shards are cut, where none are."""
    if not recipe.gradient_checkpointing:
        for key in said(recipe, given, "gradient_checkpointing_kwargs"):
            yield key, "`gradient_checkpointing` is off"
    elif recipe.gradient_checkpointing == "selective":
        for key in said(recipe, given, "gradient_checkpointing_kwargs"):
            yield key, "`gradient_checkpointing: selective` needs torch's newer checkpointing"
    if not (recipe.load_in_4bit or recipe.load_in_8bit):
        for key in said(recipe, given, "bnb_config_kwargs"):
            yield key, "the base is not quantized: see `load_in_4bit`"
    if recipe.model_quantization_config is None:
        for key in said(recipe, given, "model_quantization_config_kwargs"):
            yield key, "`model_quantization_config` is not given"
    yield from _of_fsdp(recipe, given)


def _of_fsdp(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    config = recipe.fsdp_config
    if config is None:
        if "fsdp_version" in given:
            yield "fsdp_version", "`fsdp_config` is not given"
        return
    if config.auto_wrap_policy != "TRANSFORMER_BASED_WRAP" and config.transformer_layer_cls_to_wrap:
        why = f"`auto_wrap_policy: {config.auto_wrap_policy}` does not use it"
        yield "fsdp_config.transformer_layer_cls_to_wrap", why
    if config.min_num_params:
        why = f"`auto_wrap_policy: {config.auto_wrap_policy}` does not use it"
        yield "fsdp_config.min_num_params", why
    if "state_dict_type" in config.model_fields_set:
        yield "fsdp_config.state_dict_type", "checkpoints are always sharded, the result whole"
    if config.mixed_precision_policy:
        yield "fsdp_config.mixed_precision_policy", "weights travel in the type they are held in"


def keys_of_ray(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """What Ray reserves, where it starts nothing."""
    if recipe.launcher != "ray":
        for key in said(recipe, given, "ray_num_workers", "resources_per_worker"):
            yield key, "it is for `launcher: ray`"


def keys_of_reporters(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """What is said of a reporter that is off."""
    asked = {name.partition("_")[0] for name in recipe.reporters}
    for maker in ("wandb", "trackio", "comet", "swanlab"):
        if maker in asked:
            continue
        keys = [key for key in Recipe.model_fields if key.startswith(f"{maker}_")]
        off = f"`use_{maker}: false`" if getattr(recipe, f"use_{maker}") is False else None
        mode = getattr(recipe, f"{maker}_mode", None) == "disabled"
        off = f"`{maker}_mode: disabled`" if mode else off
        for key in said(recipe, given, *keys):
            if not (mode and key == f"{maker}_mode"):
                yield key, f"{off or f'no `{maker}` project'} means no reports to {maker}"


def classes_by_name(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """AutoModelForCausalLM and AutoTokenizer are what happens anyway."""
    for key, usual in (("model_type", "AutoModelForCausalLM"), ("tokenizer_type", "AutoTokenizer")):
        if getattr(recipe, key) not in (None, usual):
            yield key, "the model's and the tokenizer's own files decide it"


def epochs_beside_steps(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """max_steps wins over num_epochs."""
    if recipe.max_steps and "num_epochs" in given:
        yield "num_epochs", f"`max_steps: {recipe.max_steps}` decides"


def names_of_runs(recipe: Recipe, given: frozenset[str]) -> Iterator[Unread]:
    """run_name wins over mlflow_run_name."""
    if recipe.run_name and recipe.mlflow_run_name not in (None, recipe.run_name):
        yield "mlflow_run_name", f"`run_name: {recipe.run_name}` is the run's name"


def _type(entry: Any) -> str:
    return f"`type: {entry.type}`" if isinstance(entry.type, str) else "a map of prompts"


SPOKEN_OF = frozenset({"model_type", "tokenizer_type"})
"""Keys that are ignored and yet stay in a recipe: rules look at them, and no stage does."""

_FINDS: tuple[Find, ...] = (
    keys_of_conversations,
    templates_of_datasets,
    places_of_datasets,
    keys_of_the_hub,
    keys_of_validation,
    keys_of_the_best_model,
    keys_of_adapters,
    keys_of_restarts,
    keys_of_optimizers,
    keys_of_memory,
    keys_of_ray,
    keys_of_reporters,
    classes_by_name,
    epochs_beside_steps,
    names_of_runs,
)

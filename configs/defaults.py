"""Phase 2: what one key implies for another, filled in with a notice that says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from regrow.configs.draft import Draft
from regrow.configs.faults import Notice
from regrow.configs.recipe import Recipe
from regrow.configs.sections.adapter import AdapterSection
from regrow.configs.sections.training import BITSANDBYTES_OPTIMIZERS


@dataclass(frozen=True)
class Set:
    """A key that gets a value; without a reason the value is the documented default."""

    key: str
    value: Any
    why: str = ""


Default = Callable[[Recipe, frozenset[str]], Iterator[Set | Notice]]


def fill_in(recipe: Recipe, given: frozenset[str], draft: Draft) -> Recipe:
    """`recipe` with everything filled in that follows from the rest; notices go to the draft."""
    for default in _DEFAULTS:
        for step in default(recipe, given):
            if isinstance(step, Notice):
                draft.notices.append(step)
                continue
            recipe = recipe.model_copy(update={step.key: step.value})
            if step.why:
                draft.notices.append(Notice("set", (step.key,), step.why, step.value))
    return recipe


def accumulation_follows_batch_size(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """Axolotl: gradient_accumulation_steps = batch_size // micro_batch_size."""
    if recipe.batch_size and "gradient_accumulation_steps" not in given:
        steps = max(1, recipe.batch_size // recipe.micro_batch_size)
        why = f"batch_size {recipe.batch_size} / micro_batch_size {recipe.micro_batch_size}"
        yield Set("gradient_accumulation_steps", steps, f"it is {why}")
    elif recipe.batch_size and "micro_batch_size" not in given:
        micro = max(1, recipe.batch_size // recipe.gradient_accumulation_steps)
        steps = recipe.gradient_accumulation_steps
        why = f"batch_size {recipe.batch_size} / gradient_accumulation_steps {steps}"
        yield Set("micro_batch_size", micro, f"it is {why}")


def the_global_batch_is_the_same_everywhere(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """Axolotl multiplies by the number of GPUs; people should know that Regrow does not."""
    if recipe.global_batch_size > 1:
        why = f"each optimizer step takes {recipe.global_batch_size} rows on any number of GPUs"
        yield Notice("note", ("batch",), f"{why} (Axolotl: on each GPU)")


def eval_batch_size_follows_micro_batch_size(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """Axolotl's default."""
    if recipe.eval_batch_size is None:
        yield Set("eval_batch_size", recipe.micro_batch_size)


def validation_is_packed_as_training_is(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """Axolotl's default."""
    if recipe.eval_sample_packing is None:
        yield Set("eval_sample_packing", recipe.sample_packing)


def datasets_follow_the_recipe(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """Chat template and masking of each dataset, from the recipe's where it has none."""
    for key in ("datasets", "test_datasets"):
        entries = []
        for entry in getattr(recipe, key):
            update: dict[str, Any] = {}
            if entry.chat_template is None and entry.type == "chat_template":
                update["chat_template"] = recipe.chat_template or "tokenizer_default"
                update["chat_template_jinja"] = recipe.chat_template_jinja
            if entry.train_on_inputs is None:
                update["train_on_inputs"] = recipe.train_on_inputs
            if entry.train_on_eot is None:
                update["train_on_eot"] = entry.train_on_eos
            if entry.shards and entry.shards_idx is None:
                update["shards_idx"] = 0
            entries.append(entry.model_copy(update=update))
        yield Set(key, tuple(entries))


def sequence_len_is_axolotls(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """512 tokens are few; nobody should find out from dropped examples."""
    if "sequence_len" not in given:
        yield Set("sequence_len", recipe.sequence_len, "it is Axolotl's default")


def warmup_is_axolotls(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """Axolotl: 3 % of all steps, at most 100; the cap needs the number of steps, so not here."""
    no_warmup = ("constant", "reduce_lr_on_plateau")
    if recipe.warmup_steps is None and recipe.warmup_ratio is None:
        if recipe.lr_scheduler in no_warmup:
            yield Set("warmup_steps", 0)
        else:
            yield Set("warmup_ratio", 0.03, "no warm-up is given and that is Axolotl's default")


def a_lowest_rate_is_transformers_scheduler(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """The same curve under Transformers' name: (1 - r) * cosine + r."""
    if recipe.lr_scheduler == "cosine" and recipe.cosine_min_lr_ratio:
        why = f"cosine_min_lr_ratio is {recipe.cosine_min_lr_ratio}"
        yield Set("lr_scheduler", "cosine_with_min_lr", why)
        kwargs = {**recipe.lr_scheduler_kwargs, "min_lr_rate": recipe.cosine_min_lr_ratio}
        yield Set("lr_scheduler_kwargs", kwargs, why)


def saving_follows_its_keys(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """Axolotl: every epoch where nothing else is said."""
    if recipe.save_strategy is None:
        by_steps = recipe.save_steps or recipe.saves_per_epoch
        never = recipe.saves_per_epoch == 0
        yield Set("save_strategy", "steps" if by_steps else "no" if never else "epoch")


def validating_follows_its_keys(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """Validate by steps where they are given, else each epoch; never without data."""
    asked = recipe.eval_steps or recipe.evals_per_epoch
    if recipe.evals_per_epoch and not recipe.validates:
        yield Notice("ignored", ("evals_per_epoch",), "there is no validation data")
    if recipe.eval_strategy is not None:
        return
    if not recipe.validates or (recipe.evals_per_epoch == 0 and not asked):
        yield Set("eval_strategy", "no")
    else:
        yield Set("eval_strategy", "steps" if asked else "epoch")


def adapter_keys_need_an_adapter(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """LoRA's keys without `adapter` do nothing, as in Axolotl."""
    if recipe.uses_adapter:
        return
    for key, field in AdapterSection.model_fields.items():
        if getattr(recipe, key) not in (field.default, 0, ()) and key != "lora_model_dir":
            yield Notice("ignored", (key,), "`adapter` is not set, so all weights are trained")


def adam_keys_need_adam(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """Adam's betas and epsilon do nothing with other optimizers."""
    if "adam" in recipe.optimizer or "ademamix" in recipe.optimizer:
        return
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if key in given and getattr(recipe, key) != Recipe.model_fields[key].default:
            yield Notice("ignored", (key,), f"`optimizer: {recipe.optimizer}` does not use it")


def class_names_have_no_effect(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """AutoModelForCausalLM and AutoTokenizer are what happens anyway."""
    for key, usual in (("model_type", "AutoModelForCausalLM"), ("tokenizer_type", "AutoTokenizer")):
        if getattr(recipe, key) not in (None, usual):
            why = "the model's and the tokenizer's own files decide it"
            yield Notice("ignored", (key,), why)


def things_to_know(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """What runs, but may surprise."""
    if recipe.trust_remote_code:
        why = "code that comes with the model will run on this machine"
        yield Notice("note", ("trust_remote_code",), why)
    if recipe.optimizer in BITSANDBYTES_OPTIMIZERS:
        why = f"{recipe.optimizer} needs bitsandbytes: install regrow[gpu] where training runs"
        yield Notice("note", ("optimizer",), why)
    if recipe.max_steps and "num_epochs" in given:
        yield Notice("ignored", ("num_epochs",), f"`max_steps: {recipe.max_steps}` decides")
    if recipe.hub_model_id and recipe.hub_strategy != "end":
        why = "only the finished model is pushed"
        yield Notice("ignored", ("hub_strategy",), why)


_DEFAULTS: tuple[Default, ...] = (
    accumulation_follows_batch_size,
    the_global_batch_is_the_same_everywhere,
    eval_batch_size_follows_micro_batch_size,
    validation_is_packed_as_training_is,
    datasets_follow_the_recipe,
    sequence_len_is_axolotls,
    warmup_is_axolotls,
    a_lowest_rate_is_transformers_scheduler,
    saving_follows_its_keys,
    validating_follows_its_keys,
    adapter_keys_need_an_adapter,
    adam_keys_need_adam,
    class_names_have_no_effect,
    things_to_know,
)

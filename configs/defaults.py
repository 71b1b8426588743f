"""Phase 2: what one key implies for another, filled in with a notice that says why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from regrow.configs.draft import Draft
from regrow.configs.faults import Notice
from regrow.configs.local_paths import is_on_the_hub
from regrow.configs.optimizers import LOW_RANK, PACKAGES
from regrow.configs.recipe import Recipe
from regrow.configs.sections.data import Dataset
from regrow.configs.sections.reporting import PACKAGES as PACKAGES_OF_REPORTERS
from regrow.configs.unread import SPOKEN_OF, reads_conversations, unread


@dataclass(frozen=True)
class Set:
    """A key that gets a value; without a reason the value is the documented default."""

    key: str
    value: Any
    why: str = ""


Default = Callable[[Recipe, frozenset[str]], Iterator[Set | Notice]]


def fill_in(recipe: Recipe, given: frozenset[str], draft: Draft) -> Recipe:
    """`recipe` with everything filled in that follows from the rest; notices go to the draft.

    What nothing reads beside the rest is taken out, so that it decides nothing, and told.
    """
    ignored: dict[str, Notice] = {}
    while True:
        filled, notices = _filled_in(recipe, given)
        more = {n.keys[0]: n for n in unread(recipe, filled, given) if n.keys[0] not in ignored}
        ignored |= more
        dropped = {key.partition(".")[0] for key in more} & (Recipe.model_fields.keys() - SPOKEN_OF)
        dropped -= {"fsdp_config"}  # placement, which its other entries need
        if not dropped:
            break
        recipe, given = _without(recipe, dropped), given - dropped
    draft.notices += [*notices, *ignored.values()]
    return filled


def _filled_in(recipe: Recipe, given: frozenset[str]) -> tuple[Recipe, list[Notice]]:
    notices: list[Notice] = []
    for default in _DEFAULTS:
        for step in default(recipe, given):
            if isinstance(step, Notice):
                notices.append(step)
                continue
            recipe = recipe.model_copy(update={step.key: step.value})
            if step.why:
                notices.append(Notice("set", (step.key,), step.why, step.value))
    return recipe, notices


def _without(recipe: Recipe, keys: Collection[str]) -> Recipe:
    """As if its author had not given them."""
    defaults = {key: Recipe.model_fields[key].default for key in keys}
    rest = recipe.model_copy(update=defaults)
    rest.model_fields_set.difference_update(keys)
    return rest


def accumulation_follows_batch_size(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """Axolotl: gradient_accumulation_steps = batch_size // micro_batch_size."""
    if recipe.micro_batch_size == "auto":
        return
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
    size = recipe.micro_batch_size
    if recipe.eval_batch_size is None and size != "auto":
        yield Set("eval_batch_size", size)
    elif recipe.validates and isinstance(size, int) and (recipe.eval_batch_size or 0) > size:
        why = f"validation takes more rows at once than training ({size}), and more memory"
        yield Notice("note", ("eval_batch_size",), why)


def validation_is_packed_as_training_is(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """Axolotl's default."""
    if recipe.eval_sample_packing is None:
        told = recipe.sample_packing and recipe.validates
        why = "training rows are packed (`sample_packing`)" if told else ""
        yield Set("eval_sample_packing", recipe.sample_packing, why)


def datasets_follow_the_recipe(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """Chat template and masking of each dataset, from the recipe's where it has none."""
    for key in ("datasets", "test_datasets"):
        entries = []
        for entry in getattr(recipe, key):
            update: dict[str, Any] = {}
            if not reads_conversations(recipe, entry):
                update |= {"chat_template": None, "chat_template_jinja": None}
            if not is_on_the_hub(entry.path):
                update |= {"name": None, "revision": None}
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


def keys_of_order_need_their_ground(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """What has no effect beside another key."""
    if recipe.shuffle_before_merging_datasets and recipe.shuffle_merged_datasets:
        why = "`shuffle_merged_datasets` mixes all examples"
        yield Notice("ignored", ("shuffle_before_merging_datasets",), why)
        yield Set("shuffle_before_merging_datasets", False)
    if recipe.group_by_length and (recipe.sample_packing or recipe.curriculum_sampling):
        other = "sample_packing" if recipe.sample_packing else "curriculum_sampling"
        why = "packed rows are of like length" if recipe.sample_packing else "the order is given"
        yield Notice("ignored", ("group_by_length",), f"with `{other}` {why}")
        yield Set("group_by_length", False)
    if recipe.sample_packing_sequentially and not recipe.sample_packing:
        yield Notice("ignored", ("sample_packing_sequentially",), "`sample_packing` is false")
        yield Set("sample_packing_sequentially", False)
    packs_freely = recipe.sample_packing and not recipe.sample_packing_sequentially
    if recipe.curriculum_sampling and recipe.shuffle_merged_datasets:
        why = "the prepared rows are mixed, once; to keep the sources' order set"
        yield Notice("note", ("curriculum_sampling",), f"{why} `shuffle_merged_datasets: false`")
    elif recipe.curriculum_sampling and packs_freely:
        why = "rows are in the order of their first examples; for that of all examples set"
        yield Notice("note", ("curriculum_sampling",), f"{why} `sample_packing_sequentially: true`")
    if recipe.dataset_shard_num and recipe.dataset_shard_idx is None:
        yield Set("dataset_shard_idx", 0)


def sequence_len_is_axolotls(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """512 tokens are few; nobody should find out from dropped examples."""
    if "sequence_len" not in given:
        yield Set("sequence_len", recipe.sequence_len, "it is Axolotl's default")


def steps_of_warmup_win(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """As in Axolotl; two that are above 0 are a fault."""
    if recipe.warmup_steps == 0 and recipe.warmup_ratio:
        why = "`warmup_steps: 0` comes first, as in Axolotl: there is no warm-up"
        yield Notice("ignored", ("warmup_ratio",), why)
        yield Set("warmup_ratio", None)
    elif recipe.warmup_steps is not None and recipe.warmup_ratio == 0:
        yield Set("warmup_ratio", None)


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
    own = recipe.lr_quadratic_warmup or recipe.cosine_constant_lr_ratio  # a curve of Regrow's
    if recipe.lr_scheduler == "cosine" and recipe.cosine_min_lr_ratio == 0 and not own:
        yield Set("cosine_min_lr_ratio", None)  # where a cosine ends anyway
    elif recipe.lr_scheduler == "cosine" and recipe.cosine_min_lr_ratio and not own:
        why = f"cosine_min_lr_ratio is {recipe.cosine_min_lr_ratio}"
        yield Set("lr_scheduler", "cosine_with_min_lr", why)
        kwargs = {"min_lr_rate": recipe.cosine_min_lr_ratio, **recipe.lr_scheduler_kwargs}
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
    if recipe.eval_strategy is not None:
        return
    if not recipe.validates or (recipe.evals_per_epoch == 0 and not asked):
        yield Set("eval_strategy", "no")
    else:
        yield Set("eval_strategy", "steps" if asked else "epoch")


def qlora_means_four_bits(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """`adapter: qlora` and `adapter: lora` with `load_in_4bit` are one thing."""
    said = recipe.load_in_4bit or recipe.load_in_8bit or "load_in_4bit" in given
    if recipe.adapter == "qlora" and not said:
        yield Set("load_in_4bit", True, "`adapter: qlora` trains on a base in 4 bits")
    elif recipe.adapter == "lora" and recipe.load_in_4bit:
        yield Set("adapter", "qlora", "`load_in_4bit: true` says so")


def magistral_is_written_by_mistral_common(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """Axolotl's choice, where nothing in the recipe asks for another way of writing."""
    key = "tokenizer_use_mistral_common"
    # The place of a local copy says nothing: it must not change what the recipe means.
    ids = [id for id in (recipe.base_model, recipe.tokenizer_config) if id and is_on_the_hub(id)]
    if key in given or "magistral" not in " ".join(ids).lower():
        return
    plain = all(_is_plain_conversation(e) for e in (*recipe.datasets, *recipe.test_datasets))
    others = ("chat_template", "chat_template_jinja", "special_tokens", "tokens", "train_on_inputs")
    if plain and given.isdisjoint((*others, "eot_tokens", "chat_template_kwargs")):
        yield Set(key, True, "Magistral's makers write its conversations with mistral-common")
    else:
        why = f"Axolotl would set {key}: true for Magistral; this recipe writes in a way of its own"
        yield Notice("note", (key,), why)


def _is_plain_conversation(entry: Dataset) -> bool:
    """Whether the entry leaves to the recipe how its messages are written and trained on."""
    of_its_own = (
        *("chat_template", "message_field_training", "message_field_training_detail"),
        *("train_on_inputs", "roles_to_train"),
    )
    defaults = Dataset.model_fields
    own = any(getattr(entry, key) not in (None, False, defaults[key].default) for key in of_its_own)
    return entry.type == "chat_template" and not own


def eight_bits_are_not_four(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """bitsandbytes' arguments for 4 bits do nothing in 8."""
    arguments = recipe.bnb_config_kwargs
    mine = [name for name in arguments if name.startswith("bnb_4bit_")]
    if mine and recipe.load_in_8bit and not recipe.load_in_4bit:
        names = tuple(f"bnb_config_kwargs.{name}" for name in mine)
        yield Notice("ignored", names, "`load_in_8bit: true` holds no 4 bits")
        rest = {name: value for name, value in arguments.items() if name not in mine}
        yield Set("bnb_config_kwargs", rest)


def loftq_is_an_initialisation(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """`peft: {loftq_config: ...}` is how Axolotl asks for it."""
    if recipe.uses_adapter and recipe.peft.loftq_config and recipe.peft_init_lora_weights is True:
        yield Set("peft_init_lora_weights", "loftq", "`peft.loftq_config` is given")


def a_run_id_is_a_name(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """Axolotl's default."""
    if "wandb" in recipe.reporters and recipe.wandb_run_id and not recipe.wandb_name:
        yield Set("wandb_name", recipe.wandb_run_id, "`wandb_run_id` is given and no name")


def stopping_early_keeps_the_best(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """The last model of a run that stopped is by definition not its best."""
    if recipe.early_stopping_patience and not recipe.load_best_model_at_end:
        yield Set("load_best_model_at_end", True, "`early_stopping_patience` is given")


def low_rank_optimizers_have_targets(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Set | Notice]:
    """Axolotl's choice."""
    if recipe.optimizer in LOW_RANK and not recipe.optim_target_modules:
        yield Set("optim_target_modules", ("attn", "mlp"), f"{recipe.optimizer} needs targets")


def several_machines_are_needed(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """A recipe with more processes than a machine has says so without naming machines."""
    local, context = recipe.num_processes, recipe.context_parallel_size
    shards = (recipe.dp_shard_size or 0) * recipe.dp_replicate_size * context
    needed = {
        "dp_shard_size": shards,
        "context_parallel_size": 0 if shards else context,
        "tensor_parallel_size": recipe.tensor_parallel_size,
    }
    for key, size in needed.items():
        if local and not recipe.ray_num_workers and size > local and size % local == 0:
            why = f"it asks for {size} processes, {size // local} machines with {local} each"
            yield Notice("note", (key,), f"{why}; one alone will refuse it")


def things_to_know(recipe: Recipe, given: frozenset[str]) -> Iterator[Set | Notice]:
    """What runs, but may surprise."""
    if recipe.untrained_method is not None:
        key = recipe.untrained_method.partition(":")[0]
        why = "its data can be prepared (`regrow preprocess`); training with it is not here yet"
        yield Notice("note", (key,), why)
    if recipe.trust_remote_code:
        why = "code that comes with the model will run on this machine"
        yield Notice("note", ("trust_remote_code",), why)
    if recipe.optimizer in PACKAGES:
        install, _ = PACKAGES[recipe.optimizer]
        why = f"{recipe.optimizer} needs {install}: pip install {install} where training runs"
        yield Notice("note", ("optimizer",), why)
    if recipe.load_in_4bit or recipe.load_in_8bit:
        bits = 4 if recipe.load_in_4bit else 8
        why = (
            f"training on {bits} bits needs bitsandbytes: pip install bitsandbytes where it runs; "
            "the adapter is merged into the unquantized base"
        )
        yield Notice("note", (f"load_in_{bits}bit",), why)
    if recipe.fp8 and not recipe.uses_adapter:
        why = "without torch.compile, which is not here yet, a small model may train slower in it"
        yield Notice("note", ("fp8",), why)
    if recipe.optimizer.startswith("schedule_free") and recipe.lr_scheduler != "constant":
        why = f"`optimizer: {recipe.optimizer}` is made for `lr_scheduler: constant`"
        yield Notice("note", ("lr_scheduler",), why)
    for name in recipe.reporters:
        install = PACKAGES_OF_REPORTERS[name]
        why = f"reports go there when {install} is installed where training runs, and to MLflow"
        yield Notice("note", (name,), why)
    if recipe.max_steps and (recipe.warmup_steps or 0) >= recipe.max_steps:
        why = f"training ends after {recipe.max_steps} steps, before the learning rate is full"
        yield Notice("note", ("warmup_steps",), why)


_DEFAULTS: tuple[Default, ...] = (
    magistral_is_written_by_mistral_common,
    accumulation_follows_batch_size,
    the_global_batch_is_the_same_everywhere,
    eval_batch_size_follows_micro_batch_size,
    validation_is_packed_as_training_is,
    datasets_follow_the_recipe,
    keys_of_order_need_their_ground,
    sequence_len_is_axolotls,
    steps_of_warmup_win,
    warmup_is_axolotls,
    a_lowest_rate_is_transformers_scheduler,
    saving_follows_its_keys,
    validating_follows_its_keys,
    qlora_means_four_bits,
    eight_bits_are_not_four,
    loftq_is_an_initialisation,
    a_run_id_is_a_name,
    stopping_early_keeps_the_best,
    low_rank_optimizers_have_targets,
    several_machines_are_needed,
    things_to_know,
)

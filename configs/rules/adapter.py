"""Rules about adapters, quantized base models and distribution."""

from __future__ import annotations

import re
from collections.abc import Iterator

from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule


@rule("adapter", "lora_r", "lora_alpha", "lora_target_modules", "lora_target_linear")
def lora_is_complete(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """An adapter has a rank, a scale and targets."""
    if not recipe.uses_adapter:
        return
    if recipe.lora_r is None:
        yield ("lora_r",), "`adapter` needs a rank", "Add `lora_r: 16`"
    if recipe.lora_alpha is None:
        yield ("lora_alpha",), "`adapter` needs a scale", "Add `lora_alpha: 32`"
    if not (recipe.lora_target_modules or recipe.lora_target_linear):
        why = "`adapter` needs layers to adapt"
        yield ("lora_target_linear",), why, "Add `lora_target_linear: true`"


@rule("lora_target_modules")
def target_patterns_are_valid(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Each target is a name or a valid regular expression."""
    for target in recipe.lora_target_modules:
        try:
            re.compile(target)
        except (re.error, RecursionError, OverflowError) as error:
            why = f"{target!r} is not a regular expression: {error}"
            yield ("lora_target_modules",), why, "Name layers, such as q_proj"


def _patterns(recipe: Recipe) -> list[str]:
    """Targets that hold a sign no layer's name holds."""
    signs = re.compile(r"[\\^$*+?()\[\]|{}]")
    return [target for target in recipe.lora_target_modules if signs.search(target)]


@rule("lora_target_modules")
def one_pattern_stands_alone(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """PEFT matches a list by the names' ends and a single text as a pattern: a pattern in a list of
    several would match nothing."""
    odd = _patterns(recipe)
    if odd and len(recipe.lora_target_modules) > 1:
        why = f"{odd[0]!r} is a pattern, and patterns do not work in a list of several"
        yield ("lora_target_modules",), why, "Join them into one: (a|b)"


@rule("lora_target_modules", "lora_target_linear")
def a_pattern_excludes_all_linear_layers(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """A pattern cannot be joined with lora_target_linear."""
    if recipe.lora_target_linear and _patterns(recipe):
        why = "`lora_target_linear: true` takes every linear layer already"
        yield ("lora_target_modules",), why, "Keep one of the two"


@rule("peft_init_lora_weights")
def adapters_leave_the_base_alone(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Initialisations that change the base weights, or need data, would make an adapter that does
    not fit the base model it names."""
    kind = recipe.peft_init_lora_weights
    if not isinstance(kind, bool) and kind not in ("gaussian", "orthogonal"):
        why = "it changes the base weights, needs data, or is unknown"
        yield ("peft_init_lora_weights",), why, "Use true, gaussian or orthogonal"


@rule("adapter", "load_in_4bit", "load_in_8bit")
def quantized_bases_are_not_here_yet(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """qlora, load_in_4bit and load_in_8bit need a quantized base model."""
    why = "a quantized base model is not here yet"
    if recipe.adapter == "qlora":
        yield ("adapter",), why, "Use `adapter: lora`, which needs more memory"
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(recipe, key):
            yield (key,), why, "Set it to false: the base model is then held in bf16"


@rule("adapter", "load_in_4bit", "load_in_8bit")
def quantized_weights_are_not_trained(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Quantized weights cannot be trained themselves, and not in two ways at once."""
    if not recipe.uses_adapter and (recipe.load_in_4bit or recipe.load_in_8bit):
        key = "load_in_4bit" if recipe.load_in_4bit else "load_in_8bit"
        yield (key,), "quantized weights cannot be trained without an adapter", "Add `adapter`"
    if recipe.load_in_4bit and recipe.load_in_8bit:
        yield ("load_in_8bit",), "`load_in_4bit` says otherwise", "Use one of the two"


@rule("lora_model_dir")
def adapters_start_anew(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Going on from an adapter is not here yet."""
    if recipe.lora_model_dir:
        why = "going on from an adapter is not here yet"
        yield ("lora_model_dir",), why, "Merge it first and use the result as `base_model`"


@rule("deepspeed", "fsdp", "fsdp_config", "fsdp_version")
def sharding_is_not_here_yet(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """DeepSpeed and FSDP are refused rather than ignored: without them the model may not fit."""
    for key, name in (("deepspeed", "DeepSpeed"), ("fsdp", "FSDP"), ("fsdp_config", "FSDP")):
        if getattr(recipe, key):
            why = f"{name} is not here yet"
            yield (key,), why, "Remove it: each device then holds the whole model"


@rule("deepspeed", "fsdp", "fsdp_config")
def one_way_of_sharding(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """DeepSpeed and FSDP exclude each other."""
    if recipe.deepspeed and (recipe.fsdp or recipe.fsdp_config):
        yield ("deepspeed",), "FSDP is asked for as well", "Use one of the two"


RULES = (
    lora_is_complete,
    target_patterns_are_valid,
    one_pattern_stands_alone,
    a_pattern_excludes_all_linear_layers,
    adapters_leave_the_base_alone,
    quantized_bases_are_not_here_yet,
    quantized_weights_are_not_trained,
    adapters_start_anew,
    sharding_is_not_here_yet,
    one_way_of_sharding,
)

"""Rules about adapters, quantized base models and distribution."""

from __future__ import annotations

import re
from collections.abc import Iterator

from regrow.configs.recipe import Recipe
from regrow.configs.rules.patterns import is_pattern
from regrow.configs.rules.rule import Breach, rule


@rule(
    "adapter",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_target_linear",
    "lora_target_parameters",
    "lora_model_dir",
)
def lora_is_complete(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """An adapter has a rank, a scale and targets; one that is gone on with has them already."""
    if not recipe.uses_adapter or recipe.lora_model_dir:
        return
    if recipe.lora_r is None:
        yield ("lora_r",), "`adapter` needs a rank", "Add `lora_r: 16`"
    if recipe.lora_alpha is None:
        yield ("lora_alpha",), "`adapter` needs a scale", "Add `lora_alpha: 32`"
    targets = recipe.lora_target_modules or recipe.lora_target_parameters
    if not (targets or recipe.lora_target_linear):
        why = "`adapter` needs layers to adapt"
        yield ("lora_target_linear",), why, "Add `lora_target_linear: true`"


@rule("lora_target_modules", "lora_exclude_modules", "lora_modules_to_save")
def names_are_in_a_list(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """`q_proj, v_proj` is one text to YAML, and no layer has that name."""
    for key in ("lora_target_modules", "lora_exclude_modules", "lora_modules_to_save"):
        for text in getattr(recipe, key):
            if re.search(r"[,\s]", text) and not is_pattern(text):
                names = ", ".join(text.replace(",", " ").split())
                remedy = f"Write a list: [{names}]" if len(names) <= 60 else _ONE_EACH
                yield (key,), f"{text!r:.60} is one name to YAML", remedy


_ONE_EACH = "Write a list, one name an entry"


FIRST_VALUES = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
"""Names of `peft_init_lora_weights`, beside true, false and pissa_niter_N."""


@rule("peft_init_lora_weights")
def first_values_are_known(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """CorDA, LoRA-GA, MiCA and the like need preparations of their own that are not here."""
    kind = recipe.peft_init_lora_weights
    if (
        isinstance(kind, bool)
        or kind in FIRST_VALUES
        or re.fullmatch(r"pissa_niter_[1-9]\d*", kind)
    ):
        return
    remedy = f"Use true, {', '.join(FIRST_VALUES)} or pissa_niter_16"
    yield ("peft_init_lora_weights",), "not here", remedy


@rule(
    "peft_init_lora_weights",
    "load_in_4bit",
    "load_in_8bit",
    "adapter",
    "peft_use_dora",
    "lora_model_dir",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "peft_use_rslora",
    "lora_modules_to_save",
    "peft_trainable_token_indices",
)
def first_values_fit_the_base(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Values taken from the base change it; the adapter is made to fit the original afterwards."""
    kind, key = str(recipe.peft_init_lora_weights), ("peft_init_lora_weights",)
    key = key if key[0] in given else ("peft", "loftq_config")
    if not recipe.uses_adapter or not kind.startswith(("pissa", "olora", "loftq")):
        if recipe.lora_model_dir and kind != "True":
            yield key, "`lora_model_dir` gives the first values", "Remove it"
        return
    if recipe.load_in_8bit or recipe.load_in_4bit:
        yield key, "it needs a base that is not quantized", "Use `adapter: lora` on `bf16`"
    if recipe.peft_use_dora:
        yield key, "DoRA's magnitudes could not be made to fit the original base", "Use one of both"
    if recipe.peft_use_rslora and (recipe.lora_rank_pattern or recipe.lora_alpha_pattern):
        why = "with peft_use_rslora and patterns PEFT cannot make the adapter fit the original base"
        yield key, why, "Remove the patterns"
    if recipe.lora_modules_to_save or recipe.peft_trainable_token_indices:
        yield key, "what is trained in full beside it would be lost", "Use true"
    if recipe.lora_model_dir:
        yield key, "`lora_model_dir` gives the first values", "Use one of the two"


@rule("adapter", "load_in_8bit", "load_in_4bit")
def qlora_is_four_bits(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """QLoRA's base has 4 bits."""
    if recipe.adapter == "qlora" and not (recipe.load_in_4bit or recipe.load_in_8bit):
        yield ("load_in_4bit",), "`adapter: qlora` means 4 bits", "Use true, or `adapter: lora`"
    if recipe.adapter == "qlora" and recipe.load_in_8bit and not recipe.load_in_4bit:
        yield ("load_in_8bit",), "`adapter: qlora` means 4 bits", "Use `adapter: lora`"


@rule("bnb_config_kwargs", "load_in_4bit", "load_in_8bit")
def quantization_has_its_arguments(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """What Transformers' BitsAndBytesConfig takes."""
    for name, value in recipe.bnb_config_kwargs.items():
        known = _BNB_VALUES.get(name, (value,))
        if not name.startswith(("bnb_4bit_", "llm_int8_")):
            yield ("bnb_config_kwargs", name), "no such argument", "It starts with bnb_4bit_"
        elif not any(value is other or value == other for other in known):
            names = ", ".join(str(other).lower() for other in known)
            yield ("bnb_config_kwargs", name), f"expected one of {names}", f"Use {known[0]}"


_BNB_VALUES: dict[str, tuple[object, ...]] = {
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_compute_dtype": ("bfloat16", "float16", "float32"),
    "bnb_4bit_quant_storage": ("uint8", "int8", "bfloat16", "float16", "float32", "float64"),
}
"""Transformers 5.23's `BitsAndBytesConfig`."""


@rule("model_quantization_config", "model_quantization_config_kwargs", "load_in_4bit")
def stored_quantized_means_dequantized(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Only dequantized weights can be trained on a CPU and merged into."""
    if not recipe.model_quantization_config:
        return
    key = ("model_quantization_config",)
    if recipe.model_quantization_config_kwargs.get("dequantize") is not True:
        why = "such weights are trained and merged dequantized"
        yield key, why, "Add `model_quantization_config_kwargs: {dequantize: true}`"
    if recipe.load_in_4bit or recipe.load_in_8bit:
        yield key, "the base would be quantized in two ways", "Use one of the two"


@rule("model_quantization_config", "fsdp_config")
def dequantized_weights_are_loaded_by_all(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Breach]:
    """Weights become plain while they are read, and only one process would read them."""
    config = recipe.fsdp_config
    if recipe.model_quantization_config and config and config.cpu_ram_efficient_loading:
        why = "`model_quantization_config` makes weights plain while each process reads them"
        yield ("fsdp_config", "cpu_ram_efficient_loading"), why, "Use false"


@rule("lora_target_parameters", "lora_dropout", "peft_use_dora")
def parameters_have_plain_adapters(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """PEFT adapts bare parameters without dropout and without DoRA."""
    if recipe.lora_target_parameters and recipe.lora_dropout:
        yield ("lora_dropout",), "`lora_target_parameters` work without dropout", "Use 0"
    if recipe.lora_target_parameters and recipe.peft_use_dora:
        yield ("peft_use_dora",), "`lora_target_parameters` work without DoRA", "Use false"


@rule("unfrozen_parameters", "adapter")
def an_adapter_has_its_own_choice(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Beside an adapter, lora_modules_to_save says what is trained in full."""
    if recipe.uses_adapter and recipe.unfrozen_parameters:
        why = "with `adapter` the base is frozen"
        yield ("unfrozen_parameters",), why, "Use `lora_modules_to_save`"


@rule("unfrozen_parameters", "gradient_checkpointing", "gradient_checkpointing_kwargs")
def frozen_beginnings_keep_gradients(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """torch's older checkpointing finds no gradient behind inputs that need none, such as those of
    frozen embeddings."""
    kwargs = recipe.gradient_checkpointing_kwargs
    if recipe.unfrozen_parameters and recipe.gradient_checkpointing and kwargs.use_reentrant:
        why = "with `unfrozen_parameters` it would lose gradients behind frozen layers"
        yield ("gradient_checkpointing_kwargs", "use_reentrant"), why, "Use false"


@rule("adapter", "load_in_4bit", "load_in_8bit")
def quantized_weights_are_not_trained(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Quantized weights cannot be trained themselves, and not in two ways at once."""
    if not recipe.uses_adapter and (recipe.load_in_4bit or recipe.load_in_8bit):
        key = "load_in_4bit" if recipe.load_in_4bit else "load_in_8bit"
        yield (key,), "quantized weights cannot be trained without an adapter", "Add `adapter`"
    if recipe.load_in_4bit and recipe.load_in_8bit:
        yield ("load_in_8bit",), "`load_in_4bit` says otherwise", "Use one of the two"


@rule("quantize_moe_experts", "load_in_4bit", "load_in_8bit", "deepspeed")
def experts_are_quantized_with_the_rest(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """It says how far the quantization of the base goes."""
    if not recipe.quantize_moe_experts:
        return
    if not (recipe.load_in_4bit or recipe.load_in_8bit):
        why = "the base is not quantized"
        yield ("quantize_moe_experts",), why, "Add `load_in_4bit: true` or `load_in_8bit: true`"
    if recipe.deepspeed:
        why = "DeepSpeed cannot lay out quantized experts"
        yield ("quantize_moe_experts",), why, "Use `fsdp_config` for `deepspeed`"


RULES = (
    experts_are_quantized_with_the_rest,
    lora_is_complete,
    names_are_in_a_list,
    first_values_are_known,
    first_values_fit_the_base,
    qlora_is_four_bits,
    quantization_has_its_arguments,
    stored_quantized_means_dequantized,
    dequantized_weights_are_loaded_by_all,
    parameters_have_plain_adapters,
    an_adapter_has_its_own_choice,
    frozen_beginnings_keep_gradients,
    quantized_weights_are_not_trained,
)

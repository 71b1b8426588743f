"""Rules about what the model is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule
from regrow.configs.sections.model import SpecialTokens
from regrow.configs.zero import zero_stage


@rule("model_type")
def only_causal_language_models(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Classifiers and image models are other tasks."""
    name = recipe.model_type
    if name and not re.fullmatch(r"AutoModel(ForCausalLM)?|\w+(ForCausalLM|LMHeadModel)", name):
        if re.search("[A-Z].*(For|With)[A-Z]|^AutoModel", name):
            why = "only causal language models are fine-tuned"
            yield ("model_type",), why, "Use a model whose class is *ForCausalLM"
        else:
            remedy = "Remove it: the model's own files name its class"
            yield ("model_type",), "not a class of Transformers for language models", remedy


@rule("tokenizer_type")
def tokenizer_classes_are_tokenizers(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """tokenizer_type names a tokenizer."""
    name = recipe.tokenizer_type
    if name and not re.fullmatch(r"\w+Tokenizer(Fast)?", name):
        yield ("tokenizer_type",), "not a tokenizer's class", "Use AutoTokenizer"


@rule("base_model", "base_model_config")
def the_model_has_its_own_config(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Weights are read with the configuration they were saved with."""
    if recipe.base_model_config not in (None, recipe.base_model):
        why = "reading a model with another one's configuration is not here yet"
        yield ("base_model_config",), why, "Remove it"


@rule("output_router_logits", "gradient_checkpointing", "gradient_checkpointing_kwargs")
def routers_have_gradients(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """torch's older checkpointing computes routers without a graph at first, when the loss is
    taken of them."""
    kwargs = recipe.gradient_checkpointing_kwargs
    if recipe.output_router_logits and recipe.gradient_checkpointing and kwargs.use_reentrant:
        why = "with `output_router_logits` experts would not be balanced"
        yield ("gradient_checkpointing_kwargs", "use_reentrant"), why, "Use false"


@rule("output_router_logits", "context_parallel_size")
def experts_are_balanced_over_whole_rows(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """The loss of a row is no sum over its tokens, of which each process would see a part."""
    if recipe.output_router_logits and recipe.context_parallel_size > 1:
        why = "processes that share a row cannot tell how evenly it uses the experts"
        yield ("output_router_logits",), why, "Use one of the two"


@rule("reinit_weights", "adapter")
def random_weights_are_trained_themselves(
    recipe: Recipe, given: frozenset[str]
) -> Iterator[Breach]:
    """An adapter belongs to a base that is stored somewhere."""
    if recipe.reinit_weights and recipe.uses_adapter:
        why = "an adapter beside random weights would fit no model that is stored"
        yield ("reinit_weights",), why, "Remove it, or `adapter`"


@rule(
    "tokenizer_use_mistral_common",
    "chat_template",
    "chat_template_jinja",
    "special_tokens",
    "tokens",
    "datasets",
    "test_datasets",
    "train_on_inputs",
)
def mistral_common_writes_all_itself(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """It knows one way of writing conversations, and a vocabulary that does not change."""
    if not recipe.tokenizer_use_mistral_common:
        return
    why = "`tokenizer_use_mistral_common: true` decides it"
    if recipe.chat_template not in (None, "tokenizer_default") or recipe.chat_template_jinja:
        key = "chat_template" if "chat_template" in given else "chat_template_jinja"
        yield (key,), why, "Use one of the two"
    if recipe.tokens:
        yield ("tokens",), why, "Use one of the two"
    if recipe.special_tokens != SpecialTokens():
        yield ("special_tokens",), why, "Use one of the two"
    if recipe.train_on_inputs:
        why = "`tokenizer_use_mistral_common: true` trains answers alone"
        yield ("train_on_inputs",), why, "Use false"
    yield from _of_entries(recipe)


def _of_entries(recipe: Recipe) -> Iterator[Breach]:
    """What mistral-common decides for each dataset. (Filling in has given entries without a
    template the recipe's, which is spoken of already.)"""
    for name in ("datasets", "test_datasets"):
        for number, entry in enumerate(getattr(recipe, name)):
            if entry.type != "chat_template":
                why = "`tokenizer_use_mistral_common: true` is for conversations"
                yield (name, number, "type"), why, "Use chat_template"
            elif entry.chat_template not in (None, "tokenizer_default", recipe.chat_template):
                why = "`tokenizer_use_mistral_common: true` decides it"
                yield (name, number, "chat_template"), why, "Use one of the two"


@rule("fp8", "adapter", "load_in_4bit", "load_in_8bit")
def float8_bases_have_16_bits(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Fewer bits are made whole for each product, not rounded to 8-bit floats."""
    if recipe.fp8 and (recipe.load_in_4bit or recipe.load_in_8bit):
        yield ("fp8",), "a base in 4 or 8 bits multiplies in `bf16`", "Remove it, or use lora"


@rule("fp8", "fsdp_config", "deepspeed", "tensor_parallel_size")
def float8_bases_are_whole(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Their 8 bits are made once, by the process that holds all of a weight."""
    if not (recipe.fp8 and recipe.uses_adapter):
        return
    for key, divides in (
        ("fsdp_config", recipe.fsdp_config is not None),
        ("deepspeed", zero_stage(recipe.deepspeed) == 3),
        ("tensor_parallel_size", recipe.tensor_parallel_size > 1),
    ):
        if divides:
            why = f"with an adapter each process holds all of the weights, which `{key}` divides"
            yield ("fp8",), why, f"Remove it, or `{key}`"


@rule("fp8", "adapter", "bf16")
def float8_bases_give_16_bits(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Products with a scale for each row are given out in bfloat16 by every GPU, in float32 by
    Hopper alone (pytorch/ao#2431)."""
    if recipe.fp8 and recipe.uses_adapter and not recipe.bf16:
        why = "with an adapter the products in 8 bits give bfloat16"
        yield ("fp8",), why, "Remove it, or `bf16: false`"


RULES = (
    float8_bases_have_16_bits,
    float8_bases_are_whole,
    float8_bases_give_16_bits,
    mistral_common_writes_all_itself,
    random_weights_are_trained_themselves,
    routers_have_gradients,
    experts_are_balanced_over_whole_rows,
    the_model_has_its_own_config,
    only_causal_language_models,
    tokenizer_classes_are_tokenizers,
)

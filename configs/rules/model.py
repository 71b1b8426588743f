"""Rules about number formats and what the model is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule


@rule("fp16")
def float16_is_refused(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """float16 needs loss scaling; every GPU since Ampere, and every CPU, has bfloat16."""
    if recipe.fp16:
        yield ("fp16",), "training in float16 is not here", "Use `bf16: true`"


@rule("model_type")
def only_causal_language_models(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Classifiers and image models are other tasks."""
    name = recipe.model_type
    if name and not re.fullmatch(r"AutoModel(ForCausalLM)?|\w+(ForCausalLM|LMHeadModel)", name):
        why = "only causal language models are fine-tuned"
        yield ("model_type",), why, "Use a model whose class is *ForCausalLM"


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


RULES = (
    the_model_has_its_own_config,
    float16_is_refused,
    only_causal_language_models,
    tokenizer_classes_are_tokenizers,
)

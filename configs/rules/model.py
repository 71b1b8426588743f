"""Rules about what the model is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule


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
    only_causal_language_models,
    tokenizer_classes_are_tokenizers,
)

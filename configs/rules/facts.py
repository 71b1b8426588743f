"""Rules between the recipe and what is known of its model and tokenizer.

Each runs as soon as its fact is known: for a model in a local directory or in the hub's cache, when
the recipe is read. What is not known yet is checked by the stage that needs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from regrow.configs.architectures import ARCHITECTURES, OF_EXPERTS, Layers
from regrow.configs.facts import SEPARABLE_LAYERS, Facts, ModelFacts, TokenizerFacts
from regrow.configs.faults import Notice
from regrow.configs.recipe import Recipe
from regrow.configs.rules.patterns import is_pattern
from regrow.configs.rules.rule import Breach
from regrow.configs.sections.data import Dataset

Found = Breach | Notice
"""A fault, or something its author should know."""


@dataclass(frozen=True)
class FactRule:
    """One condition between a recipe and the facts."""

    check: Callable[[Recipe, Facts], Iterator[Found]]
    reads: frozenset[str]

    @property
    def name(self) -> str:
        """The function's name."""
        return self.check.__name__


def of_model(*reads: str) -> Callable[[Callable[[Recipe, ModelFacts], Iterator[Found]]], FactRule]:
    """Make a function a rule that needs the model's config.json."""

    def make(check: Callable[[Recipe, ModelFacts], Iterator[Found]]) -> FactRule:
        def check_facts(recipe: Recipe, facts: Facts) -> Iterator[Found]:
            if facts.model is not None:
                yield from check(recipe, facts.model)

        check_facts.__name__, check_facts.__doc__ = check.__name__, check.__doc__
        return FactRule(check_facts, frozenset(reads))

    return make


def of_tokenizer(
    *reads: str,
) -> Callable[[Callable[[Recipe, TokenizerFacts, Facts], Iterator[Found]]], FactRule]:
    """Make a function a rule that needs the tokenizer's files."""

    def make(check: Callable[[Recipe, TokenizerFacts, Facts], Iterator[Found]]) -> FactRule:
        def check_facts(recipe: Recipe, facts: Facts) -> Iterator[Found]:
            if facts.tokenizer is not None:
                yield from check(recipe, facts.tokenizer, facts)

        check_facts.__name__, check_facts.__doc__ = check.__name__, check.__doc__
        return FactRule(check_facts, frozenset(reads))

    return make


@of_model("base_model")
def the_model_is_described(recipe: Recipe, model: ModelFacts) -> Iterator[Found]:
    """config.json is a map, and its sizes are sizes."""
    for entry in model.odd:
        remedy = "Mend the file, or download the model again"
        yield ("base_model",), f"its config.json says {entry}", remedy


@of_tokenizer("tokenizer_config", "base_model")
def the_tokenizer_is_described(
    recipe: Recipe, tokenizer: TokenizerFacts, facts: Facts
) -> Iterator[Found]:
    """tokenizer_config.json is a map, where it is there."""
    if tokenizer.broken:
        key = "tokenizer_config" if recipe.tokenizer_config else "base_model"
        remedy = "Mend the file, or download the tokenizer again"
        yield (key,), "its tokenizer_config.json is no JSON map", remedy


_DEQUANTIZED = ("fp8", "mxfp4", "gptq")


@of_model("base_model")
def stored_weights_can_be_merged_into(recipe: Recipe, model: ModelFacts) -> Iterator[Found]:
    """An adapter is merged into plain weights; those in FP8, MXFP4 or GPTQ are made plain."""
    if model.stored and model.stored not in _DEQUANTIZED:
        why = f"its weights are stored quantized ({model.stored}), where nothing can be merged in"
        yield ("base_model",), why, "Use the unquantized model, with `adapter: qlora`"


@of_model("model_quantization_config")
def plain_weights_need_no_dequantizing(recipe: Recipe, model: ModelFacts) -> Iterator[Found]:
    """model_quantization_config is about weights that are stored quantized."""
    if recipe.model_quantization_config and not model.stored:
        why = "the model's weights are stored plain"
        yield Notice("ignored", ("model_quantization_config",), why)


@of_model("base_model", "context_parallel_size", "output_router_logits")
def layers_keep_examples_apart(recipe: Recipe, model: ModelFacts) -> Iterator[Found]:
    """Layers that carry one packed example into the next compute them side by side, padded."""
    others = ", ".join(sorted(model.mixers - SEPARABLE_LAYERS))
    why = f"the model's layers ({others}) compute examples side by side, which does not go with it"
    if others and recipe.context_parallel_size > 1:
        yield ("context_parallel_size",), why, "Use `fsdp_config` to save memory"
    if others and recipe.output_router_logits:
        yield ("output_router_logits",), why, "Remove it"


@of_model("base_model", "quantize_moe_experts", "output_router_logits")
def experts_are_there(recipe: Recipe, model: ModelFacts) -> Iterator[Found]:
    """What is said of experts needs a mixture of them, where the architecture is known."""
    known = ARCHITECTURES.get(model.kind or "")
    if known is None or known.has_experts:
        return
    why = f"a model of the kind {model.kind} has no experts"
    if recipe.output_router_logits:
        yield Notice("note", ("output_router_logits",), f"{why}; training will refuse it")
    if recipe.quantize_moe_experts:
        yield Notice("ignored", ("quantize_moe_experts",), why)


@of_model("peft_layers_to_transform")
def layers_are_there(recipe: Recipe, model: ModelFacts) -> Iterator[Found]:
    """Layers that get an adapter are layers of the model."""
    wanted = recipe.peft_layers_to_transform
    numbers = (wanted,) if isinstance(wanted, int) else wanted or ()
    if model.layers is not None and any(number >= model.layers for number in numbers):
        why = f"the model has {model.layers} layers, counted from 0"
        yield ("peft_layers_to_transform",), why, f"Use 0 to {model.layers - 1}"


@of_model(
    *("adapter", "lora_target_modules", "lora_target_linear", "lora_target_parameters"),
    *("lora_exclude_modules", "lora_model_dir", "base_model"),
)
def targets_are_layers(recipe: Recipe, model: ModelFacts) -> Iterator[Found]:
    """Names that an adapter is put on are names of the model's layers, where these are known."""
    known = ARCHITECTURES.get(model.kind or "")
    if known is None or not recipe.uses_adapter or recipe.lora_model_dir:
        return
    modules = known.modules(min(model.layers or 1, _ENOUGH_LAYERS))
    targets = recipe.lora_target_modules
    lost = [name for name in targets if not _names_a_layer(name, modules, known, len(targets) == 1)]
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known.names))
    why = f"a model of the kind {model.kind} has no layer {', '.join(lost)}"
    others = recipe.lora_target_linear or recipe.lora_target_parameters
    if lost and len(lost) == len(targets) and not others:
        yield ("lora_target_modules",), why, f"Its layers are {names}"
    elif lost:
        yield Notice("note", ("lora_target_modules",), f"{why}; its layers are {names}")
    excluded = recipe.lora_exclude_modules
    for name in excluded:
        if not _names_a_layer(name, modules, known, len(excluded) == 1):
            why = f"a model of the kind {model.kind} has no layer {name}"
            yield Notice("note", ("lora_exclude_modules",), f"{why}; its layers are {names}")


_ENOUGH_LAYERS = 200
"""Layers whose names are looked at: more than published models have."""


def _names_a_layer(name: str, modules: list[str], known: Layers, alone: bool) -> bool:
    """As PEFT matches: a list by the ends of names, one text that is no name as a pattern."""
    if name == "all-linear":
        return True
    if alone and is_pattern(name):
        # Where not all names are known, a pattern may be about the others.
        return known.has_experts or any(re.fullmatch(name, module) for module in modules)
    if known.has_experts and not OF_EXPERTS.isdisjoint(name.split(".")):
        return True
    return any(f".{module}".endswith(f".{name}") for module in modules)


@of_model("sequence_len")
def rows_are_as_long_as_positions(recipe: Recipe, model: ModelFacts) -> Iterator[Found]:
    """A model reads longer texts than it was made for less well."""
    if model.positions is not None and recipe.sequence_len > model.positions:
        why = f"the model was made for at most {model.positions} tokens"
        yield Notice("note", ("sequence_len",), why)


@of_tokenizer("datasets", "chat_template", "tokenizer_use_mistral_common")
def conversations_have_a_template(
    recipe: Recipe, tokenizer: TokenizerFacts, facts: Facts
) -> Iterator[Found]:
    """Conversations are rendered with a template, the recipe's or the tokenizer's."""
    if tokenizer.has_template is not False or recipe.data_kind != "sft":
        return
    if recipe.tokenizer_use_mistral_common:
        return  # it needs none
    given = [recipe.chat_template, *(entry.chat_template for entry in recipe.datasets)]
    if any("fallback" in (name or "") for name in given):
        return
    for i, entry in enumerate(recipe.datasets):
        if entry.type == "chat_template" and entry.chat_template in (None, "tokenizer_default"):
            why = "the tokenizer has no chat template of its own"
            yield ("datasets", i, "type"), why, "Set `chat_template`, to chatml for example"


@of_tokenizer("eot_tokens", "tokens", "special_tokens")
def ends_of_turns_are_tokens(
    recipe: Recipe, tokenizer: TokenizerFacts, facts: Facts
) -> Iterator[Found]:
    """What ends a turn is one token. (Of others than `<...>` the text alone does not tell.)"""
    known = {*(tokenizer.tokens or ()), *recipe.tokens, *special_texts(recipe)}
    for i, token in enumerate(recipe.eot_tokens if tokenizer.tokens is not None else ()):
        if re.fullmatch(r"<[!-~]+>", token) and token not in known:
            yield ("eot_tokens", i), f"the tokenizer has no token {token}", "Add it to `tokens`"


def ends_have_one_rule(recipe: Recipe, facts: Facts) -> Iterator[Found]:
    """A token that ends both a turn and a text is trained or not, by one rule."""
    eos = recipe.special_tokens.eos_token or (facts.tokenizer.eos if facts.tokenizer else None)
    for i, entry in enumerate(recipe.datasets if eos in recipe.eot_tokens else ()):
        if entry.type == "chat_template" and entry.train_on_eot != entry.train_on_eos:
            why = f"{eos} is one of `eot_tokens` and the eos token, for which "
            why += f"`train_on_eos: {entry.train_on_eos}` says otherwise"
            yield ("datasets", i, "train_on_eot"), why, "Set both alike"


@of_tokenizer("datasets", "eot_tokens", "special_tokens", "chat_template", "chat_template_jinja")
def ends_of_turns_are_printed(
    recipe: Recipe, tokenizer: TokenizerFacts, facts: Facts
) -> Iterator[Found]:
    """What ends a turn is in the template, of which the tokenizer's own and Jinja text is known."""
    eos = recipe.special_tokens.eos_token or tokenizer.eos
    chats = [entry for entry in recipe.datasets if entry.type == "chat_template"]
    texts = [_template_text(entry, tokenizer) for entry in chats]
    if not texts or None in texts:
        return
    for token in recipe.eot_tokens:
        printed = (token, "eos_token") if token == eos else (token,)
        if not any(name in (text or "") for text in texts for name in printed):
            why = f"the chat template does not print {token}, so that it ends no turn"
            yield Notice("note", ("eot_tokens",), why)


def _template_text(entry: Dataset, tokenizer: TokenizerFacts) -> str | None:
    """None where it is not known: that of a file, or one that comes with Regrow."""
    if entry.chat_template == "jinja":
        text = entry.chat_template_jinja or ""
        return text if "{{" in text or "{%" in text else None
    return tokenizer.template if entry.chat_template == "tokenizer_default" else None


@of_tokenizer(
    *("adapter", "tokens", "special_tokens", "lora_modules_to_save"),
    "peft_trainable_token_indices",
)
def new_tokens_can_be_learnt(
    recipe: Recipe, tokenizer: TokenizerFacts, facts: Facts
) -> Iterator[Found]:
    """An adapter leaves the embeddings of tokens that the model does not know as they are."""
    trained = recipe.lora_modules_to_save or recipe.peft_trainable_token_indices
    rows = facts.model.vocabulary if facts.model else None
    if tokenizer.tokens is None or rows is None or not recipe.uses_adapter or trained:
        return
    if recipe.lora_model_dir:  # it may train them itself
        return
    new = {*recipe.tokens, *special_texts(recipe)} - tokenizer.tokens
    if new and len(tokenizer.tokens) + len(new) > rows:
        key = "tokens" if new & set(recipe.tokens) else "special_tokens"
        why = f"the model does not know {', '.join(sorted(new))}, and an adapter cannot learn it"
        yield (key,), why, "Add `lora_modules_to_save: [embed_tokens, lm_head]`"


def special_texts(recipe: Recipe) -> set[str]:
    """Texts of the special tokens that the recipe names."""
    special = recipe.special_tokens
    named = (special.bos_token, special.eos_token, special.pad_token, special.unk_token)
    return {text for text in (*named, *special.additional_special_tokens) if text}


FACT_RULES: tuple[FactRule, ...] = (
    the_model_is_described,
    the_tokenizer_is_described,
    stored_weights_can_be_merged_into,
    plain_weights_need_no_dequantizing,
    layers_keep_examples_apart,
    experts_are_there,
    layers_are_there,
    targets_are_layers,
    rows_are_as_long_as_positions,
    conversations_have_a_template,
    ends_of_turns_are_tokens,
    FactRule(ends_have_one_rule, frozenset(("datasets", "eot_tokens", "special_tokens"))),
    ends_of_turns_are_printed,
    new_tokens_can_be_learnt,
)

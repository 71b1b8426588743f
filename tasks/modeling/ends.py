"""Which tokens end an answer, and the model's configuration told so.

A model generates until a token that its own configuration names. A recipe can give a base model
another eos token, or a chat template that ends turns in yet another one: a model published without
being told would never stop.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the model's end, and the template's.

    The template's is the first special token that it writes after an assistant's words; many
    models end a turn with a token that is not their end-of-text token.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    several = configured if isinstance(configured, list) else [configured]
    found = [tokenizer.eos_token_id, _end_of_turn(tokenizer), *several]
    return sorted({token for token in found if isinstance(token, int)})


def align_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model's configuration name the tokenizer's special tokens and all `stop_ids`."""
    config, generation = model.config, model.generation_config
    stops: Any = stop_ids(tokenizer, model)
    names: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    given = {name: token for name, token in names.items() if token is not None}
    config.update(given)
    if generation is not None:
        generation.update(**given | {"eos_token_id": stops[0] if len(stops) == 1 else stops})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    if not tokenizer.chat_template:
        return None
    words = "The answer."
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    try:
        shown = tokenizer.apply_chat_template(chat, tokenize=False)
    except TemplateError:
        return None  # a template for other kinds of turns: the two other ends remain
    assert isinstance(shown, str)
    after = tokenizer(shown.rpartition(words)[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in after if token in special), None)

"""The values of `datasets[].type`: names of formats, and prompts written in the recipe."""

from __future__ import annotations

from collections.abc import Collection
from string import Formatter

from regrow.configs.sections.answer_types import ANSWER_TYPES
from regrow.configs.sections.section import Section

PROMPT_STYLES = ("instruct", "chat", "chatml", "phi")
"""Styles of the alpaca family: `alpaca:chatml`."""

_STYLED = (
    "alpaca",
    "gpteacher",
    "oasst",
    "jeopardy",
    "explainchoice",
    "concisechoice",
    "summarizetldr",
)

SUPERVISED_TYPES = (
    "chat_template",
    "completion",
    "input_output",
    "pretokenized",
    *_STYLED,
    *(f"{name}:{style}" for name in _STYLED for style in PROMPT_STYLES),
    "reflection",
    "reflection:instruct",
    "reflection:chat",
    "alpaca_instruct",
    "alpaca_instruct.load_no_prompt",
    "alpaca_chat",
    "alpaca_chat.load_qa",
    "alpaca_chat.load_concise",
    "alpaca_chat.load_camel_ai",
    "alpaca_chat.load_no_prompt",
    "alpaca_w_system",
    "alpaca_w_system.load_instruct",
    "alpaca_w_system.load_chat",
    "alpaca_w_system.load_open_orca",
    "alpaca_w_system.load_open_orca_chatml",
    "orcamini",
    "metharme",
    "context_qa",
    "context_qa.load_v2",
    "context_qa.load_404",
    "creative_acr.load_answer",
    "creative_acr.load_critique",
    "creative_acr.load_revise",
    "pygmalion",
    "llama2_chat",
)
"""Formats whose rows are examples to imitate, by Axolotl's names."""

DATASET_TYPES = SUPERVISED_TYPES
"""All names; a test holds them to the formats that `prepare` has."""

_NO_ROWS = "Give rows with the columns input_ids and labels, and `type: pretokenized`"
_CHAT = "Use `type: chat_template`"

REFUSED_TYPES: dict[str, tuple[str, str]] = {
    "_synthetic": ("it makes tokens up, and Regrow trains on data only", _NO_ROWS),
    "messages": ("it renders messages in a way of its own, which only Axolotl has", _CHAT),
    "messages.chat": ("it renders messages in a way of its own, which only Axolotl has", _CHAT),
    "sharegpt.load_glaive": (
        "Axolotl removed it, and it read dialogues out of one text",
        "Make a list of messages of them, and use `type: chat_template`",
    ),
    "user_defined": (
        "the prompts themselves are missing",
        "Write a map under `type`: `format`, `field_instruction` and so on",
    ),
}
"""Axolotl's other names -> why they are refused, and what to do."""

PROMPT_PARTS = {
    "format": ("instruction", "input"),
    "no_input_format": ("instruction",),
    "system_format": ("system",),
}
"""Key of `PromptType` -> what its text may hold in braces."""


_INSTRUCTIONS = """
    alpaca gpteacher oasst jeopardy summarizetldr alpaca_instruct alpaca_chat alpaca_w_system
    orcamini metharme"""
_WITHOUT_SYSTEM = "explainchoice concisechoice reflection"
_OF_ONE_COLUMN = "completion input_output pygmalion llama2_chat"
_READERS = {
    "field": _OF_ONE_COLUMN,
    "field_system": f"{_INSTRUCTIONS} chat_template",
    **dict.fromkeys(
        ("field_instruction", "field_input", "field_output"), f"{_INSTRUCTIONS} {_WITHOUT_SYSTEM}"
    ),
}
_OF_MASKS = (
    *("roles_to_train", "train_on_eos", "train_on_eot"),
    *("message_field_training", "message_field_training_detail"),
)
_OF_MESSAGES = (
    *("field_messages", "field_tools", "message_property_mappings", "roles", "split_thinking"),
    *("template_thinking_key", "drop_system_message", *_OF_MASKS),
    *("message_field_role", "message_field_content", "field_thinking"),  # their older names
)
_OF_STEPS = ("step_separator", "max_completion_length", "train_on_last_step_only")


def unread_keys(name: str) -> list[str]:
    """The keys of a dataset that a supervised format does not read; `map` for prompts written in
    the recipe."""
    family = name.partition(":")[0].partition(".")[0]
    unread = [key for key, families in _READERS.items() if family not in families.split()]
    return [*unread, *(() if family == "chat_template" else _OF_MESSAGES), *_OF_STEPS]


def unread_beside_method(steps: bool) -> tuple[str, ...]:
    """The same of what is read for another method than imitation, in which all of an answer is
    learnt."""
    return _OF_MESSAGES if steps else (*_OF_MASKS, "train_on_inputs", *_OF_STEPS)


def is_own_code(name: str) -> bool:
    """Whether a type has the form `package.module` or `package.module.function`."""
    parts = name.split(".")
    plain = len(parts) > 1 and all(part.isidentifier() for part in parts)
    known = name in DATASET_TYPES or name in REFUSED_TYPES or name in ANSWER_TYPES
    return plain and not known


def prompt_fault(text: str, names: Collection[str]) -> str | None:
    """What is wrong with the braces of a prompt's text, if anything is."""
    try:
        parts = [part for _, part, *_ in Formatter().parse(text) if part is not None]
    except ValueError as error:
        return f"its braces do not fit ({error})"
    strange = [part for part in parts if part not in names]
    return f"it cannot hold {{{strange[0]}}}, only {{{'}, {'.join(names)}}}" if strange else None


class PromptType(Section):
    """`datasets[].type` as a map: how the columns of a row become prompt and answer.

    `format` and `no_input_format` hold `{instruction}` and `{input}`, `system_format` holds
    `{system}`; a brace that is meant as such is written twice.
    """

    system_prompt: str = ""
    """System text for rows that have none of their own. Default: none."""

    system_format: str = "{system}"
    """What stands before the prompt when there is a system text. Default, as Axolotl does: the text
    itself."""

    field_system: str = "system"
    """Column with the system text; may be absent. Default `system`, as Axolotl does."""

    field_instruction: str = "instruction"
    """Column with the instruction. Default `instruction`, as Axolotl does."""

    field_input: str = "input"
    """Column with the further input; may be absent or empty. Default `input`, as Axolotl does."""

    field_output: str = "output"
    """Column with the answer. Default `output`, as Axolotl does."""

    format: str = "{instruction} {input} "
    """The prompt of a row with an input. Default, as Axolotl does: `{instruction} {input} ` with
    the space at its end."""

    no_input_format: str = "{instruction} "
    """The prompt of a row without. Default, as Axolotl does: `{instruction} ` with the space at its
    end."""

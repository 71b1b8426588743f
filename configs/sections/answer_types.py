"""The values of `datasets[].type` beside `rl`, `reward_model` and `process_reward_model`."""

from __future__ import annotations

from regrow.configs.sections.section import Section

_SOURCES = ("argilla", "argilla_chat", "intel", "prompt_pairs", "ultra")
_STYLES = ("chatml", "llama3")
_ROWS_AS_THEY_ARE = ("passthrough", "passthrough.default", "user_defined.default")

PREFERENCE_TYPES = (
    "chat_template",
    "chat_template.argilla",
    "chat_template.argilla_chat",
    *(name for style in _STYLES for name in (style, f"{style}.default", f"{style}.icr")),
    *(f"{style}.{source}" for style in _STYLES for source in _SOURCES),
    "zephyr.nectar",
    *_ROWS_AS_THEY_ARE,
)
"""Formats of pairs: with `rl` dpo, ipo, orpo or simpo, and with `reward_model`."""

REWARD_TYPES = ("bradley_terry.chat_template", "bradley_terry.llama3", "bradley_terry.llama3.icr")
"""Further formats of pairs, with `reward_model`."""

UNPAIRED_TYPES = (
    "chat_template",
    *(f"{style}.{source}" for style in _STYLES for source in _SOURCES),
    *_ROWS_AS_THEY_ARE,
)
"""Formats of answers that are good or bad: with `rl: kto`."""

STEP_TYPES = ("stepwise_supervised",)
"""Formats of answers in steps, each right or wrong: with `process_reward_model`."""

PROMPT_TYPES = ("chat_template", "passthrough", "passthrough.default")
"""Formats of prompts that the model itself answers: with `rl` grpo or gdpo."""

KIND_TYPES: dict[str, tuple[str, ...]] = {
    "preference": PREFERENCE_TYPES,
    "reward": (*PREFERENCE_TYPES, *REWARD_TYPES),
    "unpaired": UNPAIRED_TYPES,
    "steps": STEP_TYPES,
    "prompts": PROMPT_TYPES,
}
"""Kind of data -> names of formats, by Axolotl's names."""

ANSWER_TYPES = frozenset(name for names in KIND_TYPES.values() for name in names)
"""All of them."""

ANSWER_PARTS = {
    "prompt_format": ("prompt", "system"),
    "chosen_format": ("chosen",),
    "rejected_format": ("rejected",),
    "completion_format": ("completion",),
}
"""Key of `AnswerType` -> what its text may hold in braces."""


class AnswerType(Section):
    """`datasets[].type` as a map, beside `rl`: how columns become a prompt and its answers.

    `prompt_format` holds `{prompt}` and perhaps `{system}`, the others the name before `_format`;
    a brace that is meant as such is written twice.
    """

    field_prompt: str = "prompt"
    """Column with the prompt. Default `prompt`, as Axolotl does."""

    field_system: str = "system"
    """Column with the system text; may be absent or empty. Default `system`, as Axolotl does."""

    field_chosen: str = "chosen"
    """Column with the better answer. Default `chosen`, as Axolotl does."""

    field_rejected: str = "rejected"
    """Column with the worse answer. Default `rejected`, as Axolotl does."""

    field_completion: str = "completion"
    """Column with the answer, for `rl: kto`. Default `completion`, as Axolotl does."""

    field_label: str = "label"
    """Column that says whether the answer is good, for `rl: kto`. Default `label`, as Axolotl
    does."""

    prompt_format: str = "{prompt}"
    """What the model reads. Default: the prompt alone."""

    chosen_format: str = "{chosen}"
    """The better answer; the eos token follows. Default: the answer alone."""

    rejected_format: str = "{rejected}"
    """The worse answer; the eos token follows. Default: the answer alone."""

    completion_format: str = "{completion}"
    """The answer, for `rl: kto`; the eos token follows. Default: the answer alone."""

"""`type: alpaca` and its family: an instruction, perhaps an input, and the answer to be learnt.

The formats differ in their columns and in the words around them. They are Axolotl's
(docs/dataset-formats/inst_tune.qmd); where its words for a format come from elsewhere is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from regrow.tasks.prepare.example import Pieces, no_such_column, text_column
from regrow.tasks.prepare.formats.wording import (
    ALPACA_SYSTEM,
    STYLES,
    Wording,
    answer_column,
    answered,
    styled,
    trains_on_inputs,
)

_ALPACA = styled("instruct", ALPACA_SYSTEM)


@dataclass(frozen=True)
class Options:
    """Which columns are read, the words around them, and what is trained."""

    wording: Wording = _ALPACA
    instruction: str = "instruction"
    input: str | None = "input"
    """May be absent, null or empty; None: the format has none."""
    output: str = "output"
    system: str | None = None
    """Column with the row's system text; None: the wording's is used."""
    system_may_be_absent: bool = False
    """The wording's system text is used then."""
    answer_prefix: str = ""
    eos: int = 1
    """Eos tokens that end the answer."""
    train_on_inputs: bool = False

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options of the dataset's type, with the columns that the recipe names."""
        chosen = _options(dataset.type, dataset.conversation)
        return replace(
            chosen,
            instruction=dataset.field_instruction or chosen.instruction,
            input=dataset.field_input or chosen.input,
            output=dataset.field_output or chosen.output,
            system=dataset.field_system or chosen.system,
            train_on_inputs=trains_on_inputs(dataset, recipe),
        )


def read(row: Mapping[str, Any], options: Options) -> Pieces:
    """The prompt and the answer. Raises RowError for a column that is absent or not text."""
    instruction = text_column(row, options.instruction, "field_instruction")
    context = text_column(row, options.input, "field_input", default="") if options.input else ""
    answer = options.answer_prefix + answer_column(row, options.output, "field_output")
    prompt = options.wording.prompt(instruction, context, _system(row, options))
    return answered(prompt, answer, options.train_on_inputs, options.eos)


def _system(row: Mapping[str, Any], options: Options) -> str | None:
    """The row's system text, empty where it is null; None where the format has no column for it."""
    if options.system is None:
        return None
    if options.system not in row and options.system_may_be_absent:
        return None
    if options.system not in row:
        raise no_such_column(row, options.system, "field_system")
    return text_column(row, options.system, "field_system", default="")


def _options(name: str, conversation: str | None) -> Options:
    if name == "alpaca_chat" and conversation is not None:
        return Options(styled(conversation, ALPACA_SYSTEM))
    return _FORMATS[name]


_CONCISE = (
    "Below is an instruction from a USER that describes a task, paired with an input that provides "
    "further context. The ASSISTANT writes a response that concisely and appropriately completes "
    "the request.\n\n",
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response "
    "that appropriately and concisely completes the request.\n\n",
)
# TL;DR summaries know no style: the words are always these.
_TLDR = Wording(
    "USER: Summarize the following article as a TL;DR.\n{instruction}\n{input}\nASSISTANT:",
    "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:",
)
# The words of OpenOrca-Preview1 (huggingface.co/Open-Orca/OpenOrca-Preview1-13B).
_OPEN_ORCA = Wording(
    "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
    "### Human:\n{instruction}\n### Assistant:\n",
    "### System:\n{system}\n",
)
# The words of orca_mini_v2 (huggingface.co/pankajmathur/orca_mini_v2_7b).
_ORCA_MINI = "### System:\n{system}\n\n### User:\n{instruction}\n\n### Response:\n"
_CHAT_CONCISE = styled("chat", _CONCISE)


def _styles(name: str, **columns: Any) -> dict[str, Options]:
    """The name alone, which means Alpaca's own style, and with each style behind it."""
    wordings = {f"{name}:{style}": styled(style, ALPACA_SYSTEM) for style in STYLES}
    return {
        key: Options(wording, **columns) for key, wording in {name: _ALPACA, **wordings}.items()
    }


_ORCA_COLUMNS: dict[str, Any] = {
    "instruction": "question",
    "input": None,
    "output": "response",
    "system": "system_prompt",
}
_FORMATS: dict[str, Options] = {
    **_styles("alpaca"),
    **_styles("gpteacher", output="response"),
    **_styles("oasst", instruction="INSTRUCTION", input=None, output="RESPONSE"),
    # Jeopardy's answers are questions; Axolotl asks for them with Alpaca's words.
    **_styles(
        "jeopardy",
        instruction="question",
        input="category",
        output="answer",
        answer_prefix="what is ",
    ),
    **dict.fromkeys(
        ("summarizetldr", *(f"summarizetldr:{style}" for style in STYLES)),
        Options(_TLDR, "article", None, "summary"),
    ),
    "alpaca_instruct": Options(),
    "alpaca_instruct.load_no_prompt": Options(styled("instruct")),
    "alpaca_chat": Options(styled("chat", ALPACA_SYSTEM)),
    "alpaca_chat.load_no_prompt": Options(styled("chat")),
    "alpaca_chat.load_concise": Options(_CHAT_CONCISE),
    "alpaca_chat.load_qa": Options(_CHAT_CONCISE, "question", None, "answer"),
    "alpaca_chat.load_camel_ai": Options(_CHAT_CONCISE, "message_1", None, "message_2"),
    "alpaca_w_system": Options(styled("chat"), system="system"),
    "alpaca_w_system.load_chat": Options(styled("chat"), system="system"),
    "alpaca_w_system.load_instruct": Options(styled("instruct"), system="system"),
    "alpaca_w_system.load_open_orca": Options(_OPEN_ORCA, **_ORCA_COLUMNS),
    "alpaca_w_system.load_open_orca_chatml": Options(styled("chatml"), **_ORCA_COLUMNS),
    "orcamini": Options(Wording(_ORCA_MINI, _ORCA_MINI), **_ORCA_COLUMNS),
    # Three eos tokens, as the Metharme models were trained (PygmalionAI, 2023). For an empty answer
    # Axolotl has them learnt if the tokenizer begins texts with bos, and nothing if it does not.
    "metharme": Options(
        Wording("{instruction}", "{instruction}"), "prompt", None, "generation", eos=3
    ),
}
NAMES = tuple(_FORMATS)
"""The formats read here, by their names in a recipe."""

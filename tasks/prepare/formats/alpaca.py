"""`type: alpaca`: an instruction, perhaps an input, and the output, which is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import Document, Segment, text_column

# The prompt of Stanford Alpaca (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca); models
# trained on it expect these very words.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Options:
    """Which columns are read, and what is trained."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    train_on_inputs: bool = False

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give."""
        whole = dataset.train_on_inputs
        return cls(
            instruction=dataset.field_instruction,
            input=dataset.field_input,
            output=dataset.field_output,
            train_on_inputs=bool(recipe.train_on_inputs if whole is None else whole),
        )


def read(row: Mapping[str, Any], options: Options) -> Document:
    """The prompt and the answer. Raises RowError for a column that is absent or not text."""
    instruction = text_column(row, options.instruction, "field_instruction")
    context = text_column(row, options.input, "field_input", default="")
    output = text_column(row, options.output, "field_output")
    # Not str.format: the row's text may hold braces.
    before, after = (_WITH_INPUT if context else _WITHOUT_INPUT).split("{instruction}")
    prompt = before + instruction + after.replace("{input}", context)
    return Document((Segment(prompt, options.train_on_inputs), Segment(output, True)))

"""The words that instruction formats put around a row's texts, and the pieces they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import Piece, Pieces, RowError, no_such_column, text_column


@dataclass(frozen=True)
class Wording:
    """The prompt around an instruction. Texts with `{instruction}`, `{input}` and `{system}` in
    them; the row's own texts may hold braces, which mean nothing."""

    with_input: str
    """For a row that has an input."""
    without_input: str
    system_format: str = ""
    """What stands in front when there is a system text."""
    system: str = ""
    """The system text of a row with an input that has none of its own."""
    system_without_input: str = ""

    def prompt(self, instruction: str, context: str = "", system: str | None = None) -> str:
        """The whole prompt.

        Args:
            context: the input; empty for none.
            system: the row's own system text; None means the wording's.
        """
        if system is None:
            system = self.system if context else self.system_without_input
        turn = self.with_input if context else self.without_input
        before = self.system_format.format(system=system) if system else ""
        return before + turn.format(instruction=instruction, input=context, system=system)


# The prompts of Stanford Alpaca (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca); models
# trained on it expect these very words.
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.",
)
"""For a row with an input, and for one without."""

_CHATML_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"

# The styles of Axolotl's alpaca family (docs/dataset-formats/inst_tune.qmd): Alpaca's own, that of
# Vicuna's USER and ASSISTANT, ChatML and Phi-3. That phi puts an input behind `<|end|>` and leaves
# the newline out there is Axolotl's doing; no one else has defined this style with an input.
_STYLES = {
    "instruct": Wording(
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "{system}\n\n",
    ),
    "chat": Wording(
        "USER: {instruction}\n{input}\nASSISTANT:",
        "USER: {instruction}\nASSISTANT:",
        "SYSTEM: {system}\n",
    ),
    "chatml": Wording(
        "<|im_start|>user\n{instruction}\n{input}" + _CHATML_ANSWER,
        "<|im_start|>user\n{instruction}" + _CHATML_ANSWER,
        "<|im_start|>system\n{system}<|im_end|>\n",
    ),
    "phi": Wording(
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
        "<|system|>\n{system}<|end|>\n",
    ),
}
STYLES = tuple(_STYLES)
"""Names of the styles."""


def styled(style: str, system: tuple[str, str] = ("", "")) -> Wording:
    """A style with system texts for rows with and without an input; empty: none."""
    words = _STYLES[style]
    return Wording(words.with_input, words.without_input, words.system_format, *system)


def answered(prompt: str, answer: str, train_on_inputs: bool, eos: int = 1) -> Pieces:
    """A prompt and its answer, each tokenized for itself as the model meets them.

    An answer of no text is taken for a missing one: nothing of it is learnt, not even to stop at
    once, and an example without learnt tokens is left out (and counted).

    Args:
        eos: the eos tokens that end the answer.
    """
    asked = Piece(prompt, "all" if train_on_inputs else "none")
    if not answer:
        return Pieces((asked,), eos=False)
    return Pieces((asked, Piece(answer, "all", eos=eos)), eos=False)


def answer_column(row: Mapping[str, Any], name: str, key: str) -> str:
    """The text of a column that must be there, and may be null for "no text".

    Raises:
        RowError: when the column is absent or holds something else.
    """
    if name not in row:
        raise no_such_column(row, name, key)
    return text_column(row, name, key, default="")


def fixed_column(row: Mapping[str, Any], name: str) -> str:
    """The text of a column whose name no recipe key can change.

    Raises:
        RowError: when the column is absent, null or not text.
    """
    return text_column(row, require_column(row, name), "type")


def require_column(row: Mapping[str, Any], name: str) -> str:
    """`name`, if the row has that column. Raises RowError if it has not."""
    if name not in row:
        there = ", ".join(map(repr, row)) or "no columns at all"
        raise RowError(
            f"no column {name!r}; the row has {there}. The format fixes the columns' names: rename "
            "the column, or choose another `type`"
        )
    return name


def trains_on_inputs(dataset: Any, recipe: Any) -> bool:
    """What the dataset says, else the recipe."""
    its = dataset.train_on_inputs
    return bool(recipe.train_on_inputs if its is None else its)

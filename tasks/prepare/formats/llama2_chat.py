"""`type: llama2_chat`: from/value dialogues in the prompt format of Meta's Llama 2 chat models.

The format is Meta's (github.com/meta-llama/llama, llama/generation.py, chat_completion): each
answer is followed by the eos token, which is learnt, and each further question begins anew with
bos. For that the tokens are written as `</s>` and `<s>`, which they are in Llama's tokenizers.
Unlike Axolotl: the first question has the space before `[/INST]` that Meta's has, no `<s>` stands
at the end, and masks do not depend on counts that are right for Llama's tokenizer only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import Document, RowError, Segment, no_such_column
from regrow.tasks.prepare.formats.wording import trains_on_inputs

NAMES = ("llama2_chat",)
"""The formats read here, by their names in a recipe."""

# Meta's system text for when none is given (same file, first release, July 2023).
_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)
_ROLES = ("human", "gpt")


@dataclass(frozen=True)
class Options:
    """Which column is read, and what is trained."""

    conversations: str = "conversations"
    train_on_inputs: bool = False

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give."""
        return cls(dataset.field or cls.conversations, trains_on_inputs(dataset, recipe))


def read(row: Mapping[str, Any], options: Options) -> Document:
    """The dialogue, without a question at its end that has no answer.

    Raises:
        RowError: when turns do not alternate between human and gpt, or there is no answer.
    """
    if options.conversations not in row:
        raise no_such_column(row, options.conversations, "field")
    turns = _turns(row[options.conversations])
    system = _SYSTEM
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1], turns[1:]
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]  # a greeting answers no question
    pairs = list(zip(_texts(turns)[::2], _texts(turns)[1::2], strict=False))
    if not pairs:
        raise RowError("the dialogue has no question with an answer; llama2_chat needs one")
    first = f"<<SYS>>\n{system}\n<</SYS>>\n\n{pairs[0][0]}"
    questions = [first, *(question for question, _ in pairs[1:])]
    segments: list[Segment] = []
    for question, (_, answer) in zip(questions, pairs, strict=True):
        again = "<s>" if segments else ""
        segments += [
            Segment(f"{again}[INST] {question} [/INST]", options.train_on_inputs),
            Segment(f" {answer} </s>", True),
        ]
    return Document(tuple(segments))


def _turns(value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(f"the dialogue must be a list of turns, not {str(value)[:60]!r}")
    for number, turn in enumerate(value):
        if not isinstance(turn.get("value"), str):
            raise RowError(f"turn {number} has no text in 'value'")
    return [(str(turn.get("from")), turn["value"]) for turn in value]


def _texts(turns: Sequence[tuple[str, str]]) -> list[str]:
    for number, (role, _) in enumerate(turns):
        if role != _ROLES[number % 2]:
            raise RowError(
                f"{role!r} speaks where {_ROLES[number % 2]} must; human and gpt take turns in "
                "llama2_chat. For other dialogues use `type: chat_template`"
            )
    return [text.strip() for _, text in turns]

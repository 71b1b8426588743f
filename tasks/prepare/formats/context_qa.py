"""`type: context_qa` and its variants: a question about a text that stands before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from regrow.tasks.prepare.example import Pieces
from regrow.tasks.prepare.formats.wording import answered, fixed_column, styled, trains_on_inputs

# Axolotl's words for the formats (docs/dataset-formats/inst_tune.qmd).
_CONCISELY = "Use the following contextual information to concisely answer the question.\n"
_CHAT = styled("chat", (_CONCISELY, _CONCISELY))
_UNKNOWN = (
    "The context provided does not contain any information about your inquiry. "
    "Therefore, I'm unable to answer your question based on the given context."
)


@dataclass(frozen=True)
class Options:
    """The prompt and the answer, with the columns they hold in braces."""

    prompt: str = _CHAT.prompt("{article}\n===\n{question}")
    answer: str = "{answer}"
    train_on_inputs: bool = False

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options of the dataset's type."""
        whole = trains_on_inputs(dataset, recipe)
        return replace(_FORMATS[dataset.type], train_on_inputs=whole)


def read(row: Mapping[str, Any], options: Options) -> Pieces:
    """The prompt and the answer. Raises RowError for a column that is absent or not text."""
    prompt, answer = _filled(options.prompt, row), _filled(options.answer, row)
    return answered(prompt, answer, options.train_on_inputs)


def _filled(text: str, row: Mapping[str, Any]) -> str:
    names = [name for _, name, *_ in Formatter().parse(text) if name]
    return text.format(**{name: fixed_column(row, name) for name in names})


_FORMATS = {
    "context_qa": Options(),
    "context_qa.load_404": Options(
        _CHAT.prompt("{article}\n===\n{unanswerable_question}"), _UNKNOWN
    ),
    "context_qa.load_v2": Options("Context: {context}\nQuestion: {question}\n", "Answer: {answer}"),
}
NAMES = tuple(_FORMATS)
"""The formats read here, by their names in a recipe."""

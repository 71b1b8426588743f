"""`type: pygmalion`: a persona and turns of `human` and `bot`, each tokenized for itself.

Each of the bot's turns is learnt with an eos token at its end, but for the `<|model|>` before it.
Unlike Axolotl, which leaves the prefix in one text with the turn: the two are tokenized apart,
which is the same for byte-level tokenizers; and `train_on_inputs` has its effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import Piece, Pieces, RowError, no_such_column
from regrow.tasks.prepare.formats.wording import trains_on_inputs

NAMES = ("pygmalion",)
"""The formats read here, by their names in a recipe."""

# Pygmalion's and Metharme's tokens (PygmalionAI, 2023).
_SYSTEM, _USER, _MODEL = "<|system|>", "<|user|>", "<|model|>"


@dataclass(frozen=True)
class Options:
    """Which column is read, and what is trained."""

    conversations: str = "conversations"
    train_on_inputs: bool = False

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give."""
        return cls(dataset.field or cls.conversations, trains_on_inputs(dataset, recipe))


def read(row: Mapping[str, Any], options: Options) -> Pieces:
    """The turns. Raises RowError when one has no text, or a role the format does not know."""
    if options.conversations not in row:
        raise no_such_column(row, options.conversations, "field")
    turns = row[options.conversations]
    if not isinstance(turns, (list, tuple)):
        shown = str(turns)[:60]
        raise RowError(f"column {options.conversations!r} must hold a list of turns, not {shown!r}")
    pieces = [p for i, turn in enumerate(turns) for p in _pieces(turn, i, options.train_on_inputs)]
    # The bos token belongs to the persona, with which a complete conversation begins.
    with_persona = bool(turns) and turns[0]["role"] == "system"
    return Pieces(tuple(pieces), bos=with_persona, eos=False)


def _pieces(turn: Any, number: int, train_on_inputs: bool) -> list[Piece]:
    role, text = _parts(turn, number)
    asked = "all" if train_on_inputs else "none"
    if role == "system":
        # The mark with which the dialogue begins in Pygmalion's own data.
        persona = text.removesuffix("\n<START>").strip()
        return [Piece(f"{_SYSTEM}Persona: {persona}", asked)]
    if role == "human":
        return [Piece(f"{_USER} {text.strip()}", asked)]
    return [Piece(_MODEL, asked), Piece(f" {text.strip()}", "all", eos=1)]


def _parts(turn: Any, number: int) -> tuple[str, str]:
    role = turn.get("role") if isinstance(turn, Mapping) else None
    if role not in ("system", "human", "bot"):
        raise RowError(f"turn {number} has the role {role!r}; the format knows system, human, bot")
    if not isinstance(turn.get("value"), str):
        raise RowError(f"turn {number} ({role}) has no text in 'value'")
    return role, turn["value"]

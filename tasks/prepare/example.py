"""What a format makes of one row: an item of one or more sequences to be tokenized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class RowError(ValueError):
    """A row that cannot be read as its format says; the caller adds the file and the row number."""


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the model learns to write it."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Document:
    """Segments tokenized as one text, ended by the tokenizer's eos token, which is trained."""

    segments: tuple[Segment, ...]
    continues: bool = False
    """The first segment is a prompt, and all is learnt from the first token on that is not one of
    the prompt's when that is tokenized alone. For preferences, as TRL does it: the probability of
    an answer is that of all tokens behind those that the model is given."""


@dataclass(frozen=True)
class Piece:
    """A text tokenized for itself, and which of its tokens are learnt."""

    text: str
    train: Literal["all", "last", "none"]
    """last: only the last token, as process rewards need."""
    eos: int = 0
    """The eos tokens it ends with, those of the text itself counted in; learnt if the piece is."""


@dataclass(frozen=True)
class Pieces:
    """Texts tokenized one by one and put one after the other: what stands before an answer has the
    same tokens when the model is asked."""

    pieces: tuple[Piece, ...]
    bos: bool = True
    """Begin with what the tokenizer puts before a text (its bos token, if it has such a habit)."""
    eos: bool = True
    """End with the eos token, learnt when the last piece is; unless it stands there already."""
    bos_always: bool = False
    """Begin with the bos token where there is one, whatever the tokenizer's habit."""
    answer_limit: int | None = None
    """Tokens kept of all pieces but the first."""


@dataclass(frozen=True)
class TokenIds:
    """Tokens made elsewhere, taken as they are."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    """1 where the token is learnt."""


@dataclass(frozen=True)
class Conversation:
    """Messages that a chat template renders, and which of them are trained."""

    messages: tuple[Mapping[str, Any], ...]
    """What the template gets: `role`, `content`, and whatever else the row has."""
    trained: tuple[bool, ...]
    """One flag for each message."""
    tools: tuple[Any, ...] | None = None
    details: Mapping[int, Mapping[str, tuple[tuple[int, int], ...]]] = field(default_factory=dict)
    """Message -> property (`content`, ...) -> its learnt characters, each [first, last). Of a
    message in here nothing else is learnt but its end."""


@dataclass(frozen=True)
class Exchange:
    """Messages that a chat template renders: a prompt, and an answer, all of which is learnt.

    Learnt is what the template writes beyond the prompt with the beginning of an answer
    (`add_generation_prompt`), so also what ends the answer; token by token as in
    `Document.continues`.
    """

    prompt: tuple[Mapping[str, Any], ...]
    answer: tuple[Mapping[str, Any], ...]
    """Empty: the prompt alone, with the beginning of an answer."""
    tools: tuple[Any, ...] | None = None
    closed: bool = False
    """Leave out white space that the template writes at the end, and end with the eos token."""


TokenSource = Document | Pieces | TokenIds | Conversation | Exchange
"""What becomes one sequence of tokens."""


@dataclass(frozen=True)
class Item:
    """What stays together when rows are mixed and packed: one sequence, or the two of a pair."""

    sequences: tuple[TokenSource, ...]
    """One; or chosen and rejected, in this order."""
    labels: tuple[int, ...] = ()
    """0 to 255: one for each sequence (1 chosen or desirable, 0 rejected or undesirable) or, for
    process rewards, one for each trained token. Empty where the method has none."""
    extra: str | None = None
    """JSON of what travels with the item unread, such as a reference answer for a reward."""


def text_column(row: Mapping[str, Any], name: str, key: str, default: str | None = None) -> str:
    """The text in column `name`.

    Args:
        key: the recipe key that names the column, for the error.
        default: what an absent or null column means; None makes it an error.

    Raises:
        RowError: when the column is absent, null or not text.
    """
    if row.get(name) is None and default is not None:
        return default
    if name not in row:
        raise no_such_column(row, name, key)
    value = row[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # JSON and CSV readers make numbers of answers such as "4"
    if not isinstance(value, str):
        raise RowError(f"column {name!r} must hold text, not {_kind(value)}")
    return value


def no_such_column(row: Mapping[str, Any], name: str, key: str) -> RowError:
    """The error for a column that is not there; it lists those that are."""
    there = ", ".join(map(repr, row)) or "no columns at all"
    return RowError(f"no column {name!r}; the row has {there}. Name the right one with `{key}`")


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} ({str(value)[:40]!r})"

"""What a chat template prints around the texts of its messages, found by putting marks in them.

A skeleton is the literal text between the marks. A row whose text is exactly the literals with its
own texts in between is thereby taken apart: that one comparison is the proof, whatever the template
does inside. A row that differs anywhere (a template that drops thinking, changes its frame with the
content, ...) does not fit, and the caller asks the template again with marks in that very row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.rendering import ChatTemplate

Span = tuple[int, int]
"""[first, last) character."""

# Private-use characters (Unicode, chapter 23.5): no template and hardly any text holds them.
_OPEN, _CLOSE = "\ue0f1", "\ue0f2"
# White space no template prints by itself (two kinds of rare spaces), with and without a newline at
# the edge: what is left of it tells what the template strips.
_BEFORE, _AFTER = "\n\u2006", "\u2005\n"

_Form = Callable[[str], str]


def _as_is(text: str) -> str:
    return text


# What may be left of the white space at an edge -> what was done to the text there.
_LEFT: dict[str, _Form] = {
    _BEFORE: _as_is,
    "": str.lstrip,
    _BEFORE[1:]: lambda text: text.lstrip("\n"),
}
_RIGHT: dict[str, _Form] = {
    _AFTER: _as_is,
    "": str.rstrip,
    _AFTER[:-1]: lambda text: text.rstrip("\n"),
}


@dataclass(frozen=True)
class Slot:
    """Where a template prints a text of a message."""

    message: int
    field: str
    """`content`, or another property that holds text, such as thinking."""
    left: _Form
    """What the template does to the beginning of the text."""
    right: _Form

    def printed(self, text: str) -> str:
        """The text as the template prints it."""
        if self.left is _as_is and self.right is _as_is:
            return text
        return self.right(self.left(text))


@dataclass(frozen=True)
class Skeleton:
    """Literals and slots in turns; one literal more than slots."""

    slots: tuple[Slot, ...]
    literals: tuple[str, ...]

    def fit(self, text: str, messages: Sequence[Mapping[str, Any]]) -> list[int] | None:
        """Where each slot's text begins and ends in `text`, flat; None when the text is other."""
        pieces, edges, at = [self.literals[0]], [], len(self.literals[0])
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            printed = slot.printed(messages[slot.message][slot.field])
            pieces += (printed, literal)
            edges.append(at)
            at += len(printed)
            edges.append(at)
            at += len(literal)
        return edges if at == len(text) and "".join(pieces) == text else None


def build(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    fields: Sequence[tuple[int, str]],
    tools: Sequence[Any] | None = None,
    text: str = "",
) -> Skeleton | None:
    """The skeleton around the given (message, field)s; None where marks do not tell one.

    Texts that the template leaves out get no slot.

    Args:
        text: in which no mark may occur.
    """
    marks = _marks(text, fields)
    plain = _render(template, messages, marks, tools)
    found = _split(plain, marks) if plain is not None else None
    if plain is None or found is None:
        return None
    literals, order = found
    lefts = _stripped(template, messages, marks, tools, (literals, order), _LEFT)
    rights = _stripped(template, messages, marks, tools, (literals, order), _RIGHT)
    if lefts is None or rights is None:
        return None
    slots = zip(order, lefts, rights, strict=True)
    return Skeleton(tuple(Slot(*key, left, right) for key, left, right in slots), literals)


def text_fields(message: Mapping[str, Any]) -> list[str]:
    """The properties of a message that hold what it says."""
    return [key for key, value in message.items() if type(value) is str and key not in _NAMES]


_NAMES = {"role", "name", "tool_call_id", "id", "type"}
"""Properties that hold a name, on which templates branch."""


def mark_for(text: str) -> str:
    """A mark that does not occur in the text."""
    return next(iter(_marks(text, [(0, "content")]).values()))


def _marks(text: str, fields: Sequence[tuple[int, str]]) -> dict[tuple[int, str], str]:
    opening = _OPEN
    while opening in text:
        opening += _OPEN
    return {key: f"{opening}{number}{_CLOSE}" for number, key in enumerate(fields)}


def _render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    marks: Mapping[tuple[int, str], str],
    tools: Sequence[Any] | None,
) -> str | None:
    marked = [dict(message) for message in messages]
    for (index, name), mark in marks.items():
        marked[index][name] = mark
    try:
        return template.render(marked, tools)
    except RowError:
        return None


def _split(
    text: str, marks: Mapping[tuple[int, str], str]
) -> tuple[tuple[str, ...], tuple[tuple[int, str], ...]] | None:
    """The literals between the marks, and the marks' keys in the order of the text."""
    if not marks:
        return (text,), ()
    key_of = {mark: key for key, mark in marks.items()}
    pieces = re.split("(" + "|".join(map(re.escape, key_of)) + ")", text)
    order = tuple(key_of[mark] for mark in pieces[1::2])
    return (tuple(pieces[::2]), order) if len(set(order)) == len(order) else None


def _stripped(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    marks: Mapping[tuple[int, str], str],
    tools: Sequence[Any] | None,
    plain: tuple[tuple[str, ...], tuple[tuple[int, str], ...]],
    forms: Mapping[str, _Form],
) -> list[_Form] | None:
    """What the template does to one edge of each text, asked with white space at that edge."""
    before = forms is _LEFT
    padding = _BEFORE if before else _AFTER
    padded = {key: padding + m if before else m + padding for key, m in marks.items()}
    text = _render(template, messages, padded, tools)
    found = _split(text, marks) if text is not None else None
    literals, order = plain
    if found is None or found[1] != order:
        return None
    edges = found[0][:-1] if before else found[0][1:]
    bare = literals[:-1] if before else literals[1:]
    if (found[0][-1] != literals[-1]) if before else (found[0][0] != literals[0]):
        return None
    made: list[_Form] = []
    for edge, literal in zip(edges, bare, strict=True):
        fits = edge.startswith(literal) if before else edge.endswith(literal)
        left = edge[len(literal) :] if before else edge[: len(edge) - len(literal)]
        if not fits or left not in forms:
            return None
        made.append(forms[left])
    return made

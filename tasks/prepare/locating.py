"""Where in a rendered conversation each message stands, for any chat template.

Nothing is assumed of the template; it is asked, with marks in place of texts:
  1. a skeleton of all conversations of the same shape (roles and properties), made once;
  2. a skeleton of this very conversation, with marks only in the messages that are wanted;
  3. for each wanted message, a plain message with a mark in its place: what is the same around it
     is the template's own, what differs is the message (its tool calls, say).
A place is given only if it is proven; otherwise the row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from regrow.tasks.prepare.endings import Ending, Endings
from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.skeleton import Skeleton, Span, build, mark_for, text_fields

_Messages = Sequence[Mapping[str, Any]]
_Tools = Sequence[Any] | None

_MAX_SHAPES = 4096
"""Skeletons kept; each takes a few kilobytes."""


@dataclass(frozen=True)
class Located:
    """A rendered conversation taken apart."""

    text: str
    places: dict[int, Span]
    """Message -> its characters; a message that the template leaves out has no entry."""
    endings: dict[int, Ending]
    """Message -> the tokens behind it."""
    taken_apart: tuple[Skeleton, list[int]] | None = None
    """By what, and the edges of its slots; None when by single messages."""

    def field(
        self, message: Mapping[str, Any], index: int, name: str
    ) -> tuple[int, int, int] | None:
        """Where the text of a property begins, how many characters of it the template has stripped
        there, and how many it prints; None when that is not known."""
        skeleton, edges = self.taken_apart or (Skeleton((), ("",)), [])
        for number, slot in enumerate(skeleton.slots):
            if (slot.message, slot.field) == (index, name):
                start, stop = edges[2 * number : 2 * number + 2]
                return start, len(message[name]) - len(slot.left(message[name])), stop - start
        return None


class Locator:
    """Takes conversations apart.

    Args:
        endings: knows which tokens end a message of this template.
    """

    def __init__(self, template: ChatTemplate, endings: Endings) -> None:
        self._template = template
        self._endings = endings
        self._skeletons: dict[tuple[Any, ...], Skeleton | None] = {}

    def locate(self, messages: _Messages, wanted: Sequence[int], tools: _Tools) -> Located:
        """The rendered text, and where each wanted message stands in it (others may be told too).

        Raises:
            RowError: when the template refuses the conversation, or a place cannot be told exactly.
        """
        text = self._template.render(messages, tools)
        skeleton = self._of_shape(messages) if not tools else None
        edges = skeleton.fit(text, messages) if skeleton else None
        if skeleton and edges is not None:
            return self._from_skeleton(text, messages, skeleton, edges)
        return self._of_row(text, messages, wanted, tools)

    def _of_row(
        self, text: str, messages: _Messages, wanted: Sequence[int], tools: _Tools
    ) -> Located:
        """The same asked for this row alone."""
        fields = [
            (i, name)
            for i in wanted
            if not _says_more(messages[i])
            for name in text_fields(messages[i])
            if messages[i][name]
        ]
        skeleton = build(self._template, messages, fields, tools, text) if fields else None
        edges = skeleton.fit(text, messages) if skeleton else None
        if skeleton is None or edges is None:
            return self._one_by_one(text, messages, wanted, tools)
        marked = self._from_skeleton(text, messages, skeleton, edges)
        rest = sorted(set(wanted) - {i for i, _ in fields})
        if not rest:
            return marked
        others = self._one_by_one(text, messages, rest, tools)
        places = marked.places | others.places
        _check_order(places)
        return Located(text, places, marked.endings | others.endings, marked.taken_apart)

    def _of_shape(self, messages: _Messages) -> Skeleton | None:
        """The skeleton of all conversations of this shape; None where there is none."""
        shape = _shape(messages)
        if shape is None:
            return None
        if shape not in self._skeletons:
            if len(self._skeletons) >= _MAX_SHAPES:
                self._skeletons.clear()
            fields = [(i, name) for i, m in enumerate(messages) for name in text_fields(m)]
            self._skeletons[shape] = build(self._template, messages, fields)
        return self._skeletons[shape]

    def _from_skeleton(
        self, text: str, messages: _Messages, skeleton: Skeleton, edges: list[int]
    ) -> Located:
        places: dict[int, Span] = {}
        endings: dict[int, Ending] = {}
        last = len(skeleton.slots) - 1
        for number, slot in enumerate(skeleton.slots):
            start, stop = edges[2 * number], edges[2 * number + 1]
            index = slot.message
            if len(messages[index]) > 2:
                before = places.get(index)
                if before is None and slot.field != "content":
                    start -= self._written(skeleton.literals[number])
                start = before[0] if before else start
            role = messages[index]["role"]
            places[index] = start, stop
            literal = skeleton.literals[number + 1]
            found = self._endings.behind_literal(literal, role)
            if not found.settled and number < last:
                found = self._endings.behind(text, stop, role)
            endings[index] = found
        return Located(text, places, endings, (skeleton, edges))

    def _written(self, literal: str) -> int:
        """How much of the text before a message's thinking the model writes: what comes after the
        prompt for an answer, such as `<think>`."""
        header = self._endings.header
        at = literal.rfind(header) if header else -1
        return len(literal) - at - len(header) if at >= 0 else 0

    def _one_by_one(
        self, text: str, messages: _Messages, wanted: Sequence[int], tools: _Tools
    ) -> Located:
        mark = mark_for(text)
        found = {i: self._one(text, messages, i, mark, tools) for i in wanted}
        places = {i: span for i, span in found.items() if span is not None}
        _check_order(places)
        endings = {
            i: self._endings.behind(text, stop, messages[i]["role"])
            for i, (_, stop) in places.items()
        }
        return Located(text, places, endings)

    def _one(
        self, text: str, messages: _Messages, index: int, mark: str, tools: _Tools
    ) -> Span | None:
        """The place of one message, between what stands before and behind a mark put there."""
        before, behind = list(messages[:index]), list(messages[index + 1 :])
        probe = {"role": messages[index]["role"], "content": mark}
        probed = self._try([*before, probe, *behind], tools)
        if text in (probed, self._try([*before, *behind], tools)):
            return None
        if probed is None or probed.count(mark) != 1:
            raise _untold(index, messages)
        prefix, _, suffix = probed.partition(mark)
        start, stop = self._start(text, prefix, before, tools), self._stop(text, suffix)
        if start is None or stop is None or stop < start:
            raise _untold(index, messages)
        return start, stop

    def _start(self, text: str, prefix: str, before: _Messages, tools: _Tools) -> int | None:
        if text.startswith(prefix):
            return len(prefix)
        # The template writes the head of this message in another way than that of a plain one:
        # what comes after the prompt for it is the message.
        prompt = self._try(before, tools, add_generation_prompt=True)
        if prompt and text.startswith(prompt):
            return len(prompt)
        # Else what comes after the head that all messages of this role have in common.
        base = self._try(before, tools) or ""
        if not base or not text.startswith(base) or not prefix.startswith(base):
            return None
        common = next(
            i for i, (a, b) in enumerate(zip(text, prefix + "\0", strict=False)) if a != b
        )
        at_edge = self._endings.special_at_end(text[:common]) or text[common - 1].isspace()
        at_edge = at_edge or text[common].isspace() or self._endings.special_at_start(text[common:])
        return common if at_edge else None

    def _stop(self, text: str, suffix: str) -> int | None:
        if text.endswith(suffix):
            return len(text) - len(suffix)
        # A message of this kind may be ended by another special token than a plain one, or by none
        # (DeepSeek V3's template after a single tool call).
        rest = suffix[len(self._endings.special_at_start(suffix)) :]
        if rest == suffix or not text.endswith(rest):
            return None
        stop = len(text) - len(rest)
        return stop - len(self._endings.special_at_end(text[:stop]))

    def _try(
        self, messages: _Messages, tools: _Tools, add_generation_prompt: bool = False
    ) -> str | None:
        try:
            return self._template.render(messages, tools, add_generation_prompt)
        except RowError:
            return None


def _shape(messages: _Messages) -> tuple[Any, ...] | None:
    """Roles and properties, if all there is besides the roles is text."""
    shape: list[Any] = []
    for message in messages:
        if len(message) == 2 and type(message.get("content")) is str:
            shape.append(message["role"])
        elif len(text_fields(message)) == len(message) - 1:
            shape.append((message["role"], *message))
        else:
            return None
    return tuple(shape)


def _says_more(message: Mapping[str, Any]) -> bool:
    """Whether it says anything that no mark can stand for, such as tool calls."""
    return any(isinstance(value, (list, Mapping)) for value in message.values())


def _check_order(places: Mapping[int, Span]) -> None:
    if any(first[1] > second[0] for first, second in pairwise(sorted(places.values()))):
        raise RowError("the chat template prints two messages one inside the other")


def _untold(index: int, messages: _Messages) -> RowError:
    return RowError(
        f"the chat template prints message {index} ({messages[index]['role']}) in a way that "
        "does not tell which characters are its content, so it cannot be trained on exactly. "
        "Mend the row, take its role out of `roles_to_train`, or choose another template"
    )

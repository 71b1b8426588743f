"""Which characters of a rendered conversation the model learns to write, for any chat template.

Nothing is assumed of the template; it is asked. The text is rendered again with marks in place of
the wanted messages. What stands around the marks is the template's own; what stands in their place
in the real text is the message, as the template prints it (stripped, say, or without its thinking).
The answer counts only if both renderings agree everywhere else; otherwise the row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from regrow.tasks.prepare.example import Conversation, RowError
from regrow.tasks.prepare.rendering import ChatTemplate

Span = tuple[int, int]
"""[first, last) character."""

# Private-use characters (Unicode, chapter 23.5): no template and hardly any text holds them.
_OPEN, _CLOSE = "\ue0f1", "\ue0f2"


@dataclass(frozen=True)
class MaskRules:
    """What is trained besides the messages themselves."""

    train_on_inputs: bool = False
    """Everything is."""
    train_on_eos: str = "turn"
    """turn: the eos token that ends a trained message; all: that ends any; last: that ends the last
    message of the conversation; none."""
    train_on_eot: str = "turn"
    """The same for other tokens that end a message."""
    eot_tokens: tuple[str, ...] = ()
    """The tokens that end a message; empty: any special token found there."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: list[Span]
    """Trained characters, in order."""
    answer: Span | None
    """The last trained message: what is before it is a prompt for generation."""
    unended: int = 0
    """Messages whose ending token was wanted and not found."""


@dataclass
class Masker:
    """Renders conversations and finds what is trained in them.

    Args:
        eos: the tokenizer's eos token.
        specials: texts of the tokenizer's special tokens.
    """

    template: ChatTemplate
    rules: MaskRules
    eos: str | None
    specials: Collection[str]
    _ends: set[str] = field(init=False)
    _end_lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        given = set(self.rules.eot_tokens)
        ends = given or set(self.specials) - _starters(self.template, self.specials)
        self._ends = ends | ({self.eos} if self.eos else set())
        # Longest first: one token may begin with another.
        self._end_lengths = sorted({len(end) for end in self._ends}, reverse=True)

    def render(self, conversation: Conversation) -> Rendered:
        """The text and its trained spans.

        Raises:
            RowError: when the template refuses the conversation, or the exact place of a trained
                message in the text cannot be told.
        """
        messages, rules = conversation.messages, self.rules
        modes = {rules.train_on_eos, rules.train_on_eot}
        wanted = {i for i, trained in enumerate(conversation.trained) if trained}
        wanted |= set(range(len(messages))) if "all" in modes else set()
        wanted |= {len(messages) - 1} if "last" in modes and messages else set()
        text, places = locate(self.template, messages, sorted(wanted), conversation.tools)
        spans: list[Span] = []
        unended = 0
        for index, (start, stop) in sorted(places.items()):
            trained = conversation.trained[index]
            after, found = self._after(text, stop, trained, index == len(messages) - 1)
            unended += trained and not found
            if trained or after > stop:
                spans.append((start if trained else stop, after))
        answers = [places[i] for i in sorted(places) if conversation.trained[i]]
        if rules.train_on_inputs:
            spans = [(0, len(text))]
        return Rendered(text, spans, answers[-1] if answers else None, unended)

    def _after(self, text: str, stop: int, trained: bool, last: bool) -> tuple[int, bool]:
        """Where training ends after a message that ends at `stop`, and whether an end was found."""
        wants = {"turn": trained, "all": True, "last": last, "none": False}
        begin, is_eos = _after_space(text, stop), False
        found = {self.rules.train_on_eos, self.rules.train_on_eot} == {"none"}
        # Some templates close an answer with one token and the turn with another, the eos.
        while not is_eos and (length := self._end_at(text, begin)):
            found, is_eos = True, text[begin : begin + length] == self.eos
            if not wants[self.rules.train_on_eos if is_eos else self.rules.train_on_eot]:
                break
            begin = stop = begin + length
        return stop, found

    def _end_at(self, text: str, at: int) -> int:
        """Length of the end token that stands there; 0 for none."""
        return next((n for n in self._end_lengths if text[at : at + n] in self._ends), 0)


def locate(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    wanted: Sequence[int],
    tools: Sequence[Any] | None = None,
) -> tuple[str, dict[int, Span]]:
    """The rendered text, and where in it the content of each wanted message stands.

    A message that the template leaves out has no entry.

    Raises:
        RowError: when the template refuses the conversation or a place cannot be told exactly.
    """
    text = template.render(messages, tools)
    marks = _marks(text, wanted)
    places = _all_at_once(template, messages, marks, tools, text)
    if places is None:
        found = {i: _one(template, messages, i, marks[i], tools, text) for i in wanted}
        places = {i: span for i, span in found.items() if span is not None}
    _check_order(places)
    return text, places


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _starters(template: ChatTemplate, specials: Collection[str]) -> set[str]:
    """Special tokens with which the template begins an answer: they cannot be its end."""
    question = [{"role": "user", "content": "?"}]
    try:
        without, with_prompt = template.render(question), template.render(question, None, True)
    except RowError:
        return set()
    return {token for token in specials if token in with_prompt.removeprefix(without)}


def _marks(text: str, wanted: Sequence[int]) -> dict[int, str]:
    opening = _OPEN
    while opening in text:
        opening += _OPEN
    return {index: f"{opening}{index}{_CLOSE}" for index in wanted}


def _probe(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """A plain message in place of one: what else it holds (tool calls, thinking) is its content."""
    return {"role": message["role"], "content": mark}


def _all_at_once(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    marks: Mapping[int, str],
    tools: Sequence[Any] | None,
    text: str,
) -> dict[int, Span] | None:
    """The places when every message is printed as it is or stripped; None when not."""
    probes = [_probe(m, marks[i]) if i in marks else m for i, m in enumerate(messages)]
    try:
        skeleton = template.render(probes, tools)
    except RowError:
        return None
    index_of = {mark: index for index, mark in marks.items()}
    pieces = (
        re.split("(" + "|".join(map(re.escape, index_of)) + ")", skeleton) if marks else [skeleton]
    )
    places: dict[int, Span] = {}
    at = len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    for mark, literal in zip(pieces[1::2], pieces[2::2], strict=True):
        index = index_of[mark]
        length = _fits(text, at, messages[index]["content"], literal)
        if length is None or index in places:
            return None
        places[index] = (at, at + length)
        at += length + len(literal)
    return places if at == len(text) else None


def _fits(text: str, at: int, content: str, literal: str) -> int | None:
    """The length of that form of `content` which stands at `at`, with `literal` behind it."""
    for form in (content, content.strip(), content.rstrip(), content.lstrip()):
        if text.startswith(form, at) and text.startswith(literal, at + len(form)):
            return len(form)
    return None


def _one(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    index: int,
    mark: str,
    tools: Sequence[Any] | None,
    text: str,
) -> Span | None:
    """The place of one message, between what stands before and behind a mark put in its place."""
    before, after = list(messages[:index]), list(messages[index + 1 :])
    probed = _render_or_none(template, [*before, _probe(messages[index], mark), *after], tools)
    if text in (probed, _render_or_none(template, [*before, *after], tools)):
        return None
    prefix, _, suffix = (probed or "").partition(mark)
    start = len(prefix) if probed and text.startswith(prefix) else None
    if start is None:
        # The template writes the head of this message in another way than that of a plain one.
        prompt = _render_or_none(template, before, tools, add_generation_prompt=True)
        start = len(prompt) if prompt and text.startswith(prompt) else None
    stop = len(text) - len(suffix)
    exact = probed is not None and probed.count(mark) == 1 and text.endswith(suffix)
    if start is None or not exact or stop < start:
        raise RowError(
            f"the chat template prints message {index} ({messages[index]['role']}) in a way that "
            "does not tell which characters are its content, so it cannot be trained on exactly. "
            "Mend the row, take its role out of `roles_to_train`, or choose another template"
        )
    return start, stop


def _render_or_none(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    add_generation_prompt: bool = False,
) -> str | None:
    try:
        return template.render(messages, tools, add_generation_prompt)
    except RowError:
        return None


def _check_order(places: Mapping[int, Span]) -> None:
    spans = sorted(places.values())
    if any(first[1] > second[0] for first, second in pairwise(spans)):
        raise RowError("the chat template prints two messages one inside the other")

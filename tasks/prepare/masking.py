"""Which characters of a rendered conversation the model learns to write, for any chat template.

The text of each trained message as the template prints it (stripped, say, or with its thinking and
its tool calls), and the tokens that end it. What the template writes itself (heads of turns, a
system prompt of its own, an empty frame for thinking) is not learnt, but for white space before an
answer that is not in the prompt for it, and white space between a message and a learnt end: the
model has to write these to come to the answer and to its end.
An empty message teaches nothing, not even its end, as in Axolotl.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from regrow.tasks.prepare.endings import Ending, Endings
from regrow.tasks.prepare.example import Conversation, RowError
from regrow.tasks.prepare.locating import Located, Locator
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.skeleton import Span
from regrow.tasks.prepare.toolcalls import CallForm
from regrow.tasks.stage import StageError

_Messages = Sequence[Mapping[str, Any]]
_ALWAYS = ("role", "content")


@dataclass(frozen=True)
class MaskRules:
    """What is trained besides the messages themselves."""

    train_on_eos: str = "turn"
    """turn: the eos token that ends a trained message; all: that ends any; last: only the last of
    those (of trained messages, if neither rule is `all`); none."""
    train_on_eot: str = "turn"
    """The same for other tokens that end a message; the eos token is one of them unless
    `eot_tokens` leaves it out, and is then trained when either rule wants it."""
    eot_tokens: tuple[str, ...] = ()
    """The tokens that end a message; empty: see `Endings`."""
    chat_template_kwargs: str = "{}"
    """JSON object of further variables for the template."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: list[Span]
    """Trained characters, in order. A token that holds one of them is learnt."""
    answer: Span | None
    """The last trained message: what is before it is a prompt for generation."""
    unended: int = 0
    """Messages whose ending token was wanted and not found."""
    barred: list[Span] = dataclasses.field(default_factory=list)
    """Characters that the data says are not to be learnt: a token that holds one of them is not,
    whatever else it holds."""


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
    _locator: Locator = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.template = self.template.given(json.loads(self.rules.chat_template_kwargs))
        self._endings = Endings(self.template, self.eos, self.specials, self.rules.eot_tokens)
        self._locator = Locator(self.template, self._endings)
        self._modes = {self.rules.train_on_eos, self.rules.train_on_eot}
        self._ends_known: dict[tuple[Ending, bool], tuple[int, tuple[Span, ...]]] = {}

    def render(self, conversation: Conversation) -> Rendered:
        """The text and its trained spans.

        Raises:
            RowError: when the template refuses the conversation, or the exact place of a trained
                message in the text cannot be told.
        """
        messages = [self._prepared(m, i) for i, m in enumerate(conversation.messages)]
        trained = [i for i, flag in enumerate(conversation.trained) if flag]
        wanted = range(len(messages)) if "all" in self._modes else trained
        located = self._locator.locate(messages, wanted, conversation.tools)
        spans, unended = self._spans(located, wanted, conversation)
        barred: list[Span] = []
        if conversation.details:
            spans, barred = _detailed(located, messages, spans, conversation)
        answer = next((located.places[i] for i in reversed(trained) if i in located.places), None)
        return Rendered(located.text, spans, answer, unended, barred)

    def _prepared(self, message: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        """The message without properties that the template does not name, as Axolotl gives it."""
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            _refuse_images(content, number)
        if len(message) > 2:
            if "tool_calls" in message:
                message = self._call_form.apply(message, number)
            message = {k: v for k, v in message.items() if k in _ALWAYS or self._names(k)}
        return message

    def _names(self, name: str) -> bool:
        return name in self.template.text

    @cached_property
    def _call_form(self) -> CallForm:
        return CallForm.of(self.template)

    def _spans(
        self, located: Located, wanted: Sequence[int], conversation: Conversation
    ) -> tuple[list[Span], int]:
        """Trained characters, and how many trained messages have no end."""
        spans: list[Span] = []
        unended = 0
        last: dict[str, Span] = {}
        for index in wanted:
            start, stop = located.places.get(index, (0, 0))
            if start == stop:
                continue
            trained, ending = conversation.trained[index], located.endings[index]
            reach, tokens = self._learnt_ends(ending, trained)
            if trained:
                gap = self._endings.gap
                if gap and conversation.messages[index]["role"] == "assistant":
                    start -= len(gap) * located.text.endswith(gap, 0, start)
                spans.append((start, stop + reach))
                unended += ending.first is None and self._modes != {"none"}
            spans += [(stop + begin, stop + end) for begin, end in tokens]
            if "last" in self._modes:
                last |= {kind: _moved(span, stop) for kind, span in ending.kinds()}
        for kind, mode in self._rules:
            if mode == "last" and kind in last:
                spans = _with_token(spans, last[kind], located.text)
        return spans, unended

    def _learnt_ends(self, ending: Ending, trained: bool) -> tuple[int, tuple[Span, ...]]:
        """How far training goes on behind a message, and further tokens that are learnt."""
        known = self._ends_known.get((ending, trained))
        if known is None:
            self._refuse_two_rules(ending)
            wants = {"turn": trained, "all": True, "last": False, "none": False}
            modes = dict(self._rules)
            spans = sorted({span for kind, span in ending.kinds() if wants[modes[kind]]})
            reaches = bool(spans) and trained and spans[0] == ending.first
            known = (spans[0][1], tuple(spans[1:])) if reaches else (0, tuple(spans))
            self._ends_known[ending, trained] = known
        return known

    def _refuse_two_rules(self, ending: Ending) -> None:
        if ending.eot and ending.eot == ending.eos and len(self._modes) > 1:
            raise StageError(
                f"train_on_eot: {self.rules.train_on_eot}, and train_on_eos: "
                f"{self.rules.train_on_eos}, but {self.eos!r} is both the eos token and what ends "
                "a turn. Set both alike, or name other `eot_tokens`"
            )

    @property
    def _rules(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return ("eot", self.rules.train_on_eot), ("eos", self.rules.train_on_eos)


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _with_token(spans: Sequence[Span], token: Span, text: str) -> list[Span]:
    """The spans and a token, with the white space between it and the span before it."""
    if any(start <= token[0] and token[1] <= stop for start, stop in spans):
        return list(spans)
    before = [span for span in spans if span[1] <= token[0]]
    if before and not text[before[-1][1] : token[0]].strip():
        token = before.pop()[0], token[1]
    return [*before, token, *(span for span in spans if span[0] >= token[1])]


def _refuse_images(content: Sequence[Any], number: int) -> None:
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise RowError(
                f"message {number} has a part of type {kind!r}; only text can be trained on. "
                "Leave such rows out"
            )


def _detailed(
    located: Located, messages: _Messages, spans: Sequence[Span], conversation: Conversation
) -> tuple[list[Span], list[Span]]:
    """The spans with only the learnt characters of messages that have details, and the others."""
    learnt, barred = list(spans), []
    for index, properties in conversation.details.items():
        if index not in located.places or not conversation.trained[index]:
            continue
        start, stop = located.places[index]
        holder = next(i for i, span in enumerate(learnt) if span[0] <= start and stop <= span[1])
        inside: list[Span] = []
        for name, ranges in properties.items():
            inside += _printed(located, messages, (index, name), ranges)
        end = [(stop, learnt[holder][1])] if learnt[holder][1] > stop else []
        learnt[holder : holder + 1] = sorted(inside) + end
        barred += _between(sorted(inside), (start, stop))
    return learnt, barred


def _printed(
    located: Located,
    messages: _Messages,
    key: tuple[int, str],
    ranges: Sequence[Span],
) -> list[Span]:
    """Ranges of a property's characters as places in the text."""
    index, name = key
    field = located.field(messages[index], index, name)
    if field is None:
        raise RowError(
            f"the chat template does not print {name!r} of message {index} as it is, so single "
            "characters of it cannot be found (`message_field_training_detail`)"
        )
    begin, cut, length = field
    content = messages[index][name]
    spans = []
    for start, stop in ranges:
        start, stop = _at_word(content, start), _at_word(content, stop)
        first, last = max(start - cut, 0), min(stop - cut, length)
        if first < last:
            spans.append((begin + first, begin + last))
    return spans


def _at_word(text: str, edge: int) -> int:
    """The edge moved before the space of a word: tokenizers make one token of the two, so that the
    space follows the word. Digits are often tokens of their own."""
    word = edge < len(text) and not text[edge].isspace() and not text[edge].isdigit()
    return edge - 1 if word and text[edge - 1 : edge] == " " else edge


def _between(spans: Sequence[Span], within: Span) -> list[Span]:
    """What the spans leave of a place."""
    edges = [within[0], *(edge for span in spans for edge in span), within[1]]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

"""Which tokens end a message, and where they stand behind one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tokenizers import Tokenizer

from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.skeleton import Span, mark_for
from regrow.tasks.stage import StageError

_MAX_KNOWN = 4096
"""Literals whose endings are kept."""
_MAX_LITERAL = 1000
"""Longest of them in characters; longer ones hold texts of the row."""


@dataclass(frozen=True)
class Ending:
    """The tokens that end a message, counted from its end; `eot` and `eos` may be one token."""

    eot: Span | None = None
    eos: Span | None = None
    settled: bool = True
    """Whether more text behind what was searched could not change the answer."""

    @property
    def first(self) -> Span | None:
        """The token that comes first."""
        return min((span for _, span in self.kinds()), default=None)

    def kinds(self) -> list[tuple[str, Span]]:
        """(`eot` or `eos`, its place) of those that are there."""
        both = ("eot", self.eot), ("eos", self.eos)
        return [(kind, span) for kind, span in both if span is not None]


class Endings:
    """Finds the tokens that end messages of one template.

    Without `eot_tokens` (Axolotl then knows the eos token only, and trains no end at all where the
    template uses another, as Gemma's does) an answer is ended by any special token behind it that
    does not begin a turn; another message by the token that ends a plain answer.

    Args:
        template: the chat template.
        eos: the tokenizer's eos token.
        specials: texts of the tokenizer's special tokens.
        eot_tokens: what the recipe names.
    """

    def __init__(
        self,
        template: ChatTemplate,
        eos: str | None,
        specials: Collection[str],
        eot_tokens: Collection[str],
    ) -> None:
        self._eos = eos
        known = {eos} if eos else set()
        self.specials = set(specials) | known | set(eot_tokens)
        frame = _Frame.of(template)
        self.header, self.gap = frame.header, frame.gap
        starters = {token for token in specials if token in frame.header}
        starters |= _starter(frame, specials)
        behind = set(specials) - starters | known
        plain = _token_at(frame.behind, _after_space(frame.behind, 0), behind)
        self._eot = {"assistant": set(eot_tokens) or behind}
        self._other_eot = set(eot_tokens) or known | ({plain} if plain else set())
        self._longest = max(map(len, self.specials), default=0)
        self._known: dict[tuple[str, str], Ending] = {}

    def behind_literal(self, literal: str, role: str) -> Ending:
        """The ending at the beginning of a text that the template prints behind messages."""
        if len(literal) > _MAX_LITERAL:
            return self.behind(literal, 0, role)
        key = literal, role
        if key not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = self.behind(literal, 0, role)
        return self._known[key]

    def behind(self, text: str, at: int, role: str) -> Ending:
        """The ending of a message of that role whose text stops at `at`.

        White space may stand before each of the two tokens, as Llama 2 (` </s>`) and Phi 3
        (`<|end|>`, a newline, `<|endoftext|>` after the last message) print it.
        """
        ends = self._eot.get(role, self._other_eot)
        begin = _after_space(text, at)
        first = _token_at(text, begin, ends | {self._eos} if self._eos else ends)
        if first is None:
            return Ending(settled=begin + self._longest <= len(text))
        stop = begin + len(first)
        span = begin - at, stop - at
        eot = span if first in ends else None
        if first == self._eos or not self._eos:
            return Ending(eot, span if first == self._eos else None)
        begin = _after_space(text, stop)
        stop = begin + len(self._eos)
        if text.startswith(self._eos, begin):
            return Ending(eot, (begin - at, stop - at))
        return Ending(eot, settled=stop <= len(text))

    def special_at_end(self, text: str) -> str:
        """The special token with which the text ends; empty for none."""
        return max((s for s in self.specials if s and text.endswith(s)), key=len, default="")

    def special_at_start(self, text: str) -> str:
        """The special token with which the text begins; empty for none."""
        return _token_at(text, 0, self.specials) or ""


def check_eot_tokens(eot_tokens: Collection[str], tokenizer: Tokenizer) -> None:
    """Each is one token of the tokenizer.

    Raises:
        StageError: when one is not; it would be split and never be found as an end.
    """
    for token in eot_tokens:
        ids = tokenizer.encode(token, add_special_tokens=False).ids
        if len(ids) != 1:
            raise StageError(
                f"eot_tokens: {token!r} is not one token of the tokenizer, which makes {len(ids)} "
                "of it. Add it with `tokens:`, or name the token that the chat template uses"
            )


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _token_at(text: str, at: int, tokens: Collection[str]) -> str | None:
    """The longest of the tokens that stands there: one may begin with another."""
    found = (token for token in tokens if token and text.startswith(token, at))
    return max(found, key=len, default=None)


@dataclass(frozen=True)
class _Frame:
    """What a template prints around plain messages, asked with a dialogue of marks."""

    header: str = ""
    """What it adds to ask for an answer."""
    gap: str = ""
    """White space between the prompt for an answer and the answer."""
    before: str = ""
    """Before the first message of a user."""
    behind: str = ""
    """Between an answer and the next message of a user."""

    @classmethod
    def of(cls, template: ChatTemplate) -> _Frame:
        """Empty where the template refuses such a dialogue, with and without a system message."""
        return cls._asked(template, []) or cls._asked(template, [_SYSTEM]) or cls()

    @classmethod
    def _asked(cls, template: ChatTemplate, first: list[dict[str, str]]) -> _Frame | None:
        mark = mark_for(template.text)
        user, answer = {"role": "user", "content": mark}, {"role": "assistant", "content": mark}
        asking = [*first, user]
        try:
            asked, prompt = template.render(asking), template.render(asking, None, True)
            pieces = template.render([*asking, answer, user, answer]).split(mark)
        except RowError:
            return None
        if len(pieces) != 5 or prompt.count(mark) != 1:
            return None
        header = prompt.removeprefix(asked) if prompt.startswith(asked) else ""
        gap = pieces[1].removeprefix(prompt.partition(mark)[2])
        gap = gap if gap != pieces[1] and not gap.strip() else ""
        return cls(header, gap, pieces[0], pieces[2])


_SYSTEM = {"role": "system", "content": "?"}


def _starter(frame: _Frame, specials: Collection[str]) -> set[str]:
    """The token that begins a user's message, where it alone parts that from the answer before."""
    found = [token for token in specials if token and token in frame.behind]
    longest = [t for t in found if not any(t != other and t in other for other in found)]
    if len(longest) != 1 or frame.behind.count(longest[0]) != 1:
        return set()
    token = longest[0]
    head = frame.behind[frame.behind.index(token) :]
    return {token} if frame.before.endswith(head) else set()

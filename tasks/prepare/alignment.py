"""Texts to tokens, with the tokens that hold given spans of characters.

A tokenizer's own offsets tell which token holds a character, but cost time and memory. The tokens
of a byte-level tokenizer are the bytes of the text, cut: their lengths alone tell the same. Every
text is checked to be of that kind; where one is not, the offsets are asked.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer

from regrow.tasks.prepare.byte_level import TokenBytes, is_byte_level
from regrow.tasks.prepare.words import Words

Span = tuple[int, int]
"""[first, last) character."""

_BATCH_CHARS = 1 << 17
"""Characters whose tokens are looked through at once: enough that numpy's calls cost nothing."""

_SAMPLE_CHARS = 1000
"""Of one text in a thousand, compared: too few to be felt."""


@dataclass(frozen=True)
class Text:
    """What is to be tokenized, and the characters that are asked for."""

    text: str
    spans: Sequence[Span] = ()
    answer: Span | None = None
    """The place whose first token is wanted."""
    barred: Sequence[Span] = ()
    """A token that holds a character of one of these does not count, whatever else it holds."""


@dataclass(frozen=True)
class Aligned:
    """The tokens of a text, without those that the tokenizer puts before and behind one."""

    ids: np.ndarray
    """int32 [T]."""
    held: np.ndarray
    """uint8 [T]: 1 where the token holds a character of a span."""
    answer: int
    """First token of `Text.answer`; where it would stand when it is empty; 0 without an answer."""


class Aligner:
    """Tokenizes many texts at once.

    Args:
        backend: reports untrimmed offsets (`tokenizer.load_backend`).
    """

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        settings = json.loads(backend.to_str())
        self._bytes = TokenBytes.of(backend) if is_byte_level(settings) else None
        self._words = Words.of(backend, settings) if self._bytes else None

    def __call__(self, texts: Sequence[Text]) -> list[Aligned]:
        """The tokens of each text.

        Raises:
            TypeError, UnicodeEncodeError: when a text holds half a surrogate pair.
        """
        if texts and self._words:
            self._compare(texts[0].text[:_SAMPLE_CHARS])
        return [aligned for batch in _batches(texts) for aligned in self._batch(batch)]

    def _compare(self, text: str) -> None:
        """Every now and then a text is compared with what the tokenizer itself makes of it."""
        tokens = np.frombuffer(self._tokens(text), np.int32).tolist()
        assert tokens == self._encode(text).ids, f"other tokens than the tokenizer's: {text!r}"

    def _batch(self, texts: Sequence[Text]) -> Iterable[Aligned]:
        if self._bytes is None:
            return (_by_offsets(self._encode(text.text), text) for text in texts)
        found = _by_lengths(self._bytes, [self._tokens(t.text) for t in texts], texts)
        return (
            _by_offsets(self._encode(text.text), text) if aligned is None else aligned
            for aligned, text in zip(found, texts, strict=True)
        )

    def _tokens(self, text: str) -> bytes:
        """The tokens of a text as int32."""
        known = self._words(text) if self._words else None
        return np.array(self._encode(text).ids, np.int32).tobytes() if known is None else known

    def _encode(self, text: str) -> Encoding:
        # One text at a time: of several the tokenizer makes threads, and parallel work is done by
        # processes (1.12 against 0.94 M tokens/s on two cores; measured, platform.md part E).
        return self.backend.encode(text, add_special_tokens=False)


def _batches(texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
    begin = chars = 0
    for index, text in enumerate(texts):
        chars += len(text.text)
        if chars >= _BATCH_CHARS:
            yield texts[begin : index + 1]
            begin, chars = index + 1, 0
    if begin < len(texts):
        yield texts[begin:]


def _by_lengths(
    known: TokenBytes, rows: Sequence[bytes], texts: Sequence[Text]
) -> list[Aligned | None]:
    """Each text's tokens; None where they are not the text's bytes.

    All texts are treated as one, the bytes of which are numbered through.
    """
    ids = np.frombuffer(b"".join(rows), np.int32)
    counts = np.fromiter(map(len, rows), np.int64, len(rows)) // ids.itemsize
    last = np.cumsum(counts)
    lengths = known.lengths[ids]
    edges = np.concatenate([[0], np.cumsum(lengths)])
    starts, ends = edges[:-1], edges[1:]
    base, stop = edges[last - counts], edges[last]
    fits = [
        known.fits(text.text, row, total)
        for text, row, total in zip(texts, rows, (stop - base).tolist(), strict=True)
    ]
    asked = _Asked()
    for text, begin, fit in zip(texts, base.tolist(), fits, strict=True):
        if fit:
            asked.add(text, begin)
    held = _held(_table(asked.spans), starts, ends)
    if asked.barred:
        held &= ~_held(_table(asked.barred), starts, ends)
    held = held.view(np.uint8)
    first = iter(_first(_table(asked.answers), starts, ends).tolist())
    return [
        Aligned(
            ids[begin:end], held[begin:end], next(first) - begin if text.answer is not None else 0
        )
        if fit
        else None
        for text, begin, end, fit in zip(
            texts, (last - counts).tolist(), last.tolist(), fits, strict=True
        )
    ]


class _Asked:
    """Spans and answers of several texts, in bytes from the first text's first."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.barred: list[Span] = []
        self.answers: list[Span] = []

    def add(self, text: Text, begin: int) -> None:
        answer = [] if text.answer is None else [text.answer]
        places = [*text.spans, *text.barred, *answer]
        if not text.text.isascii():
            places = _in_bytes(text.text, places)
        moved = iter([(begin + start, begin + stop) for start, stop in places])
        self.spans += _filled(itertools.islice(moved, len(text.spans)))
        self.barred += _filled(itertools.islice(moved, len(text.barred)))
        self.answers += moved


def _filled(spans: Iterable[Span]) -> list[Span]:
    return [(start, stop) for start, stop in spans if start < stop]


def _table(spans: Sequence[Span]) -> np.ndarray:
    return np.array(spans, np.int64).reshape(-1, 2)


def _in_bytes(text: str, places: Sequence[Span]) -> list[Span]:
    chars = sorted({char for place in places for char in place})
    parts = [text[begin:end] for begin, end in itertools.pairwise([0, *chars])]
    sizes = itertools.accumulate(len(part.encode()) for part in parts)
    at = dict(zip(chars, sizes, strict=True))
    return [(at[start], at[stop]) for start, stop in places]


def _held(spans: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool [tokens]: which tokens hold a byte of a span."""
    first = np.searchsorted(ends, spans[:, 0], "right")
    stop = np.searchsorted(starts, spans[:, 1], "left")
    change = np.bincount(first, minlength=len(ends) + 1).astype(np.int64)
    change -= np.bincount(stop, minlength=len(ends) + 1)
    return np.cumsum(change[:-1]) > 0


def _first(spans: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [spans]: the first token that holds a byte of each; of an empty one the next token."""
    empty = spans[:, 0] == spans[:, 1]
    within = np.searchsorted(ends, spans[:, 0], "right")
    return np.where(empty, np.searchsorted(starts, spans[:, 1], "left"), within)


def _by_offsets(encoding: Encoding, text: Text) -> Aligned:
    held = np.zeros(len(encoding.ids), np.uint8)
    for spans, value in ((text.spans, 1), (text.barred, 0)):
        for span in spans:
            first, stop = token_range(encoding, span)
            held[first:stop] = value
    answer = token_range(encoding, text.answer)[0] if text.answer is not None else 0
    return Aligned(np.array(encoding.ids, np.int32), held, answer)


def token_range(encoding: Encoding, span: Span) -> tuple[int, int]:
    """[first, last) token that holds a character of the span.

    A token that reaches over the edge (the space a template puts before an answer, say) counts: the
    model has to write it to write the character.
    """
    start, stop = span
    first = next(
        (t for c in range(start, stop) if (t := encoding.char_to_token(c)) is not None), None
    )
    if first is None:
        # Nothing of the span became a token: an empty range, where its tokens would have been.
        begin = _first_at(encoding, stop)
        return begin, begin
    chars = range(stop - 1, start - 1, -1)
    last = next(t for c in chars if (t := encoding.char_to_token(c)) is not None)
    # Further tokens of the same character: one character may take several.
    while last + 1 < len(encoding.ids) and _begins_before(encoding, last + 1, stop):
        last += 1
    return first, last + 1


def _begins_before(encoding: Encoding, token: int, stop: int) -> bool:
    chars = encoding.token_to_chars(token)
    return chars is not None and chars[0] < stop


def _first_at(encoding: Encoding, char: int) -> int:
    for token, (begin, end) in enumerate(encoding.offsets):
        if begin >= char and end > begin:
            return token
    return len(encoding.ids)

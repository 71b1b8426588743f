"""A few prepared examples to look at, trained tokens coloured: as a web page and in a terminal."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from regrow.tasks.modeling.rows import PackedRows, Row

_PAGE_EXAMPLES = 20  # a page that opens at once, and enough to see every kind of row
_PAGE_TOKENS = 4096  # of one example

_TRAINED, _GIVEN, _HEAD, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"

# Data must not steer the terminal: all control characters but tab and line feed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Prepared examples</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 1rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886; border-radius: 6px;
  padding: .8rem; color: #777 }}
mark {{ background: #2e7d3233; color: light-dark(#1b5e20, #a5d6a7) }}
</style></head><body>
<h1>Prepared examples</h1>
<p>What the model reads, token for token: <mark>coloured text</mark> is learnt, the rest given.</p>
{examples}
</body></html>
"""


@dataclass(frozen=True)
class _Sequence:
    """What the model reads at once."""

    ids: np.ndarray
    mask: np.ndarray
    heading: str = ""
    """What it is beside another; empty when it is alone."""

    @property
    def counts(self) -> str:
        """Its tokens, in words."""
        return f"{len(self.ids)} tokens, {int(self.mask.sum())} learnt"


@dataclass(frozen=True)
class _Example:
    """An item, and what is known of it beside its tokens."""

    sequences: tuple[_Sequence, ...]
    label: str = ""
    extra: str = ""

    def title(self, number: int) -> str:
        """Its heading."""
        pair = len(self.sequences) > 1
        told = "a pair of answers" if pair else self.sequences[0].counts
        return f"Example {number + 1}: {told}{self.label}"


def write_preview(prepared: Path, split: str = "train") -> None:
    """Write `preview.html` into a prepared artifact: the first examples of a split."""
    decode = _Decoder(prepared)
    sections = []
    for number, example in enumerate(_examples(prepared, split, _PAGE_EXAMPLES)):
        parts = [f"<h2>{html.escape(example.title(number))}</h2>"]
        for sequence in example.sequences:
            if sequence.heading:
                parts.append(f"<h3>{sequence.heading}: {sequence.counts}</h3>")
            runs = "".join(
                f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text)
                for text, trained in decode(sequence)
            )
            parts.append(f"<pre>{runs}</pre>")
        if example.extra:
            parts.append(f"<pre>{html.escape(example.extra)}</pre>")
        sections.append("\n".join(parts))
    page = _PAGE.format(examples="\n".join(sections))
    (prepared / "preview.html").write_text(page, encoding="utf-8")


def show(prepared_dir: Path, n: int, split: str = "train") -> str:
    """The first `n` examples of a split for a terminal: trained tokens green, the rest dim."""
    decode = _Decoder(prepared_dir)
    shown = []
    for number, example in enumerate(_examples(prepared_dir, split, n)):
        lines = [f"{_HEAD}{example.title(number)}{_RESET}"]
        for sequence in example.sequences:
            if sequence.heading:
                lines.append(f"{_HEAD}{sequence.heading}: {sequence.counts}{_RESET}")
            runs = decode(sequence)
            lines.append(
                "".join(f"{_TRAINED if on else _GIVEN}{_safe(t)}{_RESET}" for t, on in runs)
            )
        if example.extra:
            lines.append(f"{_GIVEN}{_safe(example.extra)}{_RESET}")
        shown.append("\n".join(lines) + "\n")
    return "\n".join(shown)


def _safe(text: str) -> str:
    return _CONTROL.sub("�", text)


class _Decoder:
    """Makes runs of equally masked text of a sequence."""

    def __init__(self, prepared: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))

    def __call__(self, sequence: _Sequence) -> list[tuple[str, bool]]:
        ids, mask = sequence.ids[:_PAGE_TOKENS], sequence.mask[:_PAGE_TOKENS]
        # Runs, since one token alone may be part of a character.
        edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
        return [
            (self._tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False), bool(mask[a]))
            for a, b in itertools.pairwise(edges)
        ]


def _examples(prepared: Path, split: str, count: int) -> Iterator[_Example]:
    rows = PackedRows(prepared, split)
    every = (example for number in range(len(rows)) for example in _of_row(rows[number], rows.kind))
    return itertools.islice(every, count)


def _of_row(row: Row, kind: str) -> Iterator[_Example]:
    ends = np.cumsum(row.seq_lens)[:-1]
    parts = zip(np.split(row.input_ids, ends), np.split(row.loss_mask, ends), strict=True)
    sequences = [_Sequence(*part) for part in parts]
    if kind == "preference":
        for better, worse in zip(sequences[::2], sequences[1::2], strict=True):
            pair = (_named(better, "chosen"), _named(worse, "rejected"))
            yield _Example(pair)
    elif kind == "prompts":
        for sequence, extra in zip(sequences, row.extra or (), strict=True):
            yield _Example((sequence,), extra=extra)
    else:
        for sequence, label in zip(sequences, _labels(row, sequences, kind), strict=True):
            yield _Example((sequence,), label)


def _named(sequence: _Sequence, heading: str) -> _Sequence:
    return _Sequence(sequence.ids, sequence.mask, heading)


def _labels(row: Row, sequences: Sequence[_Sequence], kind: str) -> list[str]:
    """What the labels of each sequence say, in words."""
    if row.labels is None:
        return [""] * len(sequences)
    if kind == "unpaired":
        return [", desirable" if label else ", undesirable" for label in row.labels.tolist()]
    ends = np.cumsum([int(sequence.mask.sum()) for sequence in sequences])[:-1]
    words = [
        ["right" if label else "wrong" for label in its.tolist()]
        for its in np.split(row.labels, ends)
    ]
    return [f", steps: {', '.join(its)}" for its in words]

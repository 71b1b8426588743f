"""A few prepared examples to look at, trained tokens coloured: as a web page and in a terminal."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from regrow.tasks.modeling.rows import PackedRows

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


def write_preview(prepared: Path, split: str = "train") -> None:
    """Write `preview.html` into a prepared artifact: the first examples of a split."""
    sections = []
    for number, (ids, mask, text) in enumerate(_examples(prepared, split, _PAGE_EXAMPLES)):
        parts = "".join(
            f"<mark>{html.escape(part)}</mark>" if trained else html.escape(part)
            for part, trained in text
        )
        sections.append(f"<h2>{_title(number, ids, mask)}</h2>\n<pre>{parts}</pre>")
    page = _PAGE.format(examples="\n".join(sections))
    (prepared / "preview.html").write_text(page, encoding="utf-8")


def show(prepared_dir: Path, n: int, split: str = "train") -> str:
    """The first `n` examples of a split for a terminal: trained tokens green, the rest dim."""
    shown = []
    for number, (ids, mask, text) in enumerate(_examples(prepared_dir, split, n)):
        parts = "".join(
            f"{_TRAINED if on else _GIVEN}{_CONTROL.sub('�', part)}{_RESET}" for part, on in text
        )
        shown.append(f"{_HEAD}{_title(number, ids, mask)}{_RESET}\n{parts}\n")
    return "\n".join(shown)


def _title(number: int, ids: np.ndarray, mask: np.ndarray) -> str:
    return f"Example {number + 1}: {len(ids)} tokens, {int(mask.sum())} learnt"


def _examples(
    prepared: Path, split: str, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, list[tuple[str, bool]]]]:
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    for ids, mask in itertools.islice(_unpacked(PackedRows(prepared, split)), count):
        yield ids, mask, _runs(tokenizer, ids[:_PAGE_TOKENS], mask[:_PAGE_TOKENS])


def _unpacked(rows: PackedRows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for index in range(len(rows)):
        row = rows[index]
        ends = np.cumsum(row.seq_lens)[:-1]
        yield from zip(np.split(row.input_ids, ends), np.split(row.loss_mask, ends), strict=True)


def _runs(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray) -> list[tuple[str, bool]]:
    """The text in runs of equally masked tokens: one token alone may be part of a character."""
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    return [
        (tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False), bool(mask[a]))
        for a, b in itertools.pairwise(edges)
    ]

"""One chunk of a source file to a block of tokens: what a worker process does.

Imports neither torch nor Transformers, so that a process starts in a moment.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from regrow.tasks.prepare.alignment import Aligner
from regrow.tasks.prepare.encoding import Encoder, Tokens
from regrow.tasks.prepare.example import Item, Pieces, RowError
from regrow.tasks.prepare.formats.registry import FORMATS, kind_of
from regrow.tasks.prepare.localize import LocalFile
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.mistral import MistralEncoder
from regrow.tasks.prepare.readers import Chunk, read_rows
from regrow.tasks.prepare.tokenizer import SavedTokenizer, load_backend
from regrow.tasks.stage import StageError

_ROWS = 1024
"""Rows read before they are tokenized: a chunk of a Parquet file may hold many more."""


@dataclass(frozen=True)
class RowEncoding:
    """How the rows of one dataset become tokens."""

    format: str
    options: Any
    """The format's `Options`."""
    rules: MaskRules
    template: str | None
    tokenizer: SavedTokenizer
    on_bad_rows: str = "raise"
    """raise or drop."""


@dataclass(frozen=True)
class ChunkTask:
    """The rows of one chunk whose number is in [low, high)."""

    encoding: RowEncoding
    file: LocalFile
    chunk: Chunk
    low: int
    high: int


@dataclass(frozen=True)
class Block:
    """The items of a chunk, one after the other."""

    input_ids: np.ndarray
    """int32 [tokens]."""
    loss_mask: np.ndarray
    """uint8 [tokens]."""
    seq_lens: np.ndarray
    """int32 [sequences]: tokens of each."""
    sequences: np.ndarray
    """int32 [items]: sequences of each."""
    labels: np.ndarray
    """uint8 [labels], of all items."""
    label_counts: np.ndarray
    """int32 [items]: labels of each."""
    extra: list[str | None]
    """[items]."""
    supervised: np.ndarray
    """int32 [items]: ones in the mask of each."""
    prompt_lens: np.ndarray
    """int32 [items]: tokens before the last trained message of its first sequence."""
    digests: np.ndarray
    """uint64 [items]: of all of the above. Equal items have equal digests."""
    unended: int
    refused: Counter[str] = field(default_factory=Counter)
    """Why rows were dropped -> how many: see `reason_of`."""

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class _Encoded:
    """An item with the tokens of its sequences."""

    item: Item
    sequences: list[Tokens]


def encode_chunk(task: ChunkTask) -> Block:
    """The block of a chunk.

    Raises:
        StageError: for a row that cannot be used, naming the file and the row; unless such rows
            are to be dropped.
    """
    encoding = task.encoding
    kind = kind_of(encoding.format)
    encoder = _encoder(encoding.tokenizer, encoding.template, encoding.rules)
    bad = _BadRows(task)
    items = _items(task, bad)
    done: list[_Encoded] = []
    while some := list(islice(items, _ROWS)):
        done += _encode_good(some, encoder, kind, bad)
    return _block(done, bad.dropped)


class _BadRows:
    """What is done with rows that the format or the template refuses."""

    def __init__(self, task: ChunkTask) -> None:
        self._task = task
        self.dropped: Counter[str] = Counter()

    def add(self, number: int, error: RowError) -> None:
        """Count the row. Raises StageError where such rows are not to be dropped."""
        if self._task.encoding.on_bad_rows == "raise":
            raise StageError(f"{self._task.file.where(number)}: {error}") from error
        self.dropped[reason_of(error)] += 1


_OF_THE_ROW = re.compile(r"(?<=\w )\d+\b|, not (?:'.*'|\".*\")$|'[^']{40,}'", re.DOTALL)

_LONGEST_REASON = 300


def reason_of(error: RowError) -> str:
    """An error without what is peculiar to its row, so that there are few reasons for many rows."""
    general = _OF_THE_ROW.sub(lambda at: "" if at[0].startswith(",") else "...", str(error))
    return general[:_LONGEST_REASON]


@lru_cache(maxsize=64)  # a process meets the chunks of many datasets in turn
def _encoder(
    tokenizer: SavedTokenizer, template: str | None, rules: MaskRules
) -> Encoder | MistralEncoder:
    if tokenizer.tekken is not None:
        return MistralEncoder(tokenizer, rules)
    return Encoder(tokenizer, template, rules, _aligner(tokenizer.path))


@lru_cache(maxsize=1)
def _aligner(path: str) -> Aligner:
    """The tokenizer of a stage, which takes some tenths of a second and 50 MB and more to load."""
    return Aligner(load_backend(path))


def _items(task: ChunkTask, bad: _BadRows) -> Iterator[tuple[int, Item]]:
    read, options = FORMATS[task.encoding.format].read, task.encoding.options
    for number, row in read_rows(task.file, task.chunk, task.low, task.high):
        try:
            found = read(row, options)
        except RowError as error:
            bad.add(number, error)
        except RecursionError:
            bad.add(number, RowError("its values are nested too deeply; mend the row"))
        else:
            yield number, found if isinstance(found, Item) else Item((found,))


def _encode_good(
    numbered: Sequence[tuple[int, Item]],
    encoder: Encoder | MistralEncoder,
    kind: str,
    bad: _BadRows,
) -> list[_Encoded]:
    """Many at once; where one of them is refused, one half after the other until it is found."""
    try:
        return _encode([item for _, item in numbered], encoder, kind)
    except RowError as error:
        if len(numbered) == 1:
            bad.add(numbered[0][0], error)
            return []
    middle = len(numbered) // 2
    halves = numbered[:middle], numbered[middle:]
    return [each for half in halves for each in _encode_good(half, encoder, kind, bad)]


def _encode(items: Sequence[Item], encoder: Encoder | MistralEncoder, kind: str) -> list[_Encoded]:
    tokens = iter(encoder.encode_many([source for item in items for source in item.sequences]))
    encoded = [_Encoded(item, list(islice(tokens, len(item.sequences)))) for item in items]
    if kind == "steps":
        encoded = [_of_kept_steps(each) for each in encoded]
    for each in encoded:
        _check_labels(each, kind)
    if kind == "preference":
        encoded = [_Encoded(each.item, _from_one_context(each.sequences)) for each in encoded]
    return encoded


def _of_kept_steps(encoded: _Encoded) -> _Encoded:
    """Without the labels of steps that a limit has cut off."""
    source = encoded.item.sequences[0]
    if not isinstance(source, Pieces) or source.answer_limit is None:
        return encoded
    kept = int(encoded.sequences[0].loss_mask.sum())
    return replace(encoded, item=replace(encoded.item, labels=encoded.item.labels[:kept]))


def _from_one_context(pair: list[Tokens]) -> list[Tokens]:
    """Both answers learnt from where the first of them begins.

    Where the tokenizer joined the end of the prompt to one answer, the other is learnt from that
    token on too: else the probabilities of the two would be given different beginnings (as in TRL).
    """
    shared = min(tokens.prompt_len for tokens in pair)
    for tokens in pair:
        tokens.loss_mask[max(shared, 1) : tokens.prompt_len] = 1
    return [replace(tokens, prompt_len=shared) for tokens in pair]


_SEQUENCES = {"preference": 2}
"""Of an item of each kind; one for the others."""


def _check_labels(encoded: _Encoded, kind: str) -> None:
    item, sequences = encoded.item, _SEQUENCES.get(kind, 1)
    if len(item.sequences) != sequences:
        raise RowError(f"it gives {len(item.sequences)} sequences where {kind} has {sequences}")
    if kind == "steps":
        wanted = int(encoded.sequences[0].loss_mask.sum())
    else:
        wanted = {"preference": 2, "unpaired": 1}.get(kind, 0)
    if len(item.labels) != wanted:
        raise RowError(
            f"it gives {len(item.labels)} labels where {wanted} are needed"
            + (", one for each step; is one of the steps empty?" if kind == "steps" else "")
        )
    if any(not 0 <= label <= 255 for label in item.labels):
        raise RowError(f"labels must be from 0 to 255, not {item.labels}")


def _block(encoded: list[_Encoded], refused: Counter[str]) -> Block:
    tokens = [sequence for each in encoded for sequence in each.sequences]
    labels = [label for each in encoded for label in each.item.labels]
    supervised = [sum(int(s.loss_mask.sum()) for s in each.sequences) for each in encoded]
    return Block(
        input_ids=np.concatenate([np.empty(0, np.int32), *(t.input_ids for t in tokens)]),
        loss_mask=np.concatenate([np.empty(0, np.uint8), *(t.loss_mask for t in tokens)]),
        seq_lens=np.array([len(t.input_ids) for t in tokens], np.int32),
        sequences=np.array([len(each.sequences) for each in encoded], np.int32),
        labels=np.array(labels, np.uint8),
        label_counts=np.array([len(each.item.labels) for each in encoded], np.int32),
        extra=[each.item.extra for each in encoded],
        supervised=np.array(supervised, np.int32),
        prompt_lens=np.array([each.sequences[0].prompt_len for each in encoded], np.int32),
        digests=np.array([_digest(each) for each in encoded], np.uint64),
        unended=sum(t.unended for t in tokens),
        refused=refused,
    )


def _digest(encoded: _Encoded) -> int:
    hashed = hashlib.blake2b(digest_size=8)
    for sequence in encoded.sequences:
        hashed.update(sequence.input_ids.astype("<i4", copy=False).data)
    for sequence in encoded.sequences:
        hashed.update(sequence.loss_mask.data)
    item = encoded.item
    if len(item.sequences) > 1 or item.labels or item.extra is not None:
        # Where one part ends and the next begins belongs to what they say.
        lengths = [len(sequence.input_ids) for sequence in encoded.sequences]
        hashed.update(repr((lengths, item.labels, item.extra)).encode())
    return int.from_bytes(hashed.digest(), "little")

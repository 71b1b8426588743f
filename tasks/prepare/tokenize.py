"""One chunk of a source file to a block of tokens: what a worker process does.

Imports neither torch nor Transformers, so that a process starts in a moment.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from regrow.tasks.prepare.encoding import Encoder, Tokens
from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.formats.registry import FORMATS
from regrow.tasks.prepare.localize import LocalFile
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.readers import Chunk, read_rows
from regrow.tasks.prepare.tokenizer import SavedTokenizer
from regrow.tasks.stage import StageError


@dataclass(frozen=True)
class RowEncoding:
    """How the rows of one dataset become tokens."""

    format: str
    options: Any
    """The format's `Options`."""
    rules: MaskRules
    template: str | None
    tokenizer: SavedTokenizer


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
    """The examples of a chunk, one after the other."""

    input_ids: np.ndarray
    """int32 [tokens]."""
    loss_mask: np.ndarray
    """uint8 [tokens]."""
    lengths: np.ndarray
    """int32 [examples]."""
    supervised: np.ndarray
    """int32 [examples]: ones in the mask of each."""
    prompt_lens: np.ndarray
    """int32 [examples]."""
    digests: np.ndarray
    """uint64 [examples]: of the tokens and the mask. Equal examples have equal digests."""
    unended: int

    def __len__(self) -> int:
        return len(self.lengths)


def encode_chunk(task: ChunkTask) -> Block:
    """The block of a chunk.

    Raises:
        StageError: for a row that cannot be used, naming the file and the row.
    """
    encoding = task.encoding
    read = FORMATS[encoding.format].read
    encode = _encoder(encoding.tokenizer, encoding.template, encoding.rules).encode
    examples: list[Tokens] = []
    for number, row in read_rows(task.file, task.chunk, task.low, task.high):
        try:
            examples.append(encode(read(row, encoding.options)))
        except RowError as error:
            raise StageError(f"{task.file.where(number)}: {error}") from error
    return _block(examples)


# A process meets one dataset after the other; each has one encoder, which takes a tenth of a second
# and more to load (measured, SmolLM2's tokenizer.json).
_encoder = lru_cache(maxsize=4)(Encoder)


def _block(examples: list[Tokens]) -> Block:
    empty_ids, empty_mask = np.empty(0, np.int32), np.empty(0, np.uint8)
    return Block(
        input_ids=np.concatenate([empty_ids, *(e.input_ids for e in examples)]),
        loss_mask=np.concatenate([empty_mask, *(e.loss_mask for e in examples)]),
        lengths=np.array([len(e.input_ids) for e in examples], np.int32),
        supervised=np.array([e.loss_mask.sum() for e in examples], np.int32),
        prompt_lens=np.array([e.prompt_len for e in examples], np.int32),
        digests=np.array([_digest(e) for e in examples], np.uint64),
        unended=sum(e.unended for e in examples),
    )


def _digest(example: Tokens) -> int:
    hashed = hashlib.blake2b(example.input_ids.astype("<i4").tobytes(), digest_size=8)
    hashed.update(example.loss_mask.tobytes())
    return int.from_bytes(hashed.digest(), "little")

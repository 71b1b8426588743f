"""How many tokens, rows and steps a recipe means: by prepared data, or by a look at its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.tasks.prepare.folders import COMPRESSED
from regrow.tasks.prepare.slices import Rows
from regrow.tasks.prepare.spec import PreparePlacement, PrepareSpec

_SAMPLE_BYTES = 400_000
_SAMPLE_ROWS = 300
_LARGEST_TOKENIZER = 8_000_000
"""Bytes of a tokenizer.json that is worth reading: 3.5 MB take 0.2 s (measured)."""
_BYTES_PER_TOKEN = 4.0
"""Of English text with a vocabulary of 50,000 or more, where no tokenizer is read."""
_TOKENS_PER_MESSAGE = 5
"""What a chat template prints around a message: ChatML prints five tokens."""
_FILL = 0.98
"""Share of a row that packing fills, before it is known."""


@dataclass(frozen=True)
class Amount:
    """How much training data there is, for one epoch."""

    tokens: int
    rows: int
    examples: int
    source: str
    """Where the numbers come from."""
    is_estimate: bool

    @property
    def mean_length(self) -> float:
        """Tokens of an example."""
        return self.tokens / max(self.examples, 1)


def prepared_amount(result: Mapping[str, Any]) -> Amount:
    """What the record of the prepare stage counted."""
    train = result["splits"]["train"]
    return Amount(
        train["tokens"], train["rows"], train["examples"], "the prepared data in the store", False
    )


def sampled_amount(spec: PrepareSpec, placement: PreparePlacement) -> Amount | None:
    """An estimate from the beginning of the source files; None where none can be read lightly."""
    examples = tokens = 0.0
    read, how = 0, "4 bytes a token"
    encode = _encoder(Path(placement.tokenizer_path))
    if encode is not None:
        how = "the recipe's tokenizer"
    for dataset in spec.datasets:
        if any(part.rows != Rows() for part in dataset.parts):
            return None  # how many rows a part takes needs all of them
        for file in dataset.files:
            path = Path(placement.locations.get(file.sha256, ""))
            sample = list(_sample(path)) if file.kind == "jsonl" else []
            if not sample:
                return None
            seen = sum(length for length, _ in sample)
            share = dataset.weight * path.stat().st_size / seen
            read += len(sample)
            counts = [_tokens(row, encode) for _, row in sample]
            examples += len(sample) * share
            tokens += sum(min(count, spec.capacity) for count in counts) * share
    if not read:
        return None
    held_back = spec.val_set_size if spec.val_set_size < 1 else spec.val_set_size / examples
    examples, tokens = examples * (1 - held_back), tokens * (1 - held_back)
    rows = examples
    if spec.sample_packing:
        rows = math.ceil(tokens / (_FILL * spec.capacity))
    source = f"an estimate from {read} rows, counted by {how}"
    return Amount(round(tokens), max(1, round(rows)), round(examples), source, True)


def _sample(path: Path) -> Iterator[tuple[int, Any]]:
    """(bytes, row) of the first rows of a local JSON Lines file."""
    if not path.is_file() or path.suffix in COMPRESSED:
        return
    with path.open("rb") as file:
        lines = file.read(_SAMPLE_BYTES).splitlines(keepends=True)
    if len(lines) > 1 and not lines[-1].endswith(b"\n"):
        lines.pop()  # cut off
    for line in lines[:_SAMPLE_ROWS]:
        try:
            row = json.loads(line)
        except ValueError:
            return
        yield len(line), row


def _tokens(row: Any, encode: Any) -> float:
    texts = list(_texts(row))
    if encode is None:
        inside = sum(len(text.encode()) for text in texts) / _BYTES_PER_TOKEN
    else:
        inside = sum(encode(texts))
    return inside + _TOKENS_PER_MESSAGE * len(texts)


def _texts(value: Any) -> Iterator[str]:
    """The longer texts of a row: not roles, ids and flags."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name not in ("role", "from", "id", "source"):
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _encoder(directory: Path) -> Any:
    path = directory / "tokenizer.json"
    if not path.is_file() or path.stat().st_size > _LARGEST_TOKENIZER:
        return None
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(path))
    return lambda texts: [len(found.ids) for found in tokenizer.encode_batch_fast(texts)]

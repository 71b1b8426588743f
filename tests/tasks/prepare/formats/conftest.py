"""Rows to tokens, as a recipe's `type` says, with SmolLM2's own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from regrow.configs.load import parse_recipe
from regrow.tasks.prepare.encoding import Encoder
from regrow.tasks.prepare.formats.registry import FORMATS, format_name
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.tokenizer import SavedTokenizer

EOS = "<|im_end|>"


@dataclass(frozen=True)
class Reading:
    """The tokens of a row."""

    ids: list[int]
    mask: list[int]
    spans: list[tuple[int, str]]
    """(learnt or not, text) of each run of tokens."""

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.spans)

    @property
    def learnt(self) -> str:
        return "".join(text for trained, text in self.spans if trained)


Read = Callable[..., Reading]


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


def saved(path: Path, eos: str, eos_id: int | None) -> SavedTokenizer:
    assert eos_id is not None
    return SavedTokenizer(str(path), eos, eos_id, (("eos_token", eos),), (eos,), None)


@pytest.fixture(scope="session")
def encoder(smollm2_dir: Path, tokenizer: Tokenizer) -> Encoder:
    eos_id = tokenizer.token_to_id(EOS)
    return Encoder(saved(smollm2_dir / "tokenizer.json", EOS, eos_id), None, MaskRules())


@pytest.fixture(scope="session")
def sequence_of() -> Callable[..., Any]:
    """sequence_of(type, row, **keys of the dataset): what the format makes of a row."""
    return _sequence


def _sequence(kind: Any, row: Mapping[str, Any], **dataset: Any) -> Any:
    recipe = parse_recipe(
        {
            "base_model": "owner/model",
            "datasets": [{"path": "owner/data", "type": kind, **dataset}],
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-4,
        }
    ).recipe
    entry = recipe.datasets[0]
    chosen = FORMATS[format_name(entry.type, "datasets[0]")]
    return chosen.read(row, chosen.Options.from_recipe(entry, recipe))


@pytest.fixture(scope="session")
def read(encoder: Encoder, tokenizer: Tokenizer) -> Read:
    """read(type, row, **keys of the dataset): the tokens."""
    return reader(encoder, tokenizer)


@pytest.fixture(scope="session")
def read_as_llama(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """The same with the special tokens of Llama 2, `<s>` before every text among them."""
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.add_special_tokens(["<s>", "</s>"])
    bos = changed.token_to_id("<s>")
    changed.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    changed.save(str(path))
    eos = saved(path, "</s>", changed.token_to_id("</s>"))
    return reader(Encoder(eos, None, MaskRules()), changed)


def reader(encoder: Encoder, tokenizer: Tokenizer) -> Read:
    def read_row(kind: Any, row: Mapping[str, Any], **dataset: Any) -> Reading:
        tokens = encoder.encode(_sequence(kind, row, **dataset))
        ids, mask = tokens.input_ids.tolist(), tokens.loss_mask.tolist()
        runs = groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0])
        parts = ((flag, [token for _, token in run]) for flag, run in runs)
        spans = [(flag, tokenizer.decode(run, skip_special_tokens=False)) for flag, run in parts]
        return Reading(ids, mask, spans)

    return read_row

"""What decides the prepared data (`PrepareSpec`) and what does not (`PreparePlacement`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regrow.tasks.prepare.formats.registry import FORMATS, format_name
from regrow.tasks.prepare.sources import Rows, file_kind, parse_split
from regrow.tasks.prepare.templates import fallback_text, template_text
from regrow.tasks.stage import StageError

VERSION = 1
"""Raised whenever the same spec would give other bytes."""


@dataclass(frozen=True)
class SourceFile:
    """A file by its content: where it lies does not change what is made of it."""

    sha256: str
    kind: str
    """json, jsonl, csv, tsv, parquet, arrow or text."""


@dataclass(frozen=True)
class DatasetSpec:
    """One source of examples."""

    files: tuple[SourceFile, ...]
    """In order; their rows count from the first file's first."""
    format: str
    """Name in `formats.registry.FORMATS`."""
    options: Any
    """The format's own `Options`."""
    rows: Rows = field(default_factory=Rows)
    """Which of the rows are used."""


@dataclass(frozen=True)
class PrepareSpec:
    """All that decides the packed rows."""

    datasets: tuple[DatasetSpec, ...]
    test_datasets: tuple[DatasetSpec, ...]
    tokenizer: str
    """Digest of the tokenizer's files, or its commit on the hub."""
    chat_template: str | None
    """Jinja text; None: the tokenizer's own."""
    fallback_template: str | None
    """Jinja text for a tokenizer that has no template of its own."""
    special_tokens: Mapping[str, Any]
    """Role (`pad_token`, ...) -> text, or texts for `additional_special_tokens`."""
    tokens: tuple[str, ...]
    sequence_len: int
    sample_packing: bool
    eval_sample_packing: bool
    excess_length_strategy: str
    """drop, truncate, split or raise."""
    min_sample_len: int
    """Examples of fewer tokens are dropped."""
    val_set_size: float
    """Below 1: the fraction of examples held back; else their number."""
    shuffle_merged_datasets: bool
    deduplicate: bool
    seed: int

    @classmethod
    def from_recipe(
        cls,
        recipe: Any,
        *,
        dataset_files: Sequence[Mapping[str, str]],
        test_dataset_files: Sequence[Mapping[str, str]] = (),
        tokenizer_digest: str,
    ) -> PrepareSpec:
        """The spec that a recipe means for files of known content.

        Args:
            dataset_files: for each of `recipe.datasets`, {place: sha256} in the order that
                `sources.resolve` gave.
            test_dataset_files: the same for `recipe.test_datasets`.
            tokenizer_digest: what identifies the tokenizer's files.

        Raises:
            StageError: for a type, file type, split or template that is not known.
        """
        packs_eval = recipe.eval_sample_packing
        size = float(recipe.val_set_size or 0)
        if size >= 1 and not size.is_integer():
            raise StageError(
                f"val_set_size: {size} is neither a fraction below 1 nor a whole number"
            )
        return cls(
            datasets=_datasets(recipe, recipe.datasets, dataset_files, "datasets"),
            test_datasets=_datasets(
                recipe, recipe.test_datasets, test_dataset_files, "test_datasets"
            ),
            tokenizer=tokenizer_digest,
            chat_template=template_text(recipe.chat_template, recipe.chat_template_jinja),
            fallback_template=_fallback_template(recipe),
            special_tokens=_special_tokens(recipe.special_tokens),
            tokens=tuple(recipe.tokens or ()),
            sequence_len=recipe.sequence_len,
            sample_packing=bool(recipe.sample_packing),
            eval_sample_packing=bool(recipe.sample_packing if packs_eval is None else packs_eval),
            excess_length_strategy=recipe.excess_length_strategy,
            min_sample_len=recipe.min_sample_len or 0,
            val_set_size=0.0 if recipe.test_datasets else size,
            shuffle_merged_datasets=recipe.shuffle_merged_datasets,
            deduplicate=recipe.dataset_exact_deduplication,
            seed=recipe.seed,
        )

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return bool(self.test_datasets) or self.val_set_size > 0


@dataclass(frozen=True)
class PreparePlacement:
    """Where the inputs lie and how many processes read them; never changes a byte of the result."""

    locations: Mapping[str, str]
    """sha256 -> path or URL of each source file."""
    tokenizer_path: str
    """Directory, or pinned hub place, of the tokenizer."""
    trust_remote_code: bool = False
    num_proc: int = 1
    pool_from_bytes: int = 8_000_000
    """Less source data than this is tokenized in the stage's own process: starting another takes
    about as long as two seconds of tokenizing (0.6 M tokens/s, 4 bytes each; measured, 2 cores)."""

    @classmethod
    def from_recipe(
        cls,
        recipe: Any,
        *,
        dataset_files: Sequence[Mapping[str, str]],
        test_dataset_files: Sequence[Mapping[str, str]] = (),
        tokenizer_path: str,
    ) -> PreparePlacement:
        """The placement for a recipe; arguments as in `PrepareSpec.from_recipe`."""
        places = [*dataset_files, *test_dataset_files]
        return cls(
            locations={digest: place for files in places for place, digest in files.items()},
            tokenizer_path=tokenizer_path,
            trust_remote_code=recipe.trust_remote_code,
            num_proc=recipe.dataset_num_proc or _cores(),
        )


def _datasets(
    recipe: Any, datasets: Sequence[Any], files: Sequence[Mapping[str, str]], key: str
) -> tuple[DatasetSpec, ...]:
    assert len(datasets) == len(files), f"{key}: {len(datasets)} datasets, {len(files)} file lists"
    pairs = enumerate(zip(datasets, files, strict=True))
    return tuple(_dataset(recipe, dataset, its, f"{key}.{i}") for i, (dataset, its) in pairs)


def _dataset(recipe: Any, dataset: Any, files: Mapping[str, str], key: str) -> DatasetSpec:
    name = format_name(dataset.type, key)
    _, rows = parse_split(dataset.split, key)
    if (dataset.shards_idx or 0) >= (dataset.shards or 1):
        raise StageError(
            f"{key}.shards_idx: {dataset.shards_idx} is not below shards ({dataset.shards or 1})"
        )
    kinds = {place: file_kind(place, dataset.ds_type, key) for place in files}
    return DatasetSpec(
        files=tuple(SourceFile(digest, kinds[place]) for place, digest in files.items()),
        format=name,
        options=FORMATS[name].Options.from_recipe(dataset, recipe),
        rows=rows.sharded(dataset.shards, dataset.shards_idx),
    )


def _fallback_template(recipe: Any) -> str | None:
    """What a tokenizer without a template gets: what was named for that case, or what the datasets
    are rendered with, if that is one template."""
    given = [recipe, *recipe.datasets]
    named = [text for each in given if (text := fallback_text(each.chat_template))]
    used = {template_text(d.chat_template, d.chat_template_jinja) for d in recipe.datasets}
    return named[0] if named else (used.pop() if len(used) == 1 else None)


def _special_tokens(given: Any) -> dict[str, Any]:
    """What the recipe sets, without what it leaves to the tokenizer."""
    items = given.items() if isinstance(given, Mapping) else vars(given).items() if given else ()
    return {name: value for name, value in items if value}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""What decides the prepared data (`PrepareSpec`) and what does not (`PreparePlacement`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regrow.tasks.prepare.folders import file_kind
from regrow.tasks.prepare.formats.registry import FORMATS, format_name, kind_of
from regrow.tasks.prepare.slices import Rows, parse_splits
from regrow.tasks.prepare.templates import fallback_text, template_text
from regrow.tasks.stage import StageError

VERSION = 2
"""Raised whenever the same spec would give other bytes."""


DatasetFiles = Sequence[Mapping[str, str]]
"""For each part of a dataset's split {place: digest}, in order."""


@dataclass(frozen=True)
class SourceFile:
    """A file by its content: where it lies does not change what is made of it."""

    sha256: str
    """Of its bytes; of a remote file that is streamed, of what `sources.identity` says."""
    kind: str
    """json, jsonl, csv, tsv, parquet, arrow or text."""


@dataclass(frozen=True)
class Part:
    """Some rows of some files, such as `train[:10%]`."""

    files: tuple[SourceFile, ...]
    """In order; their rows count from the first file's first."""
    rows: Rows = field(default_factory=Rows)
    """Which of the rows are used."""


@dataclass(frozen=True)
class DatasetSpec:
    """One source of examples."""

    parts: tuple[Part, ...]
    """Used one after the other."""
    format: str
    """Name in `formats.registry.FORMATS`."""
    options: Any
    """The format's own `Options`."""
    weight: float = 1
    """How often each example is used; of a stream, its share of the tokens."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Of all parts, each once."""
        return tuple(dict.fromkeys(file for part in self.parts for file in part.files))


@dataclass(frozen=True)
class PrepareSpec:
    """All that decides the packed rows."""

    datasets: tuple[DatasetSpec, ...]
    test_datasets: tuple[DatasetSpec, ...]
    kind: str
    """What all examples are: sft, preference, unpaired, steps or prompts."""
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
    eval_sequence_len: int
    sample_packing: bool
    eval_sample_packing: bool
    packs_in_order: bool
    """Rows are filled with the examples in their order."""
    excess_length_strategy: str
    """drop, truncate, split or raise."""
    min_sample_len: int
    """Examples of fewer tokens are dropped."""
    val_set_size: float
    """Below 1: the fraction of examples held back; else their number."""
    on_bad_rows: str
    """What happens to rows that a format or a template refuses: raise or drop."""
    leakage: str
    """What happens to training examples that are in `test_datasets` too: drop, keep or error."""
    row_order: str
    """mixed; datasets (mixed within each, one after the other); or sources (as they come)."""
    deduplicate: bool
    shard_num: int
    """Parts that the training examples are divided into ..."""
    shard_idx: int
    """... and the one that is used."""
    stream_rows: int | None
    """Rows that training will use, if `datasets` are read no further than that."""
    seed: int
    mistral_common: bool = False
    """Conversations are written by mistral-common, and by no chat template."""

    @classmethod
    def from_recipe(
        cls,
        recipe: Any,
        *,
        dataset_files: Sequence[DatasetFiles],
        test_dataset_files: Sequence[DatasetFiles] = (),
        tokenizer_digest: str,
    ) -> PrepareSpec:
        """The spec that a recipe means for files of known content.

        Args:
            dataset_files: for each of `recipe.datasets`, and for each part of its split, {place:
                digest} in the order that `sources.resolve` gave.
            test_dataset_files: the same for `recipe.test_datasets`.
            tokenizer_digest: what identifies the tokenizer's files.

        Raises:
            StageError: for a type, file type, split or template that is not known, and for
                datasets of different kinds.
        """
        datasets = _datasets(recipe, recipe.datasets, dataset_files, "datasets")
        tests = _datasets(recipe, recipe.test_datasets, test_dataset_files, "test_datasets")
        val_set_size = 0.0 if tests else _val_set_size(recipe)
        eval_sequence_len, packs_eval = _validation_rows(recipe, bool(tests or val_set_size))
        return cls(
            datasets=datasets,
            test_datasets=tests,
            kind=_one_kind(datasets, tests),
            tokenizer=tokenizer_digest,
            chat_template=template_text(recipe.chat_template, recipe.chat_template_jinja),
            fallback_template=_fallback_template(recipe),
            special_tokens=_special_tokens(recipe.special_tokens),
            tokens=tuple(recipe.tokens or ()),
            sequence_len=recipe.sequence_len,
            eval_sequence_len=eval_sequence_len,
            sample_packing=bool(recipe.sample_packing),
            eval_sample_packing=packs_eval,
            packs_in_order=_packs_in_order(recipe, packs_eval),
            excess_length_strategy=recipe.excess_length_strategy,
            min_sample_len=recipe.min_sample_len or 0,
            val_set_size=val_set_size,
            on_bad_rows=recipe.on_bad_rows,
            leakage=recipe.validation_leakage if tests else "drop",
            row_order=_row_order(recipe),
            deduplicate=recipe.dataset_exact_deduplication,
            **_shard(recipe),
            stream_rows=_stream_rows(recipe),
            seed=recipe.seed,
            mistral_common=recipe.tokenizer_use_mistral_common,
        )

    @property
    def capacity(self) -> int:
        """Tokens that a training row may hold: of pairs, both sequences."""
        return self.sequence_len * (2 if self.kind == "preference" else 1)

    @property
    def eval_capacity(self) -> int:
        """Tokens that a validation row may hold."""
        return self.eval_sequence_len * (2 if self.kind == "preference" else 1)

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return bool(self.test_datasets) or self.val_set_size > 0


def _shard(recipe: Any) -> dict[str, int]:
    number, index = recipe.dataset_shard_num or 1, recipe.dataset_shard_idx or 0
    return {"shard_num": number, "shard_idx": index}


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
        dataset_files: Sequence[DatasetFiles],
        test_dataset_files: Sequence[DatasetFiles] = (),
        tokenizer_path: str,
    ) -> PreparePlacement:
        """The placement for a recipe; arguments as in `PrepareSpec.from_recipe`."""
        parts = [files for dataset in (*dataset_files, *test_dataset_files) for files in dataset]
        return cls(
            locations={digest: place for files in parts for place, digest in files.items()},
            tokenizer_path=tokenizer_path,
            trust_remote_code=recipe.trust_remote_code,
            num_proc=recipe.dataset_num_proc or _cores(),
        )


def _datasets(
    recipe: Any, datasets: Sequence[Any], files: Sequence[DatasetFiles], key: str
) -> tuple[DatasetSpec, ...]:
    assert len(datasets) == len(files), f"{key}: {len(datasets)} datasets, {len(files)} file lists"
    pairs = enumerate(zip(datasets, files, strict=True))
    return tuple(_dataset(recipe, dataset, its, f"{key}.{i}") for i, (dataset, its) in pairs)


def _dataset(recipe: Any, dataset: Any, files: DatasetFiles, key: str) -> DatasetSpec:
    name = format_name(dataset.type, key, recipe.data_kind)
    if (dataset.shards_idx or 0) >= (dataset.shards or 1):
        raise StageError(
            f"{key}.shards_idx: {dataset.shards_idx} is not below shards ({dataset.shards or 1})"
        )
    splits = parse_splits(dataset.split, key)
    return DatasetSpec(
        parts=tuple(
            Part(
                tuple(
                    SourceFile(digest, file_kind(place, dataset.ds_type, key))
                    for place, digest in its.items()
                ),
                # Rows are left out once, at the beginning of the first part.
                rows.narrowed(0 if i else dataset.skip, dataset.shards, dataset.shards_idx),
            )
            for i, ((_, rows), its) in enumerate(zip(splits, files, strict=True))
        ),
        format=name,
        options=FORMATS[name].Options.from_recipe(dataset, recipe),
        weight=dataset.weight,
    )


def _one_kind(datasets: Sequence[DatasetSpec], tests: Sequence[DatasetSpec]) -> str:
    """The kind of all datasets. Raises StageError when they differ."""
    keyed = [(f"datasets.{i}", d) for i, d in enumerate(datasets)]
    keyed += [(f"test_datasets.{i}", d) for i, d in enumerate(tests)]
    kinds = {key: kind_of(d.format) for key, d in keyed}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{key} {kind}" for key, kind in kinds.items())
        raise StageError(
            f"datasets: all of one run must be of one kind, and these are {told}. Check their "
            "`type`, or make a recipe for each kind"
        )
    return next(iter(kinds.values()), "sft")


def _packs_in_order(recipe: Any, packs_eval: bool) -> bool:
    packs = bool(recipe.sample_packing) or packs_eval
    return bool(recipe.sample_packing_sequentially) and packs


def _validation_rows(recipe: Any, validates: bool) -> tuple[int, bool]:
    """(tokens, packed) of validation rows; without validation how it would be done decides nothing,
    and is as for training."""
    length, packs = recipe.sequence_len, bool(recipe.sample_packing)
    if not validates:
        return length, packs
    its = recipe.eval_sample_packing
    return recipe.eval_sequence_len or length, packs if its is None else its


def _val_set_size(recipe: Any) -> float:
    """Raises StageError for 1.5, which is neither a share nor a number of examples."""
    size = float(recipe.val_set_size or 0)
    if size >= 1 and not size.is_integer():
        raise StageError(f"val_set_size: {size} is neither a fraction below 1 nor a whole number")
    return size


def _row_order(recipe: Any) -> str:
    if recipe.shuffle_merged_datasets:
        return "mixed"
    return "datasets" if recipe.shuffle_before_merging_datasets else "sources"


def _stream_rows(recipe: Any) -> int | None:
    """Raises StageError when nothing says where a stream ends."""
    if not recipe.streaming:
        return None
    if not recipe.max_steps:
        raise StageError("streaming: reads as far as `max_steps` needs it; add `max_steps`")
    return recipe.max_steps * recipe.global_batch_size


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

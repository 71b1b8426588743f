"""The prepare stage: source files -> tokens -> packed rows, with what was dropped and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from regrow.tasks.prepare.counts import dataset_counts, split_counts, summary
from regrow.tasks.prepare.examples import Corpus, Examples, fitted, held_back, without_repeats
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.ordering import shuffled
from regrow.tasks.prepare.packing import Packs, one_each, pack
from regrow.tasks.prepare.preview import write_preview
from regrow.tasks.prepare.prompts import write_prompts
from regrow.tasks.prepare.shards import WrittenSplit, write_split
from regrow.tasks.prepare.spec import DatasetSpec, PreparePlacement, PrepareSpec
from regrow.tasks.prepare.templates import TEMPLATES
from regrow.tasks.prepare.tokenize import RowEncoding
from regrow.tasks.prepare.tokenizer import SavedTokenizer, save_tokenizer
from regrow.tasks.prepare.units import Slice, Sources, Tokenizing
from regrow.tasks.stage import StageError, StageJob

Dropped = dict[str, int]
"""Reason -> number of examples."""


def run(job: StageJob) -> dict[str, Any]:
    """Prepare the data of a spec into `job.out`.

    Returns:
        {"splits": {split: `split_counts`}, "datasets": `dataset_counts`, "test_datasets": the same,
        "dropped": {reason: examples}, "sequence_len": int}

    Raises:
        StageError: for data that cannot be read or leaves nothing to train on.
    """
    tokenizer = _tokenizer(job)
    train, test = _tokenized(job, tokenizer)
    _warn_unended(job, train.unended + test.unended)
    splits, dropped = _splits(job.spec, train, test)
    written = {split: _write(job, split, *its) for split, its in splits.items()}
    _finish(job, tokenizer, written, splits.get("validation"))
    counts = {
        split: split_counts(written[split], examples, job.spec.sequence_len)
        for split, (_, examples) in splits.items()
    }
    for line in [f"{n} examples dropped: {why}" for why, n in dropped.items() if n]:
        job.report.log(line.replace("_", " "))
    for split, its in counts.items():
        job.report.log(summary(split, its))
    return {
        "splits": counts,
        "datasets": dataset_counts(job.spec.datasets, train.rows, train.corpus.examples),
        "test_datasets": dataset_counts(job.spec.test_datasets, test.rows, test.corpus.examples),
        "dropped": dropped,
        "sequence_len": job.spec.sequence_len,
    }


@dataclass(frozen=True)
class _Tokenized:
    """The examples of some datasets, before anything is dropped."""

    datasets: tuple[DatasetSpec, ...]
    corpus: Corpus
    rows: list[int]
    """Source rows of each dataset."""
    unended: int


class _Progress:
    """Adds up what is told in small amounts."""

    def __init__(self, job: StageJob, total: int, unit: str, note: str) -> None:
        self._report, self._total, self._unit, self._note = job.report, total, unit, note
        self._done = 0

    def __call__(self, more: int) -> None:
        self._done += more
        self._report.progress(self._done, self._total, self._unit, self._note)


def _tokenizer(job: StageJob) -> SavedTokenizer:
    spec, placement = job.spec, job.placement
    return save_tokenizer(
        placement.tokenizer_path,
        job.out / "tokenizer",
        special_tokens=spec.special_tokens,
        tokens=spec.tokens,
        chat_template=spec.chat_template,
        fallback_template=spec.fallback_template,
        trust_remote_code=placement.trust_remote_code,
    )


def _tokenized(job: StageJob, tokenizer: SavedTokenizer) -> tuple[_Tokenized, _Tokenized]:
    """The training datasets and the test datasets, tokenized or found tokenized."""
    spec: PrepareSpec = job.spec
    placement: PreparePlacement = job.placement
    sources = Sources(placement.locations, job.scratch, job.units)
    train = [(dataset, sources.slices(dataset)) for dataset in spec.datasets]
    test = [(dataset, sources.slices(dataset)) for dataset in spec.test_datasets]
    _require_rows(train, "datasets", placement.locations)
    _require_rows(test, "test_datasets", placement.locations)
    slices = [part for _, parts in train + test for part in parts]
    parallel = sum(part.size for part in slices) >= placement.pool_from_bytes
    identity = [spec.tokenizer, spec.special_tokens, spec.tokens]
    progress = _Progress(job, sum(map(len, slices)), "rows", "tokenized")
    processes = placement.num_proc if parallel else 1

    def tokenize(datasets: Sequence[tuple[DatasetSpec, list[Slice]]]) -> _Tokenized:
        units = [
            (number, tokenizing.unit(part, _row_encoding(dataset, tokenizer), progress))
            for number, (dataset, parts) in enumerate(datasets)
            for part in parts
        ]
        return _Tokenized(
            datasets=tuple(dataset for dataset, _ in datasets),
            corpus=Corpus(units),
            rows=[sum(map(len, parts)) for _, parts in datasets],
            unended=sum(unit.unended for _, unit in units),
        )

    with Tokenizing(job.units, sources, identity, processes) as tokenizing:
        return tokenize(train), tokenize(test)


def _require_rows(
    datasets: Sequence[tuple[DatasetSpec, list[Slice]]], key: str, locations: Mapping[str, str]
) -> None:
    for number, (dataset, parts) in enumerate(datasets):
        if not any(map(len, parts)):
            files = ", ".join(locations[file.sha256] for file in dataset.files)
            raise StageError(
                f"{key}.{number}: there are no rows in {files}, or none in the wanted range. Check "
                f"the files, `{key}.{number}.split` and its shards"
            )


def _row_encoding(dataset: DatasetSpec, tokenizer: SavedTokenizer) -> RowEncoding:
    if dataset.format != "chat_template":
        return RowEncoding(dataset.format, dataset.options, MaskRules(), None, tokenizer)
    template = dataset.options.chat_template or tokenizer.chat_template
    if template is None:
        raise StageError(
            "chat_template: the tokenizer has no chat template of its own. Set `chat_template` to "
            f"one of {', '.join(sorted(TEMPLATES))}, or give its text with `chat_template_jinja`"
        )
    names = [rule.name for rule in fields(MaskRules)]
    rules = MaskRules(**{name: getattr(dataset.options, name) for name in names})
    return RowEncoding(dataset.format, dataset.options, rules, template, tokenizer)


def _warn_unended(job: StageJob, unended: int) -> None:
    if unended:
        job.report.log(
            f"warning: {unended} trained messages are followed by no eos or other ending token, so "
            "the model does not learn to stop there. Check `eot_tokens`, "
            "`special_tokens.eos_token` and the chat template"
        )


def _splits(
    spec: PrepareSpec, train: _Tokenized, test: _Tokenized
) -> tuple[dict[str, tuple[Corpus, Examples]], Dropped]:
    """The examples of each split with the corpus they are in, and what was dropped."""
    kept, dropped = _usable(spec, train, "datasets")
    if spec.test_datasets:
        held, its_dropped = _usable(spec, test, "test_datasets")
        if spec.deduplicate:
            kept = kept.take(~np.isin(kept.digest, held.digest))
        if not len(kept):
            raise StageError("datasets: every example is also in test_datasets; use other files")
        dropped = {why: number + its_dropped[why] for why, number in dropped.items()}
        return {"train": (train.corpus, kept), "validation": (test.corpus, held)}, dropped
    if spec.val_set_size:
        chosen = held_back(kept, spec.val_set_size, spec.seed)
        kept, held = kept.take(~chosen), kept.take(chosen)
        return {"train": (train.corpus, kept), "validation": (train.corpus, held)}, dropped
    return {"train": (train.corpus, kept)}, dropped


def _usable(spec: PrepareSpec, tokenized: _Tokenized, key: str) -> tuple[Examples, Dropped]:
    """The examples (or pieces of them) that can be trained on, and what was dropped."""
    examples = tokenized.corpus.examples
    unique = without_repeats(examples) if spec.deduplicate else examples
    enough = unique.take(unique.length >= spec.min_sample_len)
    plain = [i for i, dataset in enumerate(tokenized.datasets) if dataset.format == "completion"]
    strategy = spec.excess_length_strategy
    if not len(examples):
        raise StageError(f"{key}: there are no rows in the files: every line is blank")
    fit, dropped_long = fitted(tokenized.corpus, enough, spec.sequence_len, strategy, plain)
    usable = fit.take(fit.supervised > 0)
    dropped = {
        "repeated": len(examples) - len(unique),
        "too_short": len(unique) - len(enough),
        "too_long": dropped_long,
        "nothing_learnt": len(fit) - len(usable),
    }
    if not len(usable):
        raise StageError(_nothing_left(spec, examples, dropped, key))
    return usable, dropped


def _nothing_left(spec: PrepareSpec, examples: Examples, dropped: Dropped, key: str) -> str:
    return (
        f"{key}: none of {len(examples)} examples can be trained on. {dropped['too_long']} are "
        f"longer than sequence_len {spec.sequence_len} (the shortest of all has "
        f"{int(examples.length.min())} tokens, the longest {int(examples.length.max())}): raise "
        "`sequence_len` or set `excess_length_strategy: truncate`. "
        f"{dropped['nothing_learnt']} hold nothing to learn: check `roles_to_train`, `roles` and "
        f"the columns. {dropped['too_short']} are shorter than `min_sample_len`"
    )


def _write(job: StageJob, split: str, corpus: Corpus, examples: Examples) -> WrittenSplit:
    spec: PrepareSpec = job.spec
    packed = spec.sample_packing if split == "train" else spec.eval_sample_packing
    packs = pack(examples.length, spec.sequence_len) if packed else one_each(len(examples))
    progress = _Progress(job, len(packs), f"{split} rows", "written")
    order = _row_order(spec, packs)
    return write_split(job.out, split, corpus, examples, packs, order, spec.sequence_len, progress)


def _row_order(spec: PrepareSpec, packs: Packs) -> np.ndarray:
    """Mixed, so that a row's place tells nothing of lengths or sources; or the sources' order."""
    if spec.shuffle_merged_datasets:
        return shuffled(len(packs), spec.seed)
    return np.argsort(packs.first_items(), kind="stable")


def _finish(
    job: StageJob,
    tokenizer: SavedTokenizer,
    written: dict[str, WrittenSplit],
    held_out: tuple[Corpus, Examples] | None,
) -> None:
    """Write what stands beside the shards."""
    index = {"splits": {split: its.index() for split, its in written.items()}}
    (job.out / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    write_preview(job.out)
    path = job.out / "prompts.jsonl"
    path.touch()
    backend = Tokenizer.from_file(tokenizer.path)
    datasets = (*job.spec.datasets, *job.spec.test_datasets)
    ends = {end for dataset in datasets for end in getattr(dataset.options, "eot_tokens", ())}
    ends.add(tokenizer.eos_token)
    if held_out is None or not write_prompts(path, *held_out, backend, ends, job.spec.seed):
        job.report.log(
            "no prompts for sample generation: they are taken from held-out conversations or "
            "instructions (`val_set_size`, `test_datasets`)"
        )

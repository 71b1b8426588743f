"""The prepare stage: source files -> tokens -> packed rows, with what was dropped and why."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from regrow.tasks import identity
from regrow.tasks.modeling.row_sizes import write_sizes
from regrow.tasks.prepare.counts import dataset_counts, split_counts, summary
from regrow.tasks.prepare.examples import Corpus, Examples
from regrow.tasks.prepare.formats.registry import chat_options
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.mistral import save_mistral_tokenizer
from regrow.tasks.prepare.ordering import shuffled, shuffled_within
from regrow.tasks.prepare.packing import Packs, in_order, one_each, pack, row_sizes
from regrow.tasks.prepare.preview import write_preview
from regrow.tasks.prepare.progress import Progress
from regrow.tasks.prepare.prompts import write_prompts
from regrow.tasks.prepare.reading import Read, read
from regrow.tasks.prepare.shards import WrittenSplit, write_split
from regrow.tasks.prepare.spec import DatasetSpec, PrepareSpec
from regrow.tasks.prepare.templates import TEMPLATES
from regrow.tasks.prepare.tokenize import RowEncoding
from regrow.tasks.prepare.tokenizer import TOKENIZER_FILES, SavedTokenizer, save_tokenizer
from regrow.tasks.stage import StageError, StageJob


def run(job: StageJob) -> dict[str, Any]:
    """Prepare the data of a spec into `job.out`.

    Returns:
        {"splits": {split: `split_counts`}, "datasets": `dataset_counts`, "test_datasets": the same,
        "dropped": {reason: examples}, "refused": {why: rows}, "kind": str, "sequence_len": int}

    Raises:
        StageError: for data that cannot be read or leaves nothing to train on.
    """
    spec: PrepareSpec = job.spec
    tokenizer = _tokenizer(job)
    _tell_of_lost_thinking(job, tokenizer)
    found = read(job, lambda dataset: _row_encoding(dataset, tokenizer, spec.on_bad_rows))
    _tell(job, found)
    written = {split: _write(job, split, *its) for split, its in found.splits.items()}
    _finish(job, tokenizer, written, found.splits.get("validation"))
    counts = {
        split: split_counts(written[split], examples, _capacity(spec, split))
        for split, (_, examples) in found.splits.items()
    }
    for split, its in counts.items():
        job.report.log(summary(split, its))
    train, test = found.train, found.test
    return {
        "splits": counts,
        "datasets": dataset_counts(spec.datasets, train.rows, train.corpus.examples),
        "test_datasets": dataset_counts(spec.test_datasets, test.rows, test.corpus.examples),
        "dropped": found.dropped,
        "refused": _refused(found),
        "kind": spec.kind,
        "sequence_len": spec.sequence_len,
    }


def _tokenizer(job: StageJob) -> SavedTokenizer:
    spec, placement = job.spec, job.placement
    files = (*TOKENIZER_FILES, "*.py")  # of which programs run only where the recipe trusts them
    place = identity.tokenizer_at(placement.tokenizer_path, spec.tokenizer, files)
    if spec.mistral_common:
        return save_mistral_tokenizer(place, job.out / "tokenizer")
    return save_tokenizer(
        place,
        job.out / "tokenizer",
        special_tokens=spec.special_tokens,
        tokens=spec.tokens,
        chat_template=spec.chat_template,
        fallback_template=spec.fallback_template,
        trust_remote_code=placement.trust_remote_code,
    )


def _row_encoding(dataset: DatasetSpec, tokenizer: SavedTokenizer, bad: str) -> RowEncoding:
    chat = chat_options(dataset.options)
    if chat is None:
        return RowEncoding(dataset.format, dataset.options, MaskRules(), None, tokenizer, bad)
    template = chat.chat_template or tokenizer.chat_template
    if template is None and chat is dataset.options:
        raise StageError(
            "chat_template: the tokenizer has no chat template of its own. Set `chat_template` to "
            f"one of {', '.join(sorted(TEMPLATES))}, or give its text with `chat_template_jinja`"
        )
    names = [rule.name for rule in fields(MaskRules)]
    rules = MaskRules(**{name: getattr(chat, name) for name in names})
    return RowEncoding(dataset.format, dataset.options, rules, template, tokenizer, bad)


def _tell_of_lost_thinking(job: StageJob, tokenizer: SavedTokenizer) -> None:
    chats = [chat_options(d.options) for d in (*job.spec.datasets, *job.spec.test_datasets)]
    for chat in chats:
        template = chat and (chat.chat_template or tokenizer.chat_template)
        if chat and template and chat.split_thinking and chat.thinking not in template:
            job.report.log(
                f"warning: split_thinking takes thinking into {chat.thinking!r}, which the chat "
                "template does not print: it is left out. Check `template_thinking_key`"
            )


_WHY = {
    "refused": "the format or the chat template refuses them (`on_bad_rows: drop`)",
    "repeated": "they are repeated",
    "not_wanted": "of the datasets' weights or of dataset_shard_num",
    "too_short": "they are too short",
    "too_long": "they are too long",
    "nothing_learnt": "they hold nothing to learn",
}


_MOST_REASONS = 20
"""Reasons for refusing rows that are told, the most frequent first."""


def _refused(found: Read) -> dict[str, int]:
    both = found.train.refused + found.test.refused
    most = sorted(both.items(), key=lambda pair: (-pair[1], pair[0]))
    return dict(most[:_MOST_REASONS])


def _tell(job: StageJob, found: Read) -> None:
    """What people should know of the data before they train on it."""
    unended = found.train.unended + found.test.unended
    if unended:
        job.report.log(
            f"warning: {unended} trained messages are followed by no eos or other ending token, so "
            "the model does not learn to stop there. Check `eot_tokens`, "
            "`special_tokens.eos_token` and the chat template"
        )
    for why, reason in _WHY.items():
        if found.dropped[why]:
            job.report.log(f"{found.dropped[why]} examples dropped: {reason}")
    for reason, number in _refused(found).items():
        job.report.log(f"refused, {number} rows: {reason}")
    if leaked := found.dropped["leaked"]:
        keeps = job.spec.leakage == "keep"
        done = "kept: the validation loss is not of unseen examples" if keeps else "dropped"
        job.report.log(
            f"warning: {leaked} training examples are in test_datasets too, and were {done}"
        )


def _capacity(spec: PrepareSpec, split: str) -> int:
    return spec.capacity if split == "train" else spec.eval_capacity


def _write(job: StageJob, split: str, corpus: Corpus, examples: Examples) -> WrittenSplit:
    spec: PrepareSpec = job.spec
    capacity = _capacity(spec, split)
    if spec.row_order == "datasets":
        examples = examples.take(shuffled_within(examples.dataset, spec.seed))
    packs = _packs(spec, split, examples, capacity)
    order = _row_order(spec, packs)
    progress = Progress(job.report, len(packs), f"{split} rows", "written")
    written = write_split(
        job.out, split, corpus, examples, packs, order, capacity, progress, spec.kind
    )
    lengths = examples.sequence_lens.reshape(len(examples), -1)
    write_sizes(job.out, split, row_sizes(lengths, packs)[order])
    return written


def _packs(spec: PrepareSpec, split: str, examples: Examples, capacity: int) -> Packs:
    if not (spec.sample_packing if split == "train" else spec.eval_sample_packing):
        return one_each(len(examples))
    return (in_order if spec.packs_in_order else pack)(examples.length, capacity)


def _row_order(spec: PrepareSpec, packs: Packs) -> np.ndarray:
    """Mixed, so that a row's place tells nothing of lengths or sources; or the examples' order."""
    if spec.row_order == "mixed":
        return shuffled(len(packs), spec.seed)
    return np.argsort(packs.first_items(), kind="stable")


def _finish(
    job: StageJob,
    tokenizer: SavedTokenizer,
    written: dict[str, WrittenSplit],
    held_out: tuple[Corpus, Examples] | None,
) -> None:
    """Write what stands beside the shards."""
    splits = {split: its.index() for split, its in written.items()}
    index = {"kind": job.spec.kind, "splits": splits}
    (job.out / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    write_preview(job.out)
    path = job.out / "prompts.jsonl"
    path.touch()
    backend = Tokenizer.from_file(tokenizer.path)
    datasets = (*job.spec.datasets, *job.spec.test_datasets)
    chats = [chat_options(dataset.options) for dataset in datasets]
    ends = {end for chat in chats if chat for end in chat.eot_tokens}
    ends.add(tokenizer.eos_token)
    if held_out is None or not write_prompts(path, *held_out, backend, ends, job.spec.seed):
        job.report.log(
            "no prompts for sample generation: they are taken from held-out conversations or "
            "instructions (`val_set_size`, `test_datasets`)"
        )

"""Tokenizes the datasets of a spec: whole, or as a stream up to what training will use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NoReturn

from regrow.tasks.prepare.examples import Corpus
from regrow.tasks.prepare.progress import Progress
from regrow.tasks.prepare.shares import allotted, amounts, first_of, goal, needed
from regrow.tasks.prepare.spec import DatasetSpec, PreparePlacement, PrepareSpec
from regrow.tasks.prepare.splitting import Dropped, Splits, Tokenized, split
from regrow.tasks.prepare.streaming import Streams
from regrow.tasks.prepare.tokenize import RowEncoding
from regrow.tasks.prepare.units import Slice, Sources, Tokenizing, Unit
from regrow.tasks.stage import StageError, StageJob

EncodingOf = Callable[[DatasetSpec], RowEncoding]
"""How the rows of a dataset become tokens."""

_BYTES_A_TOKEN = 4  # of English text with today's tokenizers, about


@dataclass(frozen=True)
class Read:
    """What came of the sources."""

    train: Tokenized
    test: Tokenized
    splits: Splits
    dropped: Dropped


def read(job: StageJob, encoding: EncodingOf) -> Read:
    """The examples of each split of the job's spec.

    Raises:
        StageError: for data that cannot be read or leaves nothing to train on.
    """
    spec: PrepareSpec = job.spec
    reader = _Reader(job, encoding)
    if spec.stream_rows is None:
        train, test = reader.whole(spec.datasets, spec.test_datasets)
        return Read(train, test, *split(spec, train, test))
    _, test = reader.whole((), spec.test_datasets)
    return reader.streamed(test)


@dataclass
class _Stream:
    """A dataset as far as it has been read."""

    parts: Iterator[DatasetSpec]
    units: list[Unit] = field(default_factory=list)
    rows: int = 0
    amount: int = 0
    ended: bool = False


class _Reader:
    def __init__(self, job: StageJob, encoding: EncodingOf) -> None:
        self._job, self._encoding = job, encoding
        self._spec: PrepareSpec = job.spec
        self._placement: PreparePlacement = job.placement
        self._places = job.scratch, job.units

    def whole(
        self, train: Sequence[DatasetSpec], test: Sequence[DatasetSpec]
    ) -> tuple[Tokenized, Tokenized]:
        """Datasets with all their rows."""
        locations = self._placement.locations
        sources = Sources(locations, *self._places)
        groups = [[(dataset, sources.slices(dataset)) for dataset in its] for its in (train, test)]
        for key, group in zip(("datasets", "test_datasets"), groups, strict=True):
            _require_rows(group, key, locations)
        slices = [part for group in groups for _, parts in group for part in parts]
        progress = Progress(self._job.report, sum(map(len, slices)), "rows", "tokenized")
        with self._tokenizing(sources, sum(part.size for part in slices)) as tokenizing:
            done = [self._tokenized(group, tokenizing, progress) for group in groups]
        return done[0], done[1]

    def _tokenizing(self, sources: Sources, size: int) -> Tokenizing:
        spec, placement = self._spec, self._placement
        identity = [spec.tokenizer, spec.special_tokens, spec.tokens]
        processes = placement.num_proc if size >= placement.pool_from_bytes else 1
        return Tokenizing(self._job.units, sources, identity, processes)

    def _tokenized(
        self,
        datasets: Sequence[tuple[DatasetSpec, list[Slice]]],
        tokenizing: Tokenizing,
        progress: Progress,
    ) -> Tokenized:
        numbers = [number for number, (_, parts) in enumerate(datasets) for _ in parts]
        wanted = [(part, self._encoding(dataset)) for dataset, parts in datasets for part in parts]
        units = tokenizing.units(wanted, progress)
        return Tokenized(
            datasets=tuple(dataset for dataset, _ in datasets),
            corpus=Corpus(list(zip(numbers, units, strict=True))),
            rows=[sum(map(len, parts)) for _, parts in datasets],
            unended=sum(unit.unended for unit in units),
            refused=_refused(units),
        )

    def streamed(self, test: Tokenized) -> Read:
        """The training datasets, each read until it gives its share of what is needed."""
        with closing(Streams(self._placement.locations, *self._places)) as streams:
            try:
                return self._filled(streams, test)
            except StageError as error:
                raise StageError(streams.named(str(error))) from error

    def _filled(self, streams: Streams, test: Tokenized) -> Read:
        spec, sources = self._spec, Sources(streams, *self._places)
        wanted, weights = needed(spec), [dataset.weight for dataset in spec.datasets]
        unit = "tokens" if spec.sample_packing else "examples"
        progress = Progress(self._job.report, wanted, unit, "tokenized")
        reading = [_Stream(streams.parts(dataset)) for dataset in spec.datasets]
        goals = allotted(wanted, weights, [None] * len(reading))
        with self._tokenizing(sources, wanted * _BYTES_A_TOKEN) as tokenizing:
            while True:
                for stream, amount in zip(reading, goals, strict=True):
                    self._read_to(stream, amount, sources, tokenizing, progress)
                train = self._so_far(reading)
                splits, dropped = split(spec, train, test)
                corpus, examples = splits["train"]
                have = amounts(spec, examples, len(reading))
                limits = [h if s.ended else None for h, s in zip(have, reading, strict=True)]
                shares = allotted(wanted, weights, limits)
                if all(h >= share for h, share in zip(have, shares, strict=True)):
                    break
                goals = list(map(goal, [stream.amount for stream in reading], have, shares))
        if sum(have) < wanted:
            self._job.report.log(
                f"the datasets end before max_steps does: {sum(have)} of {wanted} {unit}; training "
                "goes over them again"
            )
        splits["train"] = corpus, examples.take(first_of(spec, examples, shares))
        return Read(train, test, splits, dropped)

    def _read_to(
        self,
        stream: _Stream,
        amount: int,
        sources: Sources,
        tokenizing: Tokenizing,
        progress: Progress,
    ) -> None:
        """Read on until the stream has given `amount` tokens or examples, or ends."""
        while stream.amount < amount and not stream.ended:
            dataset = next(stream.parts, None)
            if dataset is None:
                stream.ended = True
                return
            for part in sources.slices(dataset):
                unit = tokenizing.unit(part, self._encoding(dataset), lambda *_: None)
                more = unit.tokens if self._spec.sample_packing else unit.examples
                stream.units.append(unit)
                stream.rows += len(part)
                stream.amount += more
                progress(more, unit.tokens)

    def _so_far(self, reading: Sequence[_Stream]) -> Tokenized:
        datasets = self._spec.datasets
        for number, stream in enumerate(reading):
            if not stream.rows:
                _fail_for_no_rows(datasets[number], f"datasets.{number}", self._placement.locations)
        return Tokenized(
            datasets=datasets,
            corpus=Corpus([(n, unit) for n, stream in enumerate(reading) for unit in stream.units]),
            rows=[stream.rows for stream in reading],
            unended=sum(unit.unended for stream in reading for unit in stream.units),
            refused=_refused([unit for stream in reading for unit in stream.units]),
        )


def _refused(units: Iterable[Unit]) -> Counter[str]:
    return sum((Counter(unit.refused) for unit in units), Counter())


def _require_rows(
    datasets: Sequence[tuple[DatasetSpec, list[Slice]]], key: str, locations: Mapping[str, str]
) -> None:
    for number, (dataset, parts) in enumerate(datasets):
        if not any(map(len, parts)):
            _fail_for_no_rows(dataset, f"{key}.{number}", locations)


def _fail_for_no_rows(dataset: DatasetSpec, key: str, locations: Mapping[str, str]) -> NoReturn:
    files = ", ".join(locations[file.sha256] for file in dataset.files)
    raise StageError(
        f"{key}: there are no rows in {files}, or none in the wanted range. Check the files, "
        f"`{key}.split` and its shards"
    )

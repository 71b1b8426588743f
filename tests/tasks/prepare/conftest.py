"""A stage job without a store: what `prepare` runs in here."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from regrow.configs.load import parse_recipe
from regrow.infra.digests import DigestMemo
from regrow.tasks.prepare import run as prepare
from regrow.tasks.prepare.sources import identified
from regrow.tasks.prepare.spec import VERSION, PreparePlacement, PrepareSpec
from regrow.tasks.stage import Stage, StageJob, fingerprint


@dataclass
class Units:
    """`UnitCache` in a directory; counts what is built."""

    root: Path
    results: dict[str, dict] = field(default_factory=dict)
    built: list[str] = field(default_factory=list)

    def get_or_build(
        self, name: str, version: int, spec: Any, build: Callable[[Path], dict]
    ) -> tuple[Path, dict, bool]:
        key = fingerprint({"unit": name, "version": version, "spec": spec})
        found = key in self.results
        if not found:
            shutil.rmtree(self.root / key, ignore_errors=True)  # of an attempt that did not end
            (self.root / key).mkdir(parents=True)
            self.results[key] = json.loads(json.dumps(build(self.root / key)))
            self.built.append(name)
        return self.root / key, self.results[key], not found


@dataclass
class Report:
    """Keeps what is told."""

    lines: list[str] = field(default_factory=list)
    steps: list[tuple[float, float | None, str, str]] = field(default_factory=list)

    def progress(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        self.steps.append((done, total, unit, note))

    def log(self, message: str) -> None:
        self.lines.append(message)


@dataclass(frozen=True)
class Prepared:
    """What a run of the stage left."""

    out: Path
    result: dict[str, Any]
    report: Report
    units: Units
    stage: Stage

    def files(self) -> dict[str, str]:
        """{name: sha256} of everything in the artifact."""
        paths = sorted(path for path in self.out.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
        }


class Workbench:
    """Runs the stage on recipes given as keys."""

    def __init__(self, root: Path, tokenizer: Path) -> None:
        self.root, self._tokenizer = root, tokenizer
        self.units = Units(root / "units")
        self._runs = 0

    def write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
        """A JSON lines file of rows; returns its path."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def stage(self, placed: Mapping[str, Any] | None = None, **keys: Any) -> Stage:
        """The stage of a recipe: `keys` on top of what every recipe needs."""
        recipe = parse_recipe(
            {
                "base_model": str(self._tokenizer),
                "micro_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-4,
                "sequence_len": 256,
                "sample_packing": True,
                **keys,
            }
        ).recipe
        files = {
            "dataset_files": [_files(d, recipe.streaming) for d in recipe.datasets],
            "test_dataset_files": [_files(d) for d in recipe.test_datasets],
        }
        placement = PreparePlacement.from_recipe(
            recipe, **files, tokenizer_path=str(self._tokenizer)
        )
        return Stage(
            name="prepare",
            version=VERSION,
            spec=PrepareSpec.from_recipe(recipe, **files, tokenizer_digest="tokenizer"),
            runner="regrow.tasks.prepare.run:run",
            placement=PreparePlacement(**{**vars(placement), "num_proc": 1, **(placed or {})}),
        )

    def run(self, placed: Mapping[str, Any] | None = None, **keys: Any) -> Prepared:
        """Run the stage of a recipe in a fresh directory."""
        stage = self.stage(placed, **keys)
        self._runs += 1
        here = self.root / f"run-{self._runs}"
        for name in ("out", "scratch"):
            (here / name).mkdir(parents=True)
        report = Report()
        job = StageJob(
            stage=stage,
            inputs={},
            input_results={},
            out=here / "out",
            scratch=here / "scratch",
            report=report,
            units=self.units,
        )
        return Prepared(job.out, prepare.run(job), report, self.units, stage)


def _files(dataset: Any, streaming: bool = False) -> list[dict[str, str]]:
    return identified(dataset, "datasets.0", DigestMemo(None), streaming)


@pytest.fixture(scope="session")
def small_tokenizer_dir(smollm2_dir, tmp_path_factory) -> Path:
    """A tokenizer like SmolLM2's with a hundredth of its vocabulary: it loads in a moment."""
    out = tmp_path_factory.mktemp("small-tokenizer")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(smollm2_dir / name, out / name)
    template = (smollm2_dir / "chat_template.jinja").read_text()
    words = [template, "please Yes. word It is Say Add two plain words 0123456789"] * 5
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    return out


@pytest.fixture
def bench(tmp_path, small_tokenizer_dir) -> Workbench:
    """A clean place to run the stage in."""
    return Workbench(tmp_path, small_tokenizer_dir)


@pytest.fixture
def smollm2_bench(tmp_path, smollm2_dir) -> Workbench:
    """The same with SmolLM2's own tokenizer."""
    return Workbench(tmp_path, smollm2_dir)

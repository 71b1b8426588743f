"""A tiny model with a tiny tokenizer, prepared rows for it, and jobs to train it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from regrow.tasks.train.job import CheckpointPlace, WorkerJob
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.spec import AdapterSpec, TrainPlacement, TrainSpec
from tests.tasks.train.tiny_models import VOCABULARY, write_llama

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("seq_lens", pa.list_(pa.int32())),
    ]
)


def make_row(random: np.random.Generator) -> dict[str, list[int]]:
    """One to three examples of 2 to 20 tokens."""
    lengths = random.integers(2, 21, random.integers(1, 4))
    mask = (random.random(lengths.sum()) < 0.6).astype(int)
    mask[np.concatenate([[0], lengths.cumsum()[:-1]])] = 0
    ids = random.integers(3, VOCABULARY, lengths.sum())
    return {
        "input_ids": ids.tolist(),
        "loss_mask": mask.tolist(),
        "seq_lens": lengths.tolist(),
    }


def write_split(directory: Path, split: str, rows: list[dict[str, list[int]]]) -> dict:
    """A split as the prepare stage writes it, in one shard; returns its part of the index."""
    (directory / split).mkdir(parents=True)
    name = f"{split}/shard-00000.arrow"
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(directory / name), SCHEMA, options=options) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), max_chunksize=64)
    return {
        "shards": [{"file": name, "rows": len(rows)}],
        "rows": len(rows),
        "examples": sum(len(row["seq_lens"]) for row in rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "supervised_tokens": sum(sum(row["loss_mask"]) for row in rows),
    }


def write_prepared(directory: Path, train: int, validation: int, tokenizer) -> Path:
    """A prepared artifact of random rows."""
    random = np.random.default_rng(7)
    splits = {"train": write_split(directory, "train", [make_row(random) for _ in range(train)])}
    if validation:
        rows = [make_row(random) for _ in range(validation)]
        splits["validation"] = write_split(directory, "validation", rows)
    (directory / "index.json").write_text(json.dumps({"splits": splits}))
    tokenizer.save_pretrained(directory / "tokenizer")
    return directory


@pytest.fixture(scope="session")
def tokenizer():
    words = {f"w{index}": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        unk_token="w0",
        pad_token="w1",
        eos_token="w2",
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A random Llama, 2 layers of 32, in float32."""
    return write_llama(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory, tokenizer) -> Path:
    """21 rows to train on (5 steps of 4 and one of 1), 5 to validate."""
    return write_prepared(tmp_path_factory.mktemp("prepared"), 21, 5, tokenizer)


@pytest.fixture
def make_job(model_dir, prepared_dir, tmp_path):
    """make_job(name, spec changes, placement changes) -> WorkerJob; one store for all of a test."""

    def make(
        name: str, spec: dict | None = None, placement: dict | None = None, key: str | None = None
    ) -> WorkerJob:
        base_spec = TrainSpec(
            base_model_digest="0" * 64,
            dtype="float32",
            global_batch_size=4,
            num_epochs=2,
            learning_rate=1e-2,
            adapter=AdapterSpec(r=4, alpha=8, target_linear=True),
            optimizer="adamw_torch",
            warmup_steps=2,
            weight_decay=0.01,
            seed=3,
        )
        base_placement = TrainPlacement(
            base_model=str(model_dir),
            micro_batch_size=2,
            evaluation=Cadence(steps=4),
            saving=Cadence(steps=3),
            save_total_limit=2,
            device="cpu",
        )
        return WorkerJob(
            spec=dataclasses.replace(base_spec, **(spec or {})),
            placement=dataclasses.replace(base_placement, **(placement or {})),
            prepared=prepared_dir,
            base_model=model_dir,
            out=tmp_path / name / "out",
            work=tmp_path / name / "work",
            checkpoints=CheckpointPlace((tmp_path / "store").as_uri(), key) if key else None,
        )

    return make


@pytest.fixture(scope="session")
def file_bytes():
    """file_bytes(directory) -> contents of all files below it by relative name."""

    def read(directory: Path) -> dict[str, bytes]:
        return {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }

    return read

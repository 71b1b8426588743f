"""Measures the peak memory of trainings on a GPU and prints it beside what `regrow plan` predicts.

On a machine with one GPU of 80 GB, from the repository's root, all in one call of nine minutes:

    export PYTHONPATH=$PWD/infra/typing
    python -m tests.bench.memory_table --out $OUT --place /dev/shm/memory_table

    ... --only 8b    those whose names hold "8b"
    ... --tiny       on a CPU, in small: does it run?
    ... --predict    the predictions alone; needs no GPU

Every setting is the real worker in a process of its own: random weights in the shape of a known
model, packed rows of random tokens, three steps. Its figure is torch's own peak
(`max_memory_allocated`), so settings run side by side as long as their forecasts fit the card
together. A result is written when it is there; a later call with the same `--out` goes on. The
models take 20 GB of `--place`; settings that need bitsandbytes are left out without it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regrow.tasks.forecast.activations import KERNELS
from regrow.tasks.forecast.memory import GIB, Memory, Setting, memory
from regrow.tasks.forecast.model_shape import ModelShape, model_shape
from regrow.tasks.forecast.trainable import all_weights, with_adapter
from regrow.tasks.modeling.adapter_settings import AdapterSettings
from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.spec import TrainPlacement, TrainSpec

LLAMA = {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "small": {  # large enough that no block of 512 bytes is seen
        "model_type": "llama",
        "vocab_size": 16000,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "0.5b": {  # Qwen2.5-0.5B
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "1b": LLAMA
    | {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": LLAMA
    | {  # Llama-3.1-8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
NF4 = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


LEARNT = 0.6
"""Share of each example's tokens."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One training to measure."""

    model: str
    way: str
    """full, lora or qlora."""
    row_tokens: int
    rows: int = 1
    """Of a micro-batch."""
    checkpointing: bool | str = False
    kernels: str = "auto"
    optimizer: str = "adamw_torch_fused"
    accumulation: int = 1

    @property
    def name(self) -> str:
        """As it stands in the table."""
        words = [self.model, self.way, f"{self.rows}x{self.row_tokens}"]
        if self.checkpointing:
            words.append("checkpointed" if self.checkpointing is True else str(self.checkpointing))
        words += ["no kernels"] if self.kernels == "off" else []
        words += [self.optimizer] if self.optimizer != "adamw_torch_fused" else []
        words += [f"{self.accumulation} micro-batches"] if self.accumulation > 1 else []
        return " ".join(words)

    @property
    def policy(self) -> str:
        """What is computed again."""
        return {True: "full", False: "none"}.get(self.checkpointing, str(self.checkpointing))

    @property
    def adapter(self) -> AdapterSpec | None:
        """LoRA r=16 on every linear layer, but for full training."""
        return None if self.way == "full" else AdapterSpec(r=16, alpha=32, target_linear=True)


CASES = (
    Case("0.5b", "full", 2048, rows=4),
    Case("0.5b", "full", 8192, checkpointing=True, accumulation=2),
    Case("0.5b", "lora", 2048, rows=4, kernels="off"),
    Case("1b", "full", 4096, rows=4),
    Case("1b", "full", 4096, rows=2, kernels="off"),
    Case("1b", "full", 32768, checkpointing=True),
    Case("1b", "full", 4096, rows=4, optimizer="adamw_8bit"),
    Case("1b", "lora", 16384, checkpointing=True),
    Case("8b", "lora", 4096, rows=2),
    Case("8b", "lora", 4096, rows=2, checkpointing=True),
    Case("8b", "lora", 4096, rows=2, checkpointing=True, kernels="off"),
    Case("8b", "lora", 32768, checkpointing=True),
    Case("8b", "lora", 32768, checkpointing="selective"),
    Case("8b", "lora", 131072, checkpointing="offload"),
    Case("8b", "lora", 4096, checkpointing="offload", accumulation=2),
    Case("8b", "qlora", 4096, rows=2),
    Case("8b", "qlora", 4096, checkpointing="offload", accumulation=2),
    Case("8b", "qlora", 2048, checkpointing=True),
    Case("8b", "qlora", 32768, checkpointing=True),
)
SMALL = (
    Case("small", "full", 4096, rows=2),
    Case("small", "full", 8192, checkpointing=True, accumulation=2),
    Case("small", "full", 8192, kernels="off"),
    Case("small", "lora", 8192),
    Case("small", "lora", 8192, checkpointing=True, kernels="off"),
    Case("small", "lora", 16384, checkpointing="selective"),
    Case("small", "qlora", 16384, checkpointing="offload"),
)
TINY = (
    Case("tiny", "lora", 64, rows=2),
    Case("tiny", "full", 64, checkpointing=True, optimizer="adamw_torch"),
)


def shape_of(case: Case) -> ModelShape:
    """The model's, from what its config.json will say."""
    return model_shape(MODELS[case.model])


def predicted(case: Case) -> Memory:
    """What `regrow plan` says."""
    shape = shape_of(case)
    trainable = all_weights(shape)
    if case.adapter is not None:
        settings = AdapterSettings(r=16, alpha=32, target_linear=True)
        trainable = with_adapter(shape, settings)
    return memory(
        Setting(
            shape,
            trainable,
            tokens=case.rows * case.row_tokens,
            optimizer=case.optimizer,
            kernels=KERNELS if case.kernels == "auto" else (),
            bits=4 if case.way == "qlora" else 16,
            checkpointing=case.checkpointing,
            accumulates=case.accumulation > 1,
            supervised=LEARNT,
        )
    )


# ---- measuring ----


def make_model(name: str, out: Path, device: str) -> None:
    """Random bfloat16 weights, made on the device they will run on."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(MODELS[name])
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes, max_position_embeddings=65536)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def make_rows(case: Case, out: Path) -> None:
    """Full rows of examples of about 500 tokens, 60 % of each learnt."""
    import numpy as np
    import pyarrow as pa
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from regrow.tasks.modeling.rows import SCHEMA

    vocabulary, random = MODELS[case.model]["vocab_size"], np.random.default_rng(0)
    length = min(512, case.row_tokens)
    examples = case.row_tokens // length
    mask = np.tile(np.arange(length) >= (1 - LEARNT) * length, examples).astype(int)
    count = 3 * case.rows * case.accumulation
    rows = [
        {
            "input_ids": random.integers(8, vocabulary, case.row_tokens).tolist(),
            "loss_mask": mask.tolist(),
            "seq_lens": [length] * examples,
        }
        for _ in range(count)
    ]
    name = "train/shard-00000.arrow"
    (out / "train").mkdir(parents=True)
    with pa.ipc.new_file(str(out / name), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), max_chunksize=64)
    split = {
        "shards": [{"file": name, "rows": count}],
        "rows": count,
        "examples": count * examples,
        "tokens": count * case.row_tokens,
        "supervised_tokens": int(mask.sum()) * count,
    }
    (out / "index.json").write_text(json.dumps({"splits": {"train": split}}))
    words = {f"w{index}": index for index in range(vocabulary)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0"
    ).save_pretrained(out / "tokenizer")


def job_of(case: Case, model: Path, work: Path, device: str) -> Any:
    """What the worker is told."""
    from regrow.tasks.train.job import WorkerJob

    return WorkerJob(
        spec=TrainSpec(
            base_model_digest="0" * 64,
            dtype="bfloat16",
            global_batch_size=case.rows * case.accumulation,
            num_epochs=1,
            max_steps=3,
            learning_rate=1e-5,
            adapter=case.adapter,
            quantization=Quantization(4, NF4) if case.way == "qlora" else None,
            optimizer=case.optimizer,
        ),
        placement=TrainPlacement(
            base_model=str(model),
            micro_batch_size=case.rows,
            saving=Cadence(),
            gradient_checkpointing=case.checkpointing,
            kernels=case.kernels,
            device=device,
            retry_on_oom=False,
            hang_timeout=None,
        ),
        prepared=work / "rows",
        base_model=model,
        out=work / "out",
        work=work,
    )


def measure(case: Case, place: Path, device: str, limit: float) -> dict[str, Any]:
    """One training; {"allocated", ...} in bytes, or {"error"}."""
    from regrow.tasks.train.metrics import read_metrics

    work = place / f"run-{case.name.replace(' ', '-')}"
    shutil.rmtree(work, ignore_errors=True)
    make_rows(case, work / "rows")
    job = job_of(case, place / case.model, work, device)
    job.write(work / "job.json")
    words = [sys.executable, "-m", "regrow.tasks.train.rank", str(work / "job.json")]
    log = work / "log.txt"
    try:
        with log.open("wb") as file:
            done = subprocess.run(words, stdout=file, stderr=file, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {limit:.0f} s; it ended with {_tail(log)}"}
    if done.returncode:
        return {"error": _tail(log)}
    timing = json.loads(job.result_path.read_text())["timing"]
    peak = max(r["memory_gib"] for r in read_metrics(job.metrics_path) if "loss" in r)
    shutil.rmtree(work, ignore_errors=True)
    wanted = ("device", "kernels", "recomputes", "forecast_memory_gib", "free_memory_gib")
    return {"allocated": peak * GIB} | {n: timing[n] for n in wanted if n in timing}


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:].strip() or "no output"


def missing(case: Case) -> str:
    """The package that a case needs and this machine has not."""
    needs = case.way == "qlora" or case.optimizer.endswith("8bit")
    return "bitsandbytes" if needs and find_spec("bitsandbytes") is None else ""


class Card:
    """Shares out one GPU's memory: cases run side by side as long as their forecasts fit."""

    def __init__(self, room: float) -> None:
        self._left = self._room = room
        self._free = threading.Condition()

    @contextlib.contextmanager
    def share(self, case: Case) -> Iterator[float]:
        """Inside, the case has the bytes it is given."""
        needed = min(1.1 * predicted(case).total, self._room)
        with self._free:
            self._free.wait_for(lambda: self._left >= needed)
            self._left -= needed
        try:
            yield needed
        finally:
            with self._free:
                self._left += needed
                self._free.notify_all()


# ---- the table ----


def line(case: Case, found: dict[str, Any] | None) -> str:
    """One row of the table, in GiB."""
    guess = predicted(case)
    cells = [case.name, f"{guess.allocated / GIB:.2f}"]
    if found is None:
        cells += ["", "", guess.moment]
    elif "error" in found:
        cells += ["failed", "", found["error"].splitlines()[-1][:90]]
    else:
        off = guess.allocated / found["allocated"] - 1
        cells += [f"{found['allocated'] / GIB:.2f}", f"{off:+.1%}", guess.moment]
    return "| " + " | ".join(cells) + " |"


HEAD = """\
| setting | allocated, predicted (GiB) | measured | off by | fullest |
| --- | --- | --- | --- | --- |"""


@dataclasses.dataclass
class Table:
    """The cases, their results so far, and the file that keeps them."""

    path: Path
    end: float
    """When to stop, by `time.monotonic`."""
    done: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def read(self) -> None:
        """What an earlier run has measured."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = [json.loads(line) for line in lines]
        self.done = {record["name"]: record for record in records if "error" not in record}

    def add(self, case: Case, found: dict[str, Any]) -> None:
        """Keep a result at once: the run may be cut off."""
        self.done[case.name] = found
        guess = predicted(case)
        record = {"name": case.name, "date": time.strftime("%Y-%m-%d"), **found}
        record |= {"predicted": guess.allocated, "parts": guess.parts, "moment": guess.moment}
        with _WRITING, self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(line(case, found), flush=True)

    def run(self, cases: Sequence[Case], place: Path, tiny: bool, at_once: int) -> None:
        """Measure what is not there yet, as long as there is time."""
        from transformers import PreTrainedTokenizerFast  # lazily made: not in several threads

        assert PreTrainedTokenizerFast
        device, card = "cpu" if tiny else "cuda", Card(_CARD)
        for name in dict.fromkeys(case.model for case in cases):
            if not (place / name / "config.json").is_file():
                words = [sys.executable, "-m", "tests.bench.memory_table", "--make", name]
                subprocess.run([*words, "--place", str(place), *["--tiny"] * tiny], check=True)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda case: self._one(case, place, device, card), cases))

    def _one(self, case: Case, place: Path, device: str, card: Card) -> None:
        lacks = missing(case)
        if lacks:
            self.add(case, {"error": f"{lacks} is not installed"})
            return
        with card.share(case):
            left = self.end - time.monotonic()
            if left < _LEAST_SECONDS:
                self.add(case, {"error": "there was no time left"})
                return
            begin = time.monotonic()
            try:
                found = measure(case, place, device, left)
            except Exception as error:  # noqa: BLE001 (the other settings are measured all the same)
                found = {"error": f"{type(error).__name__}: {error}"}
            self.add(case, found | {"seconds": round(time.monotonic() - begin)})


_WRITING = threading.Lock()
_CARD = 78 * GIB  # of an H100 80GB, less what its driver holds
_LEAST_SECONDS = 20  # a case takes longer


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--place", type=Path, default=Path("/tmp/memory_table"))
    parser.add_argument("--seconds", type=float, default=540, help="of the whole run")
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--make", help="only make this model")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    if options.make:
        make_model(options.make, options.place / options.make, "cpu" if options.tiny else "cuda")
        return
    cases = [case for case in (TINY if options.tiny else CASES) if options.only in case.name]
    if options.predict or options.out is None:
        print(HEAD, *(line(case, None) for case in cases), sep="\n")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    options.place.mkdir(parents=True, exist_ok=True)
    table = Table(options.out / "memory_table.jsonl", end)
    table.read()
    left = [case for case in cases if case.name not in table.done]
    table.run(left, options.place, options.tiny, options.at_once)
    print(HEAD, *(line(case, table.done[case.name]) for case in cases), sep="\n")
    sys.exit(any("error" in table.done[case.name] for case in cases))


if __name__ == "__main__":
    main()

"""Measures the peak memory of trainings on a GPU and prints it beside what `regrow plan` predicts.

    python tests/bench/memory_table.py --out OUT             all settings that OUT has not yet
    python tests/bench/memory_table.py --out OUT --only 8b   those whose names hold "8b"
    python tests/bench/memory_table.py --out OUT --tiny      on a CPU, in small: does it run?
    python tests/bench/memory_table.py --predict             the predictions alone; needs no GPU

Every setting is the real worker in a process of its own: random weights in the shape of a known
model, packed rows of random tokens, three steps. "allocated" is torch's own peak
(`max_memory_allocated`), which the bar of 10 % is about; "used" is what the driver says, with
CUDA's context and what the allocator reserved. Needs one GPU of 80 GB, bitsandbytes, 20 GB of
disk and about ten minutes; it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
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
    Case("8b", "qlora", 4096, rows=2),
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


class DriverMemory(threading.Thread):
    """Asks nvidia-smi for the memory in use, and keeps the most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = _used()
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.2):
            self.peak = max(self.peak, _used())

    def stop(self) -> float:
        """Bytes used at most beyond those before."""
        self._end.set()
        self.join()
        return self.peak - self.before


def _used() -> float:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0  # no driver here


def measure(case: Case, place: Path, device: str) -> dict[str, Any]:
    """One training; {"allocated", "used"} in bytes, or {"error"}."""
    from regrow.infra.launch import WorkerFailed, run_workers
    from regrow.tasks.train.job import WorkerJob
    from regrow.tasks.train.metrics import read_metrics

    model, work = place / case.model, place / "run"
    if not model.is_dir():
        make_model(case.model, model, device)
    shutil.rmtree(work, ignore_errors=True)
    make_rows(case, work / "rows")
    job = WorkerJob(
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
        ),
        prepared=work / "rows",
        base_model=model,
        out=work / "out",
        work=work,
    )
    job.write(work / "job.json")
    driver = DriverMemory()
    driver.start()
    log = place / "log.txt"
    try:
        run_workers(
            "regrow.tasks.train.worker",
            [str(work / "job.json")],
            num_processes=1,
            on_line=lambda line: None,
            log_path=log,
        )
    except WorkerFailed as failure:
        return {"error": failure.message[-1500:], "used": driver.stop()}
    timing = json.loads(job.result_path.read_text())["timing"]
    peak = max(r["memory_gib"] for r in read_metrics(job.metrics_path) if "loss" in r)
    kernels = timing.get("kernels")
    found = {"allocated": peak * GIB, "used": driver.stop(), "device": timing["device"]}
    return found | {"kernels": kernels}


# ---- the table ----


def line(case: Case, found: dict[str, Any] | None) -> str:
    """One row of the table, in GiB."""
    guess = predicted(case)
    cells = [case.name, f"{guess.allocated / GIB:.2f}"]
    if found is None:
        cells += ["", "", f"{guess.total / GIB:.2f}", "", guess.moment]
    elif "error" in found:
        cells += [
            "failed",
            "",
            f"{guess.total / GIB:.2f}",
            "",
            found["error"].splitlines()[-1][:80],
        ]
    else:
        off = guess.allocated / found["allocated"] - 1
        cells += [f"{found['allocated'] / GIB:.2f}", f"{off:+.1%}"]
        cells += [f"{guess.total / GIB:.2f}", f"{found['used'] / GIB:.2f}", guess.moment]
    return "| " + " | ".join(cells) + " |"


HEAD = """\
| setting | allocated, predicted | measured | off by | used, predicted | measured | fullest |
| --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--place", type=Path, default=Path("/tmp/memory_table"))
    options = parser.parse_args()
    cases = [case for case in (TINY if options.tiny else CASES) if options.only in case.name]
    if options.predict or options.out is None:
        print(HEAD, *(line(case, None) for case in cases), sep="\n")
        return
    path = options.out / "memory_table.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    options.place.mkdir(parents=True, exist_ok=True)
    records = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    done = {record["name"]: record for record in records if "error" not in record}
    for case in cases:
        if case.name not in done:
            begin = time.monotonic()
            found = measure(case, options.place, "cpu" if options.tiny else "cuda")
            done[case.name] = found
            record = {"name": case.name, "date": time.strftime("%Y-%m-%d"), **found}
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{case.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print(HEAD, *(line(case, done[case.name]) for case in cases), sep="\n")
    sys.exit(any("error" in done[case.name] for case in cases))


if __name__ == "__main__":
    main()

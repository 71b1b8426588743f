"""Measures many GPUs: loss against one GPU, scaling, and what a checkpoint costs the loop.

    python tests/bench/gpu_parallel.py --out OUT            on a machine with two GPUs
    python tests/bench/gpu_parallel.py --out OUT --tiny     the same on two CPU ranks, in small

The matrix of the bar, and what is to be measured for FSDP2's scaling, each in one GPU session on
two H200 (about 40 s a case):

    python tests/bench/gpu_parallel.py --out OUT --only matrix
        {DDP, FSDP2, ZeRO-3, CP=2, TP=2} x {LoRA, QLoRA, full}, and one GPU for each kind
    python tests/bench/gpu_parallel.py --out OUT --only weak
        full: one GPU with half the rows; FSDP2 on two as it is, with `reshard_after_forward` off,
        and with two rows in each micro-batch

Full training with FSDP2 gathers float32 weights twice for each micro-batch (forward and backward)
and lets gradients wait whole, in float32, for the last one: found by reading Accelerate 1.15's
`fsdp2_prepare_model` and the Trainer's `no_sync`. The first setting takes one of the gathers away,
for all weights held whole; the second halves how often they happen.

Random weights in the shape of Llama-3.1-8B with fewer layers; random rows. Every run is the real
worker in processes of its own. The global batch is the same on one GPU and on two, so that the
losses can be compared; scaling is then harder than weak scaling, where each GPU keeps its work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regrow.infra.launch import WorkerFailed, run_workers
from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.modeling.rows import SCHEMA
from regrow.tasks.train.job import CheckpointPlace, WorkerJob
from regrow.tasks.train.metrics import read_metrics
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.spec import AdapterSpec, TrainPlacement, TrainSpec

FSDP = {
    "version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "state_dict_type": "FULL_STATE_DICT",
}
DEEPSPEED = Path(__file__).parents[2] / "configs" / "deepspeed"
WAYS = {
    "ddp": Sharding(),
    "fsdp2": Sharding(fsdp=FSDP),
    "fsdp2-kept": Sharding(fsdp=FSDP | {"reshard_after_forward": False}),
    "zero3": Sharding(deepspeed=json.loads((DEEPSPEED / "zero3_bf16.json").read_text())),
    "cp": Sharding(fsdp=FSDP, context_parallel_size=2),
    "tp": Sharding(tensor_parallel_size=2),
}
NF4 = Quantization(
    4,
    {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "bfloat16",  # FSDP2 divides no others
    },
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a measurement is."""

    model: dict[str, Any]
    tokens: int
    rows: int
    steps: int
    device: str


LARGE = Size(
    model={
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    tokens=4096,
    rows=8,
    steps=12,
    device="cuda",
)
TINY = Size(
    model={
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    tokens=64,
    rows=4,
    steps=4,
    device="cpu",
)


def make_model(size: Size, out: Path) -> None:
    """Random bfloat16 weights, made on the device they will run on."""
    torch.manual_seed(0)
    with torch.device(size.device):
        model = LlamaForCausalLM(LlamaConfig(**size.model, tie_word_embeddings=False))
    model.to(torch.bfloat16).save_pretrained(out)


def make_rows(size: Size, out: Path) -> None:
    """Rows of four examples; a skewed choice of tokens, so that there is something to learn."""
    random = np.random.default_rng(0)
    vocabulary = size.model["vocab_size"]
    (out / "train").mkdir(parents=True)
    rows, supervised = [], 0
    for _ in range(3 * size.rows):
        ids = (vocabulary * random.random(size.tokens) ** 4).astype(int)
        mask = np.ones(size.tokens, dtype=int)
        mask[:: size.tokens // 4] = 0
        supervised += int(mask.sum())
        lengths = [size.tokens // 4] * 4
        rows.append({"input_ids": ids.tolist(), "loss_mask": mask.tolist(), "seq_lens": lengths})
    name = "train/shard-00000.arrow"
    with pa.ipc.new_file(str(out / name), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), max_chunksize=64)
    split = {
        "shards": [{"file": name, "rows": len(rows)}],
        "rows": len(rows),
        "examples": 4 * len(rows),
        "tokens": size.tokens * len(rows),
        "supervised_tokens": supervised,
    }
    (out / "index.json").write_text(json.dumps({"splits": {"train": split}}))
    words = {f"w{index}": index for index in range(vocabulary)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0"
    ).save_pretrained(out / "tokenizer")


def measure(
    size: Size,
    place: Path,
    name: str,
    ranks: int,
    way: str,
    kind: str,
    saving: Cadence,
    steps: int,
    micro_batch_size: int = 1,
    rows: int | None = None,
) -> dict[str, Any]:
    """One training; its losses, rate, memory and the time it waited for checkpoints.

    Args:
        rows: of a step; None: as `size` says.
    """
    work = place / "runs" / name
    work.mkdir(parents=True)
    whole = kind == "full"
    job = WorkerJob(
        spec=TrainSpec(
            base_model_digest="0" * 64,
            dtype="bfloat16",
            global_batch_size=rows or size.rows,
            quantization=NF4 if kind == "qlora" else None,
            num_epochs=1,
            max_steps=steps,
            learning_rate=1e-5 if whole else 1e-4,
            adapter=None if whole else AdapterSpec(r=16, alpha=32, target_linear=True),
            optimizer="adamw_torch_fused" if size.device == "cuda" else "adamw_torch",
            warmup_steps=2,
        ),
        placement=TrainPlacement(
            base_model=str(place / "model"),
            num_processes=ranks,
            micro_batch_size=micro_batch_size,
            saving=saving,
            save_total_limit=1,
            gradient_checkpointing=True,
            device=size.device,
            hang_timeout=90.0,
            sharding=WAYS[way],
        ),
        prepared=place / "rows",
        base_model=place / "model",
        out=work / "out",
        work=work,
        checkpoints=CheckpointPlace((work / "store").as_uri(), "checkpoints/a"),
    )
    job.write(work / "job.json")
    begin = time.monotonic()
    found: dict[str, Any] = {"run": name}
    try:
        run_workers(
            "regrow.tasks.train.worker",
            [str(work / "job.json")],
            num_processes=ranks,
            on_line=lambda line: None,
            log_path=place / f"{name}.log",
        )
        records = [r for r in read_metrics(job.metrics_path) if "loss" in r]
        rates = [r["tokens_per_second"] for r in records[3:]]
        timing = json.loads(job.result_path.read_text())["timing"]
        found |= {
            "losses": [r["loss"] for r in records],
            "tokens_per_second": statistics.median(rates) if rates else None,
            "slowest": min(rates) if rates else None,
            "mean_rate": len(rates) / sum(1 / rate for rate in rates) if rates else None,
            "memory_gib": records[-1]["memory_gib"],
            "saving_seconds": timing["saving_seconds"],
            "device": timing["device"],
            "saves": re.findall(r"checkpoint of step .*", (place / f"{name}.log").read_text()),
        }
    except WorkerFailed as failure:
        found["error"] = failure.message[-1500:]
    found["wall"] = time.monotonic() - begin
    shutil.rmtree(work)
    return found


def main() -> None:
    """Run all cases and print a table; the records go to OUT/gpu_parallel.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--place", type=Path, default=Path("/tmp/gpu_parallel"))
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    size = TINY if options.tiny else LARGE
    shutil.rmtree(options.place, ignore_errors=True)
    options.place.mkdir(parents=True)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    make_model(size, options.place / "model")
    make_rows(size, options.place / "rows")
    print(f"torch {torch.__version__}, model and rows in {time.monotonic() - begin:.0f} s")
    if size.device == "cuda":
        torch.cuda.empty_cache()
        subprocess.run(["nvidia-smi", "topo", "-m"], check=False)
    never = Cadence()
    cases = [
        ("lora-1", 1, "ddp", "lora", never, size.steps),
        ("lora-ddp-2", 2, "ddp", "lora", never, size.steps),
        ("lora-fsdp2-2", 2, "fsdp2", "lora", never, size.steps),
        ("full-1", 1, "ddp", "full", never, size.steps),
        ("full-fsdp2-2", 2, "fsdp2", "full", never, size.steps),
        # Far enough apart that one is stored before the next is taken.
        ("full-fsdp2-2-saving", 2, "fsdp2", "full", Cadence(steps=4 * size.steps), 6 * size.steps),
        *matrix(size, never),
        # Weak scaling: each GPU keeps its work.
        ("weakfull-1", 1, "ddp", "full", never, size.steps, 1, size.rows // 2),
        ("weakfull-fsdp2-2", 2, "fsdp2", "full", never, size.steps),
        ("weakfull-fsdp2-kept-2", 2, "fsdp2-kept", "full", never, size.steps),
        ("weakfull-fsdp2-two-rows-2", 2, "fsdp2", "full", never, size.steps, 2),
    ]
    found: dict[str, dict[str, Any]] = {}
    with (options.out / "gpu_parallel.jsonl").open("w") as file:
        for case in cases:
            if options.only not in case[0]:
                continue
            record = measure(size, options.place, *case)
            file.write(json.dumps(record) + "\n")
            file.flush()
            found[case[0]] = record
            print(line(record, found), flush=True)
            if "error" in record:
                shutil.copyfile(options.place / f"{case[0]}.log", options.out / f"{case[0]}.log")
    sys.exit(any("error" in record for record in found.values()))


def matrix(size: Size, never: Cadence) -> Iterator[tuple[Any, ...]]:
    """Every way on two GPUs with every kind that it takes; one GPU first, to compare with."""
    for kind in ("lora", "qlora", "full"):
        yield f"matrix{kind}-1", 1, "ddp", kind, never, size.steps
        for way in ("ddp", "fsdp2", "zero3", "cp", "tp"):
            if not (way == "tp" and kind == "qlora"):  # refused: a quantized base is not divided
                yield f"matrix{kind}-{way}-2", 2, way, kind, never, size.steps


def line(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """A record for people, compared with one GPU where that was measured."""
    if "error" in record:
        return f"{record['run']:22} FAILED: {record['error']}"
    text = (
        f"{record['run']:22} {record['tokens_per_second']:9,.0f} tok/s  mean "
        f"{record['mean_rate']:9,.0f}  {record['memory_gib']:5.1f} GiB  waited "
        f"{record['saving_seconds']:.2f} s  whole {record['wall']:.0f} s"
    )
    text += "".join(f"\n    {saved}" for saved in record["saves"])
    alone = found.get(record["run"].split("-")[0] + "-1")
    if alone and alone is not record and "losses" in alone:
        pairs = list(zip(record["losses"], alone["losses"], strict=False))
        worst = max(abs(a - b) for a, b in pairs)
        share = record["tokens_per_second"] / alone["tokens_per_second"] / 2
        text += f"  loss differs by {worst:.4f} at most, {share:.1%} of two GPUs"
    return text


if __name__ == "__main__":
    main()

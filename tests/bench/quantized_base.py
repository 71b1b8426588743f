"""Speed and memory of training an adapter on a base in 16, 8 and 4 bits, on a GPU.

    python tests/bench/quantized_base.py [--layers 8] [--length 4096]

A random Llama of the 8B shape with fewer layers; each base trains 12 steps of one row, the last 8
are timed. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.metrics import read_metrics
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.spec import TrainPlacement, TrainSpec
from regrow.tasks.train.worker import train

STEPS, WARM = 12, 4
NF4 = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
BASES = {"bf16": None, "int8": Quantization(8), "nf4, double": Quantization(4, NF4)}
OPTIMIZERS = ("adamw_torch_fused", "paged_adamw_8bit")


def write_model(out: Path, layers: int) -> Path:
    """The shape of Llama 3 8B with fewer layers, random weights in bfloat16."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out)
    del model
    torch.cuda.empty_cache()
    return out


def write_prepared(out: Path, length: int) -> Path:
    """16 rows of two examples."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    random = np.random.default_rng(0)
    rows = []
    for _ in range(16):
        mask = np.ones(length, dtype=np.uint8)
        mask[[0, length // 2]] = 0
        ids = random.integers(3, 128000, length)
        rows.append({"input_ids": ids, "loss_mask": mask, "seq_lens": [length // 2] * 2})
    lists = {"input_ids": pa.int32(), "loss_mask": pa.uint8(), "seq_lens": pa.int32()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in lists.items()])
    (out / "train").mkdir(parents=True)
    with pa.ipc.new_file(str(out / "train/shard-00000.arrow"), schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    entry = {
        "shards": [{"file": "train/shard-00000.arrow", "rows": 16}],
        "rows": 16,
        "examples": 32,
        "tokens": 16 * length,
        "supervised_tokens": 16 * (length - 2),
    }
    (out / "index.json").write_text(json.dumps({"splits": {"train": entry}}))
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(
        out / "tokenizer"
    )
    return out


def measure(
    name: str, quantization: Quantization | None, optimizer: str, model: Path, data: Path
) -> str:
    """One row of the table."""
    work = model.parent / f"{name}-{optimizer}"
    spec = TrainSpec(
        "0" * 64,
        "bfloat16",
        1,
        1,
        1e-4,
        adapter=AdapterSpec(r=16, alpha=32, target_linear=True),
        quantization=quantization,
        optimizer=optimizer,
        max_steps=STEPS,
    )
    place = TrainPlacement(str(model), evaluation=Cadence(), saving=Cadence(), device="cuda")
    place = dataclasses.replace(place, gradient_checkpointing=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    job = WorkerJob(spec, place, data, model, work / "out", work / "work")
    train(job)
    records = read_metrics(job.metrics_path)[WARM:]
    speed = median(record["tokens_per_second"] for record in records)
    memory = torch.cuda.max_memory_allocated() / 2**30
    loss = records[-1]["loss"]
    return f"| {name} | {optimizer} | {speed:,.0f} | {memory:.1f} | {loss:.3f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    args = parser.parse_args()
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    device = torch.cuda.get_device_name()
    sys.stdout.write(f"{device}, {args.layers} layers of the 8B shape, {args.length} tokens\n\n")
    sys.stdout.write("| base | optimizer | tokens/s | peak GiB | loss |\n|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as root:
        model = write_model(Path(root) / "model", args.layers)
        data = write_prepared(Path(root) / "data", args.length)
        for name, quantization in BASES.items():
            for optimizer in OPTIMIZERS[: 2 if name.startswith("nf4") else 1]:
                if has_bitsandbytes or quantization is None:
                    row = measure(name, quantization, optimizer, model, data)
                    sys.stdout.write(row + "\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()

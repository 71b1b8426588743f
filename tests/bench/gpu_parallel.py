"""Measures many GPUs: loss against one GPU, weak scaling, and what a checkpoint costs the loop.

    python tests/bench/gpu_parallel.py --out OUT            on a machine with two GPUs
    python tests/bench/gpu_parallel.py --out OUT --tiny     the same on two CPU ranks, in small

In order of worth, `--only` names the parts (joined by commas), `--limit` the seconds after which no
further case is begun:

    weak    each GPU keeps its work: one micro-batch of four packed rows of 4,096 tokens in a step,
            8 layers; LoRA on one GPU and with DDP on two, all weights on one and with FSDP2 on two
    full    those of them with all weights
    wide    the same with all weights and eight rows, which a whole 8B model has the memory for
    matrix  {DDP, FSDP2, ZeRO-3, CP=2, TP=2} x {LoRA, QLoRA, full} and one GPU for each kind, 4
            layers, the same four rows in each step; three cases at a time, so rates mean nothing
    odd     those of `matrix` that PEFT's own layers computed before, and what belongs to them
    saving  FSDP2, all weights of 4 layers (23 GB of state), two checkpoints: what each costs the
            loop of its time, were there one each minute
    acc     weak scaling with four micro-batches of two rows in a step
    kept    FSDP2 of `weak` with `reshard_after_forward` off

Random weights in the shape of Llama-3.1-8B with fewer layers; random rows, all of one length. Every
run is the real worker in processes of its own, with what recipes have by default; its processes are
killed when the last step is reported: the final model is not written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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
    "kept": Sharding(fsdp=FSDP | {"reshard_after_forward": False}),
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
_PATIENCE = 100.0  # seconds for one case; a hang would take all others' time
_SAVING_PATIENCE = 150.0  # for one that waits for its checkpoints, too
_STEP = re.compile(r"step (\d+)/(\d+) \| loss")
_SAVED = re.compile(r"checkpoint of step \d+ is safe.*")


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a measurement is."""

    model: dict[str, Any]
    deep: int
    """Layers of the models whose rate is measured."""
    shallow: int
    """Layers of the others."""
    tokens: int
    steps: int
    save_every: int
    at_once: int
    device: str


LARGE = Size(
    model={
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    deep=8,
    shallow=4,
    tokens=4096,
    steps=12,
    save_every=75,  # some 24 s apart: writing one takes no longer
    at_once=3,
    device="cuda",
)
TINY = Size(
    model={
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    deep=2,
    shallow=1,
    tokens=64,
    steps=6,
    save_every=4,
    at_once=1,
    device="cpu",
)
_ALL = ("weak", "wide", "matrix", "saving", "acc", "kept")
MANY = 48
ROWS = 4
"""Rows of 4,096 tokens in a step of the matrix, and of each GPU in one of `weak`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One training."""

    name: str
    """PART + KIND - WAY - RANKS; of one GPU: PART + KIND - 1."""
    ranks: int
    way: str
    kind: str
    layers: int
    steps: int
    rows: int = ROWS
    micro_batch_size: int = 1
    saving: Cadence = dataclasses.field(default_factory=Cadence)
    kernels: str = "auto"
    there: int = 24
    """Rows that there are: steps are of one size where they are whole epochs."""

    @property
    def patience(self) -> float:
        """Seconds after which it is given up."""
        return _SAVING_PATIENCE if self.saving.steps else _PATIENCE


def parts(size: Size) -> dict[str, list[Case]]:
    """All cases, the most valuable first."""
    deep, steps, every = size.deep, size.steps, size.save_every
    more = max(steps * 2 // 3, 5)
    full = [
        Case("weakfull-1", 1, "ddp", "full", deep, steps, ROWS, ROWS),
        Case("weakfull-fsdp2-2", 2, "fsdp2", "full", deep, steps, 2 * ROWS, ROWS),
    ]
    return {
        "weak": [
            Case("weaklora-1", 1, "ddp", "lora", deep, steps, ROWS, ROWS),
            Case("weaklora-ddp-2", 2, "ddp", "lora", deep, steps, 2 * ROWS, ROWS),
            *full,
        ],
        "full": full,
        "wide": [
            Case("widefull-1", 1, "ddp", "full", deep, steps, 2 * ROWS, 2 * ROWS, there=MANY),
            Case("widefull-fsdp2-2", 2, "fsdp2", "full", deep, steps, 4 * ROWS, 2 * ROWS,
                 there=MANY),
        ],
        "matrix": sorted(matrix(size), key=lambda case: case.ranks),
        "odd": [case for case in sorted(matrix(size), key=lambda c: c.ranks) if is_odd(case)],
        "saving": [
            Case(
                "saving-fsdp2-2", 2, "fsdp2", "full", size.shallow, 2 * every + 2, 2 * ROWS, ROWS,
                Cadence(steps=every),
            ),
        ],
        "acc": [
            Case("accfull-1", 1, "ddp", "full", deep, more, 2 * ROWS, 2, there=MANY),
            Case("accfull-fsdp2-2", 2, "fsdp2", "full", deep, more, 4 * ROWS, 2, there=MANY),
        ],
        "kept": [Case("weakfull-kept-2", 2, "kept", "full", deep, steps, 2 * ROWS, ROWS)],
    }  # fmt: skip


def matrix(size: Size) -> Iterator[Case]:
    """Every way on two GPUs with every kind that it takes, and one GPU to compare with."""
    on_gpus = size.device == "cuda"
    for kind in ("full", "lora", "qlora") if on_gpus else ("full", "lora"):
        yield Case(f"matrix{kind}-1", 1, "ddp", kind, size.shallow, size.steps)
        if kind != "full" and on_gpus:  # tensor parallelism computes adapters as PEFT does
            name = f"matrix{kind}-peft-1"
            yield Case(name, 1, "ddp", kind, size.shallow, size.steps, kernels="off")
        for way in ("fsdp2", "ddp", "zero3", "cp", "tp"):
            if way != "tp" or on_gpus:  # Accelerate takes GPUs only
                yield Case(f"matrix{kind}-{way}-2", 2, way, kind, size.shallow, size.steps)


def is_odd(case: Case) -> bool:
    """Whether it has an adapter that PEFT's own layers computed before 2026-11-22, 15:00; or is
    what such a one is compared with."""
    kind, _, way = case.name.removeprefix("matrix").partition("-")
    ways = {"qlora": ("1", "peft-1", "fsdp2-2", "zero3-2", "cp-2", "tp-2"), "full": ()}
    return way in ways.get(kind, ("1", "peft-1", "zero3-2", "tp-2"))


def make_model(size: Size, layers: int, out: Path) -> None:
    """Random bfloat16 weights, made on the device they will run on."""
    torch.manual_seed(0)
    config = LlamaConfig(**size.model, num_hidden_layers=layers, tie_word_embeddings=False)
    with torch.device(size.device):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(out)


def make_rows(size: Size, out: Path, count: int) -> None:
    """Rows of four examples; a skewed choice of tokens, so that there is something to learn."""
    random = np.random.default_rng(0)
    vocabulary = size.model["vocab_size"]
    (out / "train").mkdir(parents=True)
    rows, supervised = [], 0
    for _ in range(count):
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


def job_of(size: Size, place: Path, case: Case) -> WorkerJob:
    """What the worker is told."""
    work, model = place / "runs" / case.name, place / f"model-{case.layers}"
    whole = case.kind == "full"
    return WorkerJob(
        spec=TrainSpec(
            base_model_digest="0" * 64,
            dtype="bfloat16",
            global_batch_size=case.rows,
            quantization=NF4 if case.kind == "qlora" else None,
            num_epochs=1,
            max_steps=case.steps,
            learning_rate=1e-5 if whole else 1e-4,
            adapter=None if whole else AdapterSpec(r=16, alpha=32, target_linear=True),
            optimizer="adamw_torch_fused" if size.device == "cuda" else "adamw_torch",
            warmup_steps=2,
        ),
        placement=TrainPlacement(
            base_model=str(model),
            num_processes=case.ranks,
            micro_batch_size=case.micro_batch_size,
            saving=case.saving,
            save_total_limit=1,
            gradient_checkpointing=True,
            device=size.device,
            hang_timeout=case.patience - 10,
            kernels=case.kernels,
            sharding=WAYS[case.way],
        ),
        prepared=place / f"rows-{case.there}",
        base_model=model,
        out=work / "out",
        work=work,
        checkpoints=CheckpointPlace((work / "store").as_uri(), "checkpoints/a"),
    )


class End:
    """Kills a training's processes when it has reported its last step and stored its checkpoints,
    or when its time is up."""

    def __init__(self, job: WorkerJob, checkpoints: int, patience: float) -> None:
        self._words, self._missing = str(job.work / "job.json"), checkpoints
        self._stepped = self.late = False
        self._timer = threading.Timer(patience, self._too_late)

    def __enter__(self) -> End:
        self._timer.start()
        return self

    def __exit__(self, *fault: Any) -> None:
        self._timer.cancel()

    @property
    def came(self) -> bool:
        """Whether all was reported that was to come."""
        return self._stepped and self._missing <= 0

    def hear(self, line: str) -> None:
        """A line of the output."""
        found = _STEP.match(line)
        self._stepped = self._stepped or bool(found and found[1] == found[2])
        self._missing -= bool(_SAVED.search(line))
        if self.came:
            self._kill()

    def _too_late(self) -> None:
        self.late = True
        self._kill()

    def _kill(self) -> None:
        time.sleep(0.5)  # the last record is written after the line that tells of it
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if self._words in process.cmdline():
                    process.kill()


def measure(size: Size, place: Path, case: Case, env: Mapping[str, str]) -> dict[str, Any]:
    """One training; its losses, rate, memory and what its checkpoints cost."""
    job, log = job_of(size, place, case), place / f"{case.name}.log"
    job.work.mkdir(parents=True)
    job.write(job.work / "job.json")
    begin = time.monotonic()
    checkpoints = len(job.placement.saving.due(case.steps, case.steps))
    with End(job, checkpoints, case.patience) as end:
        try:
            run_workers(
                "regrow.tasks.train.rank",
                [str(job.work / "job.json")],
                num_processes=case.ranks,
                on_line=end.hear,
                log_path=log,
                env=env,
            )
        except WorkerFailed as failure:
            message = f"no end in {case.patience:.0f} s" if end.late else failure.message[-1500:]
            error = {} if end.came else {"error": message}
        else:
            error = {}
    found: dict[str, Any] = {"run": case.name, "wall": time.monotonic() - begin} | error
    if not error:
        records = [r for r in read_metrics(job.metrics_path) if "loss" in r]
        found |= figures(records, case, _SAVED.findall(log.read_text()))
        found["kernels"] = re.findall(r"(?:kernels \(.*|FSDP sends.*)", log.read_text())
    shutil.rmtree(job.work)
    return found


def figures(records: list[dict[str, Any]], case: Case, saves: list[str]) -> dict[str, Any]:
    """What a training's records say."""
    rates = [r["tokens_per_second"] for r in records[3:]]
    tokens = {b["tokens"] - a["tokens"] for a, b in itertools.pairwise(records)}
    if len(tokens) > 1:
        raise ValueError(f"{case.name}: steps of {sorted(tokens)} tokens: their rates are no rate")
    found: dict[str, Any] = {
        "losses": [r["loss"] for r in records],
        "norms": [r.get("grad_norm") for r in records],
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "mean_rate": len(rates) / sum(1 / rate for rate in rates),
        "memory_gib": records[-1]["memory_gib"],
        "saves": saves,
    }
    if case.saving.steps:
        found["lost"] = lost(records, int(case.saving.steps), saves)
    return found


def lost(records: list[dict[str, Any]], every: int, saves: list[str]) -> list[dict[str, float]]:
    """Of each checkpoint: seconds that training waited, and that its later steps took longer than
    as many of those before the first."""
    seconds = [records[0]["seconds"]]
    seconds += [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(records)]
    # Steps before these also wait for the buffers of the copies to be made, in a thread.
    calm = statistics.mean(seconds[every // 2 : every])
    early = sum(seconds[3 : every // 2]) - calm * len(seconds[3 : every // 2])
    found = []
    for number, said in enumerate(saves, start=1):
        waited = float(re.findall(r"waited ([\d.]+) s", said)[0])
        after = seconds[number * every : (number + 1) * every]
        slower = sum(after) - calm * len(after)
        cost = {"waited": waited, "slower": slower, "steps": len(after), "calm": calm}
        found.append(cost | {"early": early})
    return found


def main() -> None:
    """Run all cases and print a line for each; the records go to OUT/gpu_parallel.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--place", type=Path, default=Path("/tmp/gpu_parallel"))
    parser.add_argument("--only", default="")
    parser.add_argument("--limit", type=float, default=1e9)
    options = parser.parse_args()
    begin = time.monotonic()
    size = TINY if options.tiny else LARGE
    shutil.rmtree(options.place, ignore_errors=True)
    options.place.mkdir(parents=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for count in (24, MANY):
        make_rows(size, options.place / f"rows-{count}", count)
    for layers in sorted({size.deep, size.shallow}):
        make_model(size, layers, options.place / f"model-{layers}")
    say_where(size)
    print(f"models and rows in {time.monotonic() - begin:.0f} s", flush=True)
    runs = Runs(size, options.place, options.out, begin + options.limit)
    wanted = options.only.split(",") if options.only else list(_ALL)
    for name in wanted:
        runs.go(parts(size)[name], size.at_once if name in ("matrix", "odd") else 1)
    print(f"all in {time.monotonic() - begin:.0f} s")
    sys.exit(any("error" in record for record in runs.found.values()))


def say_where(size: Size) -> None:
    """Versions and the machine."""
    for name in ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed"):
        try:
            print(name, importlib.import_module(name).__version__)
        except ImportError as error:
            print(name, "is missing:", error)
    if size.device == "cuda":
        torch.cuda.empty_cache()
        print(torch.cuda.device_count(), "x", torch.cuda.get_device_name(), flush=True)
        subprocess.run(["nvidia-smi", "topo", "-m"], check=False)


class Runs:
    """Runs cases, some of them side by side, and tells of each when it has ended."""

    def __init__(self, size: Size, place: Path, out: Path, deadline: float) -> None:
        self._size, self._place, self._out, self._deadline = size, place, out, deadline
        self._lock = threading.Lock()
        self.found: dict[str, dict[str, Any]] = {}

    def go(self, cases: Sequence[Case], at_once: int) -> None:
        """Run them all, so many at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self._one, cases))

    def _one(self, case: Case) -> None:
        if time.monotonic() > self._deadline:
            print(f"{case.name:22} left out: the time is up", flush=True)
            return
        # Of cases on one GPU that run beside others, every kind has another card.
        card = str(("full", "lora", "qlora").index(case.kind) % 2)
        alone = case.ranks == 1 and self._size.device == "cuda"
        env = {"CUDA_VISIBLE_DEVICES": card} if alone else {}
        try:
            record = measure(self._size, self._place, case, env)
        except Exception as fault:  # noqa: BLE001 (the others go on; it is told)
            record = {"run": case.name, "wall": 0.0, "error": repr(fault)}
        with self._lock:
            self._tell(case, record)

    def _tell(self, case: Case, record: dict[str, Any]) -> None:
        self.found[case.name] = record
        with (self._out / "gpu_parallel.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if "error" in record:
            log = self._place / f"{case.name}.log"
            said = log.read_text()[-6000:] if log.exists() else ""
            with (self._out / "failures.log").open("a") as file:
                file.write(f"==== {case.name}\n{said}\n")
        print(line(record, self.found), flush=True)


def line(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """A record for people, compared with one GPU where that was measured."""
    if "error" in record:
        return f"{record['run']:22} FAILED in {record['wall']:.0f} s: {record['error']}"
    text = (
        f"{record['run']:22} {record['tokens_per_second']:9,.0f} tok/s  slowest "
        f"{record['slowest']:9,.0f}  {record['memory_gib']:5.1f} GiB  loss "
        f"{record['losses'][0]:.4f} to {record['losses'][-1]:.4f}  whole {record['wall']:.0f} s"
    )
    part = record["run"].split("-")[0]
    alone = found.get(part + "-1")
    if "-tp-" in record["run"]:
        alone = found.get(part + "-peft-1", alone)
    if alone and alone is not record and "losses" in alone:
        pairs = list(zip(record["losses"], alone["losses"], strict=False))
        share = record["tokens_per_second"] / alone["tokens_per_second"] / 2
        same = record["run"].startswith("matrix")  # the others have other rows
        worst = max(abs(a - b) for a, b in pairs)
        text += f"  loss differs by {worst:.4f} at most" if same else f"  {share:.1%} of two GPUs"
    text += "".join(f"\n    {said}" for said in record.get("saves", ()))
    costs = record.get("lost", ())
    for cost in costs:
        text += (
            f"\n    waited {cost['waited']:.2f} s; the {cost['steps']} steps after it took "
            f"{cost['slower']:+.2f} s more than as many before the first, {cost['calm']:.3f} s each"
        )
    for cost in costs[:1]:
        text += (
            f"\n    the steps from the 4th on, while its buffers were made: {cost['early']:+.2f} s"
        )
    # Every checkpoint slows the steps after it as the first does, whose steps were all seen; the
    # first alone makes the buffers that all are copied into.
    for number, cost in enumerate(costs, start=1):
        parts = [cost["waited"], max(costs[0]["slower"], 0)]
        parts += [max(cost["early"], 0)] if number == 1 else []
        named = " + ".join(f"{part:.2f}" for part in parts)
        text += (
            f"\n    checkpoint {number}, its wait and what the first slowed: {named} s, "
            f"{sum(parts) / 60:.2%} of the loop's time, one each minute"
        )
    return text


if __name__ == "__main__":
    main()

"""One run of the training-step bench: the worker's own `train` on a job, timed on the device."""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench.step_blocks import recorded_blocks
from tests.bench.step_lag import Lag
from tests.bench.step_profile import Watch, launches_of, summary, waits
from tests.bench.step_workloads import (
    Workload,
    model_directory,
    useful_flops,
    workload,
    write_rows,
)

PEAK = 989.4e12  # dense bfloat16 of an H100 SXM, by its data sheet


def make_job(w: Workload, models: Path, work: Path) -> Any:
    """The job as the train stage writes it."""
    from regrow.tasks.modeling.quantization import Quantization
    from regrow.tasks.train.job import WorkerJob
    from regrow.tasks.train.schedule import Cadence
    from regrow.tasks.train.spec import AdapterSpec, TrainPlacement, TrainSpec

    base = model_directory(w, models)
    adapter = None
    if w.lora:
        moe = w.config["kind"] == "qwen3_moe"
        experts = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj") if w.experts else ()
        attention = tuple(f"{name}_proj" for name in "qkvo")
        mlp = () if moe else ("gate_proj", "up_proj", "down_proj")
        adapter = AdapterSpec(
            r=w.lora,
            alpha=2 * w.lora,
            dropout=w.dropout,
            target_modules=attention + mlp,
            target_parameters=experts,
        )
    nf4 = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    kernels: Any = w.kernels if w.kernels in ("auto", "off") else tuple(w.kernels.split("+"))
    never = Cadence()
    return WorkerJob(
        spec=TrainSpec(
            base_model_digest="0" * 64,
            dtype=w.dtype,
            seed=w.seed,
            global_batch_size=w.rows,
            num_epochs=1,
            max_steps=w.steps,
            learning_rate=w.lr,
            lr_scheduler="constant",
            adapter=adapter,
            quantization=Quantization(4, nf4) if w.nf4 else None,
            optimizer=w.optim,
            fp8=bool(w.fp8),
            row_order="stored",
        ),
        placement=TrainPlacement(
            base_model=str(base),
            micro_batch_size=w.micro or w.rows,
            evaluation=never,
            saving=never,
            kernels=kernels,
            gradient_checkpointing=_checkpointing(w.gc),
            device="cpu" if w.tiny else "cuda",
            hang_timeout=None,
            logging_steps=w.log,
        ),
        prepared=work / "rows",
        base_model=base,
        out=work / "out",
        work=work,
    )


def _checkpointing(text: str) -> Any:
    return {"0": False, "1": True}.get(text, text)


class Clock:
    """Marks the ends of optimizer steps on the device; no wait inside the timed steps."""

    def __init__(self, w: Workload) -> None:
        import torch
        from transformers import TrainerCallback

        clock = self
        self._w, self._torch = w, torch
        self._cuda = not w.tiny
        self.marks: list[Any] = []
        self.peaks = (0.0, 0.0)
        self.retries = 0
        """How often torch had to give memory back, and wait for it, to get some."""
        self.profile: Any = None
        self.waits: Any = None
        self.watch: Any = None
        self._inside = ExitStack()

        class Callback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not clock.marks:
                    clock.mark()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                clock.mark()

        self.callback = Callback()

    def mark(self) -> None:
        """Before the first step and after each."""
        w, cuda = self._w, self._torch.cuda
        if self._cuda:
            event = cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.monotonic())
        done = len(self.marks) - 1
        if self._cuda and done == w.warmup:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
            self.retries = -cuda.memory_stats()["num_alloc_retries"]
            self.watch = Watch() if w.watch else None
        if done == w.warmup + w.timed:
            self._end_timing()
            if w.profile:
                self._open_profile()
            elif w.sync and self._cuda:
                self.waits = self._inside.enter_context(waits())
        if done == w.warmup + w.timed + 2 * w.profile and w.profile:
            if self._cuda:
                cuda.synchronize()
            self._inside.close()
            if w.sync and self._cuda:
                self.waits = self._inside.enter_context(waits())
        if done == w.steps:
            self._inside.close()

    def _end_timing(self) -> None:
        cuda = self._torch.cuda
        if self._cuda:
            cuda.synchronize()
            self.peaks = (cuda.max_memory_allocated(), cuda.max_memory_reserved())
            self.retries += cuda.memory_stats()["num_alloc_retries"]
            self.watch = self.watch and self.watch.end()

    def _open_profile(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU]
        self.profile = self._inside.enter_context(profile(activities=kinds))

    def milliseconds(self) -> list[float]:
        """Of each timed step."""
        first, end = self._w.warmup, self._w.warmup + self._w.timed
        pairs = list(zip(self.marks, self.marks[1:], strict=False))[first:end]
        if self._cuda:
            return [a.elapsed_time(b) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]


def run(text: str, tiny: bool, models: Path, work: Path) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    from regrow.infra.imports import importing

    with importing():  # as a rank does
        from regrow.tasks.train.metrics import read_metrics
        from regrow.tasks.train.worker import train
    w = workload(text, tiny)
    work.mkdir(parents=True)
    counts = write_rows(w, work / "rows")
    job = make_job(w, models, work)
    _link_tokenizer(job.base_model, work / "rows")
    before = probe(tiny)
    clock, lag = Clock(w), Lag() if w.lag and not tiny else None
    begin = time.monotonic()
    with _room(w), recorded_blocks(bool(w.blocks) and not tiny):
        result = train(job, [clock.callback, *([lag] if lag else [])])
    seconds = time.monotonic() - begin
    records = [r for r in read_metrics(job.metrics_path) if "loss" in r]
    losses = [r["loss"] for r in records]
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError("a loss is no number: products of NaNs are faster, nothing counts")
    found = {"run": text, "stack": "regrow", "ok": True} | figures(w, counts, clock, result)
    found |= {"losses": losses, "loss": statistics.mean(losses)}
    found |= {"norms": [r.get("grad_norm") for r in records]}
    found |= {"seconds": round(seconds, 1), "probe": [before, probe(tiny)]}
    found |= {"torch": torch.__version__, "device": result["timing"]["device"]}
    if clock.profile is not None:
        found["profile"] = summary(launches_of(clock.profile), 2)
    found |= {"lag": lag.summary()} if lag else {}
    found |= {"watch": clock.watch} if clock.watch else {}
    found |= {"waits": clock.waits.most_common()} if clock.waits is not None else {}
    return found


@contextmanager
def _room(w: Workload) -> Iterator[None]:
    """Inside, torch takes no more of the GPU than the workload says."""
    import torch

    if not w.room or w.tiny:
        yield
        return
    share = torch.cuda.set_per_process_memory_fraction
    share(w.room * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        share(1.0)


def _link_tokenizer(base: Path, rows: Path) -> None:
    (rows / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (rows / "tokenizer" / name).write_text((base / name).read_text())


def figures(
    w: Workload, counts: list[dict[str, float]], clock: Clock, result: dict[str, Any]
) -> dict[str, Any]:
    """Rates, MFU and memory of the timed steps."""
    times = clock.milliseconds()
    timed = counts[w.warmup * w.rows : (w.warmup + w.timed) * w.rows]
    steps = [timed[i : i + w.rows] for i in range(0, len(timed), w.rows)]
    sums = [{k: sum(row[k] for row in step) for k in step[0]} for step in steps]
    rates = [1e3 * s["tokens"] / ms for s, ms in zip(sums, times, strict=True)]
    whole = {k: sum(s[k] for s in sums) for k in sums[0]}
    rate = statistics.median(rates)
    flops = useful_flops(w, whole, result["trainable_parameters"] if w.lora else 0)
    return {
        "workload": w.shape,
        "real_tok_s": round(rate),
        "real_tok_s_mean": round(1e3 * whole["tokens"] / sum(times)),
        "step_ms": round(statistics.median(times), 1),
        "steps_ms": [round(ms, 1) for ms in times],
        "mfu": round(flops * rate / whole["tokens"] / PEAK, 4),
        "alloc_gib": round(clock.peaks[0] / 2**30, 2),
        "reserved_gib": round(clock.peaks[1] / 2**30, 2),
        "alloc_retries": clock.retries,
        "fill": round(whole["tokens"] / (w.rows * w.timed * w.seq), 3),
        "trainable": result["trainable_parameters"],
        "kernels": result["timing"]["kernels"],
        "recomputes": result["timing"].get("recomputes"),
    }


def probe(tiny: bool) -> list[Any]:
    """[TFLOP/s of a large product, temperature]: a hot card shows before and after a run."""
    if tiny:
        return []
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(14):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    del a, b
    torch.cuda.empty_cache()
    words = ["nvidia-smi", "--query-gpu=temperature.gpu", "--format=csv,noheader"]
    heat = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return [round(2 * 8192**3 / statistics.median(times[4:]) / 1e9, 1), heat]

"""Every optimizer, schedule, adapter and first values of the vocabulary: trained, resumed, merged.

    python -m tests.bench.train_matrix [--only NAME ...] [--device cuda] > matrix.md

Each case takes ten steps on a tiny model; then five, a stop, and five more from the checkpoint; the
two results must be equal to the byte (on a GPU: up to rounding). Adapters are merged. Prints a
Markdown table: `train-matrix-cpu.md` is one. Some optimizers need galore-torch, apollo-torch,
came-pytorch, schedulefree and torch-optimi.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from regrow.configs.optimizers import (
    PACKAGES,
    BitsandbytesOptimizer,
    PackagedOptimizer,
    TorchaoOptimizer,
    TorchOptimizer,
)
from regrow.configs.rules.adapter import FIRST_VALUES
from regrow.configs.sections.training import Scheduler
from regrow.tasks.merge import run as merge
from regrow.tasks.merge.spec import MergePlacement, MergeSpec
from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.stage import Stage, StageJob
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.job import CheckpointPlace, WorkerJob
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.spec import (
    LearningRateGroup,
    ReLoRASpec,
    Restarts,
    TrainPlacement,
    TrainSpec,
)
from regrow.tasks.train.worker import train
from tests.bench.matrix_bases import BASES, write_prepared

STEPS, HALF = 10, 5
NF4 = Quantization(
    4,
    {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
)
LORA = AdapterSpec(r=4, alpha=8, target_linear=True)
WHOLE = {"adapter": None, "learning_rate": 1e-3}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    kind: str
    name: str
    spec: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    """Module to import."""
    cuda: bool = False
    """Runs on CUDA only."""
    base: str = "llama"
    """A name in `BASES`."""


def cases() -> Iterator[Case]:
    """All of them, by kind."""
    yield from _adapters()
    yield from _first_values()
    yield from _experts()
    yield from _relora()
    yield from _optimizers()
    yield from _schedules()
    yield from _others()


def _adapters() -> Iterator[Case]:
    def lora(**changes: Any) -> dict[str, Any]:
        return {"adapter": dataclasses.replace(LORA, **changes)}

    dropout = lora(dropout=0.2)
    yield Case("adapter", "full", WHOLE)
    yield Case("adapter", "unfrozen_parameters", WHOLE | {"unfrozen": (r".*layers\.1\.",)})
    rows = ("model.embed_tokens.weight[0:40]", r".*norm")
    yield Case("adapter", "unfrozen_parameters, rows", WHOLE | {"unfrozen": rows})
    yield Case("adapter", "lora", dropout)
    yield Case("adapter", "qlora (nf4, double)", dropout | {"quantization": NF4}, "bitsandbytes")
    fp4 = Quantization(4, {"bnb_4bit_quant_type": "fp4"})
    yield Case("adapter", "qlora (fp4)", dropout | {"quantization": fp4}, "bitsandbytes")
    yield Case("adapter", "lora, int8", dropout | {"quantization": Quantization(8)}, "bitsandbytes")
    yield Case("adapter", "dora", lora(dora=True, dropout=0.2))
    yield Case("adapter", "qlora + dora", lora(dora=True) | {"quantization": NF4}, "bitsandbytes")
    yield Case("adapter", "rslora", lora(rslora=True))
    yield Case("adapter", "rank and alpha patterns", _patterns())
    yield Case("adapter", "layers_to_transform", lora(layers=(1,)))
    pattern = {"target_linear": False, "target_modules": ("q_proj", "down_proj")}
    pattern |= {"layers": (1,), "layers_pattern": ("layers",)}
    yield Case("adapter", "lora_layers_pattern", lora(**pattern))
    yield Case("adapter", "exclude_modules", lora(exclude_modules=("q_proj",)))
    yield Case("adapter", "modules_to_save", lora(modules_to_save=("embed_tokens",)))
    yield Case("adapter", "trainable_token_indices", lora(trainable_tokens=(3, 5)))
    plus = {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-6, "learning_rate": 1e-3}
    yield Case("adapter", "lora+", plus)
    yield Case("adapter", "lora_model_dir", {"adapter": AdapterSpec(0, 0, start="0" * 64)})
    for stored in ("fp8", "gptq"):
        yield Case("adapter", f"lora on a base stored in {stored}", dropout, base=stored)


def _first_values() -> Iterator[Case]:
    def lora(**changes: Any) -> dict[str, Any]:
        return {"adapter": dataclasses.replace(LORA, **changes)}

    yield Case("first values", "reinit_weights", WHOLE | {"reinit_weights": True})
    for init in (True, False, *FIRST_VALUES, "pissa_niter_4"):
        if init != "loftq":
            yield Case("first values", str(init).lower(), lora(init=init))
    yield Case(
        "first values", "eva on nf4", lora(init="eva") | {"quantization": NF4}, "bitsandbytes"
    )
    loftq: dict[str, Any] = {"init": "loftq", "alpha": 4}
    yield Case("first values", "loftq", lora(**loftq), "bitsandbytes", cuda=True)
    loftq["loftq"] = {"loftq_bits": 4, "loftq_iter": 2}
    yield Case("first values", "loftq_config", lora(**loftq), "bitsandbytes", cuda=True)


def _experts() -> Iterator[Case]:
    """On a mixture of experts, whose weights are parameters and no layers."""
    stacks = ("experts.down_proj", "experts.gate_up_proj")
    inside = AdapterSpec(4, 8, target_modules=("q_proj", "v_proj"), target_parameters=stacks)
    spec: dict[str, Any] = {"adapter": inside}
    yield Case("experts", "full", WHOLE, base="mixture")
    yield Case("experts", "lora_target_parameters", spec, base="mixture")
    for name, bits, settings in (("nf4", 4, NF4.settings), ("int8", 8, {})):
        quantized = spec | {"quantization": Quantization(bits, settings, experts=True)}
        name = f"quantize_moe_experts, {name}"
        yield Case("experts", name, quantized, "bitsandbytes", base="mixture")
    balanced = {"router_aux_loss": True, "router_aux_loss_coef": 0.5}
    yield Case("experts", "output_router_logits", WHOLE | balanced, base="mixture")
    yield Case("experts", "output_router_logits, lora", spec | balanced, base="mixture")


def _patterns() -> dict[str, Any]:
    changed = dataclasses.replace(LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0})
    return {"adapter": changed}


def _optimizers() -> Iterator[Case]:
    low_rank = ("galore", "apollo")
    groups = (TorchOptimizer, BitsandbytesOptimizer, TorchaoOptimizer, PackagedOptimizer)
    for name in (name for group in groups for name in get_args(group)):
        spec: dict[str, Any] = {"optimizer": name, "learning_rate": 1e-3}
        if name.startswith(low_rank):
            arguments = {"rank": 8, "update_proj_gap": 4}
            spec |= WHOLE | {"optimizer_targets": ("attn", "mlp"), "optimizer_args": arguments}
        if name.startswith("schedule_free"):
            spec |= {"lr_scheduler": "constant"}
        if any(bits in name for bits in ("8bit", "4bit", "fp8")):
            spec |= WHOLE  # states of small matrices, such as an adapter's here, stay in 32 bits
        needs = PACKAGES[name][1] if name in PACKAGES else None
        cuda = name.startswith("paged_ademamix")
        yield Case("optimizer", name, spec, needs, cuda)
    yield Case("optimizer", "muon, full", WHOLE | {"optimizer": "muon"})
    group = LearningRateGroup(("q_proj",), 1e-3)
    yield Case("optimizer", "lr_groups", {"lr_groups": (group,)})
    yield Case("optimizer", "embedding_lr", WHOLE | {"embedding_lr": 1e-4})


_KWARGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5},
}


def _schedules() -> Iterator[Case]:
    for name in get_args(Scheduler):
        spec: dict[str, Any] = {"lr_scheduler": name, "lr_scheduler_kwargs": _KWARGS.get(name, {})}
        if name == "reduce_lr_on_plateau":
            spec |= {"validation": Cadence(steps=2), "warmup_steps": 0}
        yield Case("schedule", name, spec)
    until = {"min_lr_rate": 0.1, "until": 0.7, "quadratic": True}
    spec = {"lr_scheduler": "cosine_until", "lr_scheduler_kwargs": until}
    yield Case("schedule", "cosine, quadratic warm-up, constant end", spec)
    yield Case("schedule", "jagged restarts", {"restarts": Restarts(4, 1, 1)})


def _relora() -> Iterator[Case]:
    """Three rounds, the kill at the end of the first one and in the middle of the second one."""
    for method, rate in (("magnitude", 0.9), ("random", 0.9), ("reset", 0.999)):
        rounds = {"restarts": Restarts(4, 1, 0), "relora": ReLoRASpec(method, rate)}
        yield Case("adapter", f"relora, {method}", rounds)
    quantized = {"quantization": NF4, "optimizer": "adamw_bnb_8bit", "restarts": Restarts(5, 1, 0)}
    dropout = {"adapter": dataclasses.replace(_patterns()["adapter"], dropout=0.2)}
    case = quantized | dropout | {"relora": ReLoRASpec()}
    yield Case("adapter", "relora on nf4, patterns", case, "bitsandbytes")


def _others() -> Iterator[Case]:
    yield Case("loss", "neftune", {"neftune_noise_alpha": 5.0})
    yield Case("loss", "label smoothing", {"label_smoothing": 0.1})
    yield Case("loss", "z-loss", {"z_loss": 1e-3})
    best = {"keep_best": True, "early_stopping_patience": 2, "validation": Cadence(steps=1)}
    yield Case("stopping", "early stopping, best model", best | {"learning_rate": 3e-2})


# ---- how they run ----


class Stopped(BaseException):
    """Not an Exception: nothing on the way may handle it."""


class StopAfter(TrainerCallback):
    """Ends the process's work right after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise Stopped


class Silent:
    def progress(self, *args: Any) -> None: ...
    def log(self, message: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    status: str
    first_loss: float = float("nan")
    last_loss: float = float("nan")
    resumed: str = ""
    merged: str = ""

    @property
    def good(self) -> bool:
        """Whether it works, or cannot for a reason that is no fault."""
        return not self.status.startswith("FAULT")


class Bench:
    """Runs cases in a directory of their own."""

    def __init__(self, root: Path, device: str = "cpu") -> None:
        self._root, self._device = root, device
        self._models = {name: write(root / name) for name, write in BASES.items()}
        self._prepared = write_prepared(root / "prepared")

    def run(self, case: Case) -> Outcome:
        """Train, stop and resume, merge."""
        if case.needs and importlib.util.find_spec(case.needs.partition(".")[0]) is None:
            return Outcome(f"needs {case.needs}")
        if case.cuda and self._device != "cuda":
            return Outcome("needs CUDA")
        here = self._root / "case"
        shutil.rmtree(here, ignore_errors=True)
        try:
            return self._run(case, here)
        except Exception as error:  # noqa: BLE001 (a fault is a row of the table)
            return Outcome(f"FAULT {type(error).__name__}: {error}"[:300])

    def _run(self, case: Case, here: Path) -> Outcome:
        straight = self._job(case, here / "straight", None)
        result = train(straight)
        store = (here / "store").as_uri()
        with contextlib.suppress(Stopped):
            train(self._job(case, here / "stopped", store), [StopAfter(HALF + 1)])
        resumed = self._job(case, here / "resumed", store)
        train(resumed)
        losses = [r["loss"] for r in result["history"] if "loss" in r]
        return Outcome(
            "works",
            losses[0],
            losses[-1],
            self._difference(straight.out, resumed.out),
            self._merge(case, straight, here / "merged") if straight.spec.adapter else "",
        )

    @cached_property
    def _start(self) -> Path:
        """An adapter to go on from."""
        job = self._job(Case("", "", {"max_steps": 2}), self._root / "start", None)
        train(job)
        return job.out

    def _job(self, case: Case, here: Path, store: str | None) -> WorkerJob:
        spec = TrainSpec(**self._base(case) | case.spec)
        start = self._start if spec.adapter and spec.adapter.start else None
        model = self._models[case.base]
        return WorkerJob(
            spec=spec,
            placement=TrainPlacement(
                base_model=str(model),
                start_adapter=str(start) if start else None,
                micro_batch_size=2,
                evaluation=Cadence(),
                saving=Cadence(steps=HALF),
                device=self._device,
            ),
            prepared=self._prepared,
            base_model=model,
            out=here / "out",
            work=here / "work",
            checkpoints=CheckpointPlace(store, "checkpoints/a") if store else None,
            start_adapter=start,
        )

    def _base(self, case: Case) -> dict[str, Any]:
        """What all cases have in common."""
        return {
            "base_model_digest": "0" * 64,
            "dtype": "bfloat16" if case.spec.get("quantization") else "float32",
            "global_batch_size": 4,
            "num_epochs": 1,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "adapter": LORA,
            "optimizer": "adamw_torch",
            "warmup_steps": 2,
            "weight_decay": 0.01,
            "seed": 3,
        }

    def _difference(self, one: Path, other: Path) -> str:
        (ours,), (theirs,) = (list(path.glob("*.safetensors")) for path in (one, other))
        if ours.read_bytes() == theirs.read_bytes():
            return "same bytes"
        a, b = load_file(ours), load_file(theirs)
        largest = max((a[n].float() - b[n].float()).abs().max().item() for n in a)
        return f"differs by {largest:.1e}"

    def _merge(self, case: Case, job: WorkerJob, out: Path) -> str:
        out.mkdir(parents=True)
        spec = MergeSpec("0" * 64, "float32", job.spec.quantization)
        runner, placement = "regrow.tasks.merge.run:run", MergePlacement(str(job.base_model))
        stage = Stage("merge", 1, spec, runner, placement=placement)
        inputs = {"prepare": self._prepared, "train": job.out}
        unused: Any = None
        result = merge.run(StageJob(stage, inputs, {}, out, out, Silent(), unused))
        return f"{result['merge_error'] / result['adapter_effect']:.0e} of its effect"


def table(outcomes: list[tuple[Case, Outcome]], device: str) -> str:
    """The matrix as Markdown, with what it was made of."""
    head = "| kind | name | on | status | loss, step 1 -> 10 | resumed | merge error |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for case, outcome in outcomes:
        losses = (
            ""
            if outcome.first_loss != outcome.first_loss
            else (f"{outcome.first_loss:.3f} -> {outcome.last_loss:.3f}")
        )
        on = device if outcome.status == "works" else ""
        cells = (case.kind, case.name, on, outcome.status, losses, outcome.resumed, outcome.merged)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "torchao")


def origin(device: str) -> str:
    """Date, device and versions."""
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in _PACKAGES
        if importlib.util.find_spec(name)
    )
    return f"Made {datetime.date.today()} on {where} with {versions}."


def main() -> int:
    """Prints the table; 1 when a case that should work does not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], help="parts of names or kinds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    outcomes = []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root), args.device)
        for case in cases():
            if args.only and not any(o in f"{case.kind}: {case.name}" for o in args.only):
                continue
            with contextlib.redirect_stdout(sys.stderr):  # a training says its steps
                outcome = bench.run(case)
            outcomes.append((case, outcome))
            sys.stderr.write(f"{case.kind}: {case.name}: {outcome}\n")
    sys.stdout.write(f"{origin(args.device)}\n\n{table(outcomes, args.device)}\n")
    return 0 if all(outcome.good for _, outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

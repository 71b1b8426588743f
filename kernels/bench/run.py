"""Times the kernels, forward and backward, next to their rivals.

Run `python -m regrow.kernels.bench.run` on a machine with a GPU.

An op that does not equal its reference on a small input first prints no times and makes the run
fail. Rivals take turns, several rounds each, because a warm card slows down; a figure is the
median of its rounds. Each result is one JSON line as well.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.kernels.backend import triton
from regrow.kernels.bench.cases import Case, Op, all_cases

TOLERANCE = 1.5e-2  # bfloat16, as in tests/kernels/conftest.py
ROUNDS, WARMUP_MS, ROUND_MS = 3, 20, 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run ops whose name has this in it")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this bench needs a CUDA device")
    print(heading())
    red = 0
    for case in all_cases():
        if arguments.only in case.op:
            red += not measure(case, arguments.out)
    return 1 if red else 0


def heading() -> str:
    """Date, device and versions, then the table's head."""
    names = ("torch", "triton", "liger_kernel")
    found = [f"{name} {version(name)}" for name in names if version(name)]
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        f"{day}, {torch.cuda.get_device_name()}, {', '.join(found)}; bfloat16, float32 adapters",
        "forward + backward, as a CUDA graph where the host need not look (all but the heads);",
        "peak memory of the case, inputs and gradients included",
        "| op | size | rival | ms | peak GiB |\n| --- | --- | --- | --- | --- |",
    ]
    return "\n".join(lines)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(case: Case, out: Path | None) -> bool:
    """Prints the case's rows; False, and no times, when ours is wrong."""
    error = largest_error(case)
    if not error <= TOLERANCE:  # NaN as well
        print(f"RED {case.op} ({case.size}): relative error {error:.1e}", file=sys.stderr)
        return False
    release()
    before = torch.cuda.memory_allocated() / 2**30  # what earlier cases have left
    inputs = case.inputs(False)
    times: dict[str, list[float]] = {name: [] for name in case.rivals}
    peaks = {name: peak_gib(op, inputs) - before for name, op in case.rivals.items()}
    for _ in range(ROUNDS):
        for name, op in case.rivals.items():
            times[name].append(once(stepper(op, inputs), case.captured))
    for name, rounds in times.items():
        report(case, name, statistics.median(rounds), peaks[name], error, out)
    del inputs
    release()
    return True


def once(step: Op, captured: bool) -> float:
    """Median milliseconds of a step over one round."""
    timing: Any = triton.testing
    if captured:
        return timing.do_bench_cudagraph(step, rep=ROUND_MS, return_mode="median")
    return timing.do_bench(step, warmup=WARMUP_MS, rep=ROUND_MS, return_mode="median")


def report(case: Case, name: str, ms: float, peak: float, error: float, out: Path | None) -> None:
    print(f"| {case.op} | {case.size} | {name} | {ms:.3f} | {peak:.2f} |", flush=True)
    if out is not None:
        line: dict[str, Any] = {"op": case.op, "size": case.size, "rival": name, "ms": ms}
        line |= {"peak_gib": peak, "device": torch.cuda.get_device_name()}
        line |= {"torch": version("torch"), "triton": version("triton")}
        line |= {"relative_error": error} if name == "regrow" else {}
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def stepper(op: Op, inputs: Sequence[Tensor]) -> Op:
    """A forward and backward pass with an upstream gradient that is there already."""
    leaves = [x for x in inputs if x.requires_grad]
    upstream: list[Tensor] = []

    def step() -> tuple[Tensor, ...]:
        outs = as_list(op(*inputs))
        if not upstream:
            upstream.extend(torch.randn_like(o) if o.ndim else torch.ones_like(o) for o in outs)
        return torch.autograd.grad(outs, leaves, upstream)

    return step


def peak_gib(op: Op, inputs: Sequence[Tensor]) -> float:
    release()
    torch.cuda.reset_peak_memory_stats()
    stepper(op, inputs)()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def largest_error(case: Case) -> float:
    """Of outputs and gradients, in norm, against the reference in float64 on small inputs."""
    inputs = case.inputs(True)
    exact = [x.detach() if not x.is_floating_point() else as_double(x) for x in inputs]
    outs, right = as_list(case.rivals["regrow"](*inputs)), as_list(case.reference(*exact))
    upstream = [torch.randn_like(out) for out in outs]
    got = torch.autograd.grad(outs, [x for x in inputs if x.requires_grad], upstream)
    leaves = [x for x in exact if x.requires_grad]
    due = torch.autograd.grad(right, leaves, [u.double() for u in upstream])
    pairs = zip([*outs, *got], [*right, *due], strict=True)
    errors = [((a.double() - b).norm() / b.double().norm()).item() for a, b in pairs]
    return float("nan") if any(e != e for e in errors) else max(errors)


def as_double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad)


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


if __name__ == "__main__":
    sys.exit(main())

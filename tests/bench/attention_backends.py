"""Times attention backends, forward and backward, on the documents of a training-step workload.

    python -m tests.bench.attention_backends W1 W3 [--out attention.jsonl]

Device time is the sum of the kernels' own (torch.profiler); host time is what the calls take to be
launched; `first` is the first call of a row that was not seen before. Each backend is held against
attention on each example by itself in float32 before it is timed; a wrong one is not timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.kernels import cudnn_attention, packed_attention
from tests.bench.step_profile import launches_of
from tests.bench.step_workloads import documents, pack, workload

_TOLERANCE = 2e-2  # relative in norm, of bfloat16
_REPEATS = 8
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


def flash_2(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> Tensor:
    """torch.nn.attention.varlen, which packed attention takes today."""
    options = packed_attention._Options(longest, longest, cu, scale, True, None, None)
    return packed_attention._torch_varlen(q, k, v, cu, options)


def candidates() -> dict[str, Attend]:
    """Name -> function of (q, k, v, cu_seqlens, longest, scale)."""
    return {
        "flash 2 (torch)": flash_2,
        "cudnn (package)": cudnn_attention.cudnn_attention,
    }


def rows_of(text: str, count: int) -> list[tuple[Tensor, int]]:
    """(cu_seqlens, longest) of micro-batches as the workload packs them, padded to 64 tokens."""
    w = workload(text, False)
    packed = pack(documents(3 * count * w.rows * w.seq, w.seq, 1000), w.seq)
    found = []
    for start in range(0, count * w.rows, w.rows):
        lengths = [len(ids) for row in packed[start : start + w.rows] for ids, _ in row]
        rest = -sum(lengths) % 64
        lengths += [rest] if rest else []
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().cuda()
        found.append((cu, max(lengths)))
    return found


def inputs(text: str, tokens: int) -> list[Tensor]:
    """q, k, v and the gradient of the result."""
    c = workload(text, False).config
    heads, keys = c["num_attention_heads"], c["num_key_value_heads"]
    size = c.get("head_dim") or c["hidden_size"] // heads
    made = [
        torch.randn(tokens, n, size, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for n in (heads, keys, keys)
    ]
    return [*made, torch.randn(tokens, heads, size, device="cuda", dtype=torch.bfloat16)]


def right(given: list[Tensor], cu: Tensor, longest: int, scale: float) -> list[Tensor]:
    """Result and gradients in float32."""
    wide = [x.detach().float().requires_grad_() for x in given[:3]]
    options = packed_attention._Options(longest, longest, cu, scale, True, None, None)
    out = packed_attention._per_example(wide[0], wide[1], wide[2], cu, options)
    return [out, *torch.autograd.grad(out, wide, given[3].float())]


def once(attend: Attend, given: list[Tensor], cu: Tensor, longest: int) -> list[Tensor]:
    """Result and gradients."""
    q, k, v, upstream = given
    out = attend(q, k, v, cu, longest, q.shape[-1] ** -0.5)
    return [out, *torch.autograd.grad(out, (q, k, v), upstream)]


def error(found: list[Tensor], due: list[Tensor]) -> float:
    """The largest relative error in norm of result and gradients."""
    pairs = zip(found, due, strict=True)
    return max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)


def measure(attend: Attend, cases: list[tuple[list[Tensor], Tensor, int]]) -> dict[str, Any]:
    """Milliseconds of one call on the device, by kernel, and on the host."""
    from torch.profiler import ProfilerActivity, profile

    begin = time.perf_counter()
    once(attend, *cases[1])
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    for case in cases:
        once(attend, *case)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        for case in cases:
            once(attend, *case)
    host = (time.perf_counter() - begin) / _REPEATS / len(cases)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(_REPEATS):
            for case in cases:
                once(attend, *case)
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    for launch in launches_of(seen):
        ms = (launch.end - launch.start) / 1e3 / _REPEATS / len(cases)
        kernels[launch.name[:70]] = kernels.get(launch.name[:70], 0.0) + ms
    top = sorted(kernels.items(), key=lambda item: -item[1])[:6]
    return {
        "device_ms": round(sum(kernels.values()), 3),
        "host_ms": round(1e3 * host, 3),
        "first_ms": round(1e3 * first, 1),
        "kernels_ms": {name: round(ms, 3) for name, ms in top},
    }


def main() -> None:
    """A line of JSON for each workload and backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("attention.jsonl"))
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    for text in options.workloads:
        torch.manual_seed(0)
        rows = rows_of(text, 4)
        cases = [(inputs(text, int(cu[-1])), cu, longest) for cu, longest in rows]
        given, cu, longest = cases[0]
        due = right(given, cu, longest, given[0].shape[-1] ** -0.5)
        for name, attend in candidates().items():
            if options.only not in name:
                continue
            found: dict[str, Any] = {"workload": text, "backend": name}
            try:
                wrong = error(once(attend, given, cu, longest), due)
                found["error"] = round(wrong, 5)
                found |= measure(attend, cases) if wrong < _TOLERANCE else {"ok": False}
            except Exception as fault:  # noqa: BLE001 - the others are still to be measured
                found |= {"ok": False, "why": f"{type(fault).__name__}: {fault}"[:600]}
            print(json.dumps(found), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

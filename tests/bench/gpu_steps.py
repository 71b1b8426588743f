"""Measures whole training steps of W1 to W4 through the real worker, beside the peers' harness.

On a machine with a GPU, from the repository's root (a machine that has no package of ours takes it
from the link tree; the random models are made once, in memory if /dev/shm is large enough):

    export PYTHONPATH=$PWD/infra/typing PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    python -m tests.bench.gpu_steps --models /dev/shm/models --out $OUT/steps.jsonl \\
        W1 W1:gc=offload W3 W1:kernels=off

A run is `WORKLOAD[:option=value...]`; each is a process of its own that calls the worker's `train`
on a job, and gives one JSON line. Options: `kernels` (auto, off, or names joined by +), `gc` (0, 1,
auto, selective, offload), `optim`, `layers`, `rows`, `seq`, `seed`, `warmup`, `timed`, `micro`
(rows of a micro-batch), `dropout`, `dtype`, `fp8` (1: the frozen base in 8-bit floats), `lora`,
`log` (steps between lines of the log; each waits for the device), `doc` (tokens of every document),
`of` (tokens of longer rows, whose documents are dealt out to these), `room` (GiB that torch may
take of the GPU), `blocks=1` (what lies there at the peak), `profile=1` (two more steps under
torch.profiler: kernels by kind, the longest, the device's idle time), `sync=1` (one more step:
where the host waits for the device), `lag=1` (how far the device is behind the host, at layers
too), `watch=1` (the card's clock and power in the timed steps). `--tiny` runs everything on the CPU
with layers of width 64: it proves the way and measures nothing. LONG is one row of 400,000 tokens
of chat-like documents; `LONG:doc=400000` is one document, and
`LONG:seq=40000:rows=10:micro=1:of=400000` has the same documents in ten short rows.

W2 and LONG want the package bitsandbytes. Peers in the same call, taking turns with ours on one
card: `peer:` runs `.peers/peers.py --runs ...` and takes its line over; those of its stacks that
load from disk find the models of `--models` under the same names.

`curve:` before a workload trains `timed` steps (200 unless told) without our kernels, the same
again, in micro-batches half as large and with another seed of the adapter, with our kernels, and
without them in float32 (products in TF32), and says how far each is from the first and from the
last. Run again, sums of atomic additions differ; micro-batches round gradients otherwise; what
bfloat16 does to the losses is the first's distance from float32.

The session on a lent H100 (30 device minutes), in calls right after each other: the machine
and /dev/shm last 30 s between two. Before it, here (wheels: ../shared/bench/README.md; 64 MiB in
all, so bitsandbytes stripped to its library for CUDA 13; nvidia_cudnn_frontend 1.18 of 2 MiB for
cuDNN's attention, without which FlashAttention 2 is measured):

    for d in .peers .whl; do grep -qx /$d/ .git/info/exclude || echo /$d/ >> .git/info/exclude; done
    cp -r ../shared/bench .peers     # then fill .whl, and name both in `carry`

Every command begins with P:

    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target /tmp/site .whl/*.whl; export PYTHONPATH=/tmp/site:$PWD/infra/typing:$PWD \
        PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True;
    S="python3 -m tests.bench.gpu_steps --models /dev/shm/models --out $OUT/steps.jsonl"

    1  500 s  P; sh tests/bench/gpu_tests.sh $OUT/t; $S W2:micro=2:gc=auto:room=7.6
              peer:W2:unsloth W2:micro=2:gc=auto:room=7.6 W1:warmup=8 W1:warmup=8:fp8=1
              (tests 110 s; the first run makes the model: 40 s; ours 50 s, a peer 80 s)
    2  400 s  P; $S --limit 150 curve:W1:layers=4
              (356 s: six trainings of a minute each; a second curve has no room in the same call;
              curve:W3:layers=4 375 s, curve:W4:layers=2 295 s)
       300 s  P; $S --limit 230
              LONG:seq=40000:rows=10:micro=1:of=400000:log=1 LONG:log=1
              (each step's loss and gradient's norm must be the other's, the second's after an
              update; 175 s, and the short check 130 with making the model; pinned memory is what
              it wants most: 98 GiB; models in /tmp took more than twice as long to load as in
              /dev/shm, so move them there late)
    3  530 s  P; $S W1:warmup=8 peer:W1:unsloth-nogc W2:warmup=8 peer:W2:unsloth-nogc W3:warmup=8
              peer:W3:trl-fa2-liger-nogc W4:warmup=8 peer:W4:moe-grouped-elora (45 to 80 s each)

What is red in call 1 is mended before call 2: give the machine back meanwhile. What each part of a
step should take stands in `kernels/bench/expected-h100.md`; hold the profiles against it.

Documents have lognormal lengths (median 350, mean about 490, 16 to 4096), of each 45 to 85 % is
supervised. Rates count real tokens, the median over timed steps. MFU counts the least work: 4
(frozen) or 6 (trained) times the body's weights for each token, the head for supervised tokens
alone, 6 times the adapter's, and 6 L d_q sum(len^2) for causal attention; over 989.4 TFLOP/s, an
H100's dense bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.step_run import run
from tests.bench.step_workloads import workload


def run_child(text: str, options: argparse.Namespace, number: int) -> dict[str, Any]:
    """A run in a process of its own; what went wrong is in its line."""
    work = options.work / f"run-{number}"
    words = [sys.executable, "-m", "tests.bench.gpu_steps", "--child", text]
    words += ["--models", str(options.models), "--work", str(work)]
    words += ["--tiny"] if options.tiny else []
    return _finished(words, text, options.limit)


def run_peer(text: str, options: argparse.Namespace) -> dict[str, Any]:
    """A stack of the peers' harness, on the same models."""
    out = options.work / "peers.jsonl"
    out.unlink(missing_ok=True)
    words = [sys.executable, str(options.peers), "--runs", text, "--out", str(out)]
    words += ["--ckpt", str(options.models), "--limit", str(options.limit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if not out.exists():
        return {"run": text, "ok": False, "error": (done.stdout + done.stderr)[-1500:]}
    return json.loads(out.read_text().splitlines()[-1])


def _finished(words: list[str], text: str, limit: float) -> dict[str, Any]:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""
        tail = said if isinstance(said, str) else said.decode(errors="replace")
        return {"run": text, "ok": False, "error": f"longer than {limit} s", "log": tail[-1500:]}
    for line in done.stdout.splitlines():
        if line.startswith("BLOCKS "):
            print("    " + line, flush=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"run": text, "ok": False, "error": (done.stdout + done.stderr)[-3000:]}
    return json.loads(lines[-1].removeprefix("RESULT "))


def shown(found: dict[str, Any]) -> str:
    """A line for people."""
    if not found.get("ok"):
        return f"{found['run']:34} FAILED {found.get('error', '')}"
    kernels = found.get("kernels", {}).get("swapped", {})
    profile = found.get("profile", {})  # peers' have other names
    return (
        f"{found['run']:34} {found['real_tok_s']:8,} tok/s (mean {found.get('real_tok_s_mean')}) "
        f"{found['step_ms']} ms, MFU {found['mfu']:.1%}, {found['alloc_gib']} GiB "
        f"(reserved {found['reserved_gib']}), loss {found['loss']:.4f}, probe {found.get('probe')}"
        + (f", kernels {kernels}" if kernels else "")
        + (f"\n    {profile.get('kinds_ms', list(profile.items())[:1])}" if profile else "")
        + (f"\n    idle {profile['idle_ms']}: {profile['gaps']}" if "gaps" in profile else "")
        + (f", recomputes {found['recomputes']}" if found.get("recomputes") else "")
        + (f"\n    waits {found['waits']}" if "waits" in found else "")
        + (f"\n    {found['watch']}" if "watch" in found else "")
        + (f"\n    host and lag {found['lag']}" if "lag" in found else "")
    )


def curve(text: str, options: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """Losses with and without kernels, and how far curves are from each other.

    The reference's noise from run to run is how far it is from itself: run again, in half
    micro-batches, and with other first values of its adapter.
    """
    steps = ":log=1" if "timed=" in text or options.tiny else ":log=1:timed=200"
    half = max(1, workload(text, options.tiny).rows // 2)
    ours = "attention+mlp+experts+rms_norm+cross_entropy" if options.tiny else "auto"
    off = f"{text}{steps}:kernels=off"
    runs = {"off": off, "again": off, "halves": f"{off}:micro={half}"}
    if workload(text, options.tiny).lora:
        runs["seed"] = f"{off}:seed=7"
    runs |= {"kernels": f"{text}{steps}:kernels={ours}", "float32": f"{off}:dtype=float32:fp8=0"}
    found = {name: run_child(runs[name], options, 100 * number + n) for n, name in enumerate(runs)}
    if all(f["ok"] for f in found.values()):
        losses = {name: np.array(f["losses"]) for name, f in found.items()}
        pairs = [(name, "off") for name in runs if name not in ("off", "float32")]
        for one, other in [*pairs, ("off", "float32"), ("kernels", "float32")]:
            apart = np.abs(losses[one] - losses[other])
            most = np.sort(apart)[-3:][::-1]
            print(f"    {one}, {other}: mean {apart.mean():.2e}, largest {most}", flush=True)
    return list(found.values())


def main() -> None:
    """Run everything; JSON lines go to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("steps.jsonl"))
    parser.add_argument("--models", type=Path, default=Path("/tmp/bench-models"))
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--peers", type=Path, default=Path(".peers/peers.py"))
    parser.add_argument("--limit", type=float, default=200, help="seconds of one run")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        found = run(options.child, options.tiny, options.models, options.work)
        print("RESULT " + json.dumps(found), flush=True)
        return
    options.work = options.work or Path(f"/tmp/bench-steps-{time.time_ns()}")
    options.work.mkdir(parents=True)
    for number, text in enumerate(options.runs):
        if text.startswith("peer:"):
            lines = [run_peer(text.removeprefix("peer:"), options)]
        elif text.startswith("curve:"):
            lines = curve(text.removeprefix("curve:"), options, number)
        else:
            lines = [run_child(text, options, number)]
        for found in lines:
            found["date"] = time.strftime("%Y-%m-%d")
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(shown(found), flush=True)


if __name__ == "__main__":
    main()

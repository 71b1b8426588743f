"""What orchestration costs: the wall time of the quickstart's flow minus the sum of its stages.

    .venv/bin/python -m tests.bench.orchestration [--full] [--model DIR]

Without `--full` the training takes two steps, and `--model` names a smaller model: what is measured
does not depend on them. The first run on each server also makes the databases. On a machine with
other work only the CPU seconds say something: of a run whose stages are all cached they are the
whole cost.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.services.servers import answers_http, free_port, start, stop, wait_until

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "recipes" / "quickstart.yaml"
QUICK = ("--max_steps", "2", "--eval_table_size", "4", "--num_epochs", "null")


def environment(home: Path) -> dict[str, str]:
    dropped = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "REGROW_STORE", "OMP_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    home.mkdir()  # Prefect makes no parents of its own home
    places = {"REGROW_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
    return env | places | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "true"}


def measure(name: str, env: dict[str, str], words: tuple[str, ...], out: Path) -> None:
    command = [str(Path(sys.executable).parent / "regrow"), "run", str(RECIPE), *words]
    load = os.getloadavg()[0]
    begin, cpu = time.perf_counter(), cpu_seconds()
    done = subprocess.run(
        [*command, "--output_dir", str(out)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    wall = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    rows = re.findall(r"^(\w+) +(?:built|Cached) +([\d.]+) s", done.stdout, re.MULTILINE)
    stages = sum(float(seconds) for _, seconds in rows)
    print(
        f"{name:34} wall {wall:6.1f} s  {len(rows)} stages {stages:6.1f} s  "
        f"overhead {wall - stages:5.1f} s  CPU {cpu_seconds() - cpu:5.1f} s  load {load:.1f}",
        flush=True,
    )


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="train as the recipe says")
    parser.add_argument("--model", help="in place of the recipe's")
    args = parser.parse_args()
    words = () if args.full else QUICK
    words += ("--base_model", args.model) if args.model else ()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        env = environment(root / "ephemeral")
        measure("ephemeral server, first run", env, words, root / "out0")
        again = ("--learning_rate", "2e-3")  # another model, the same data
        measure("ephemeral server, another model", env, (*words, *again), root / "out1")
        measure("ephemeral server, all cached", env, (*words, *again), root / "out1")

        env, port = environment(root / "running"), free_port()
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
        server = start(command, root / "server.log", env=env)
        try:
            url = f"http://127.0.0.1:{port}/api"
            wait_until("Prefect", lambda: answers_http(f"{url}/health"))
            env |= {"PREFECT_API_URL": url}
            measure("running server, first run", env, words, root / "out2")
            measure("running server, another model", env, (*words, *again), root / "out3")
            measure("running server, all cached", env, (*words, *again), root / "out3")
        finally:
            stop(server)


if __name__ == "__main__":
    main()

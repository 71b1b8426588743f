"""Runs a tiny pipeline, or its first stages, again and again, each time in a forked process.

The stages, the store, leases and checkpoints are the real ones. Left out is what takes longer to
start than a tiny stage takes to run: Prefect, MLflow and torchrun (the worker's function is called
in the pipeline's own process). As a script this file is the process that forks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any


class Pipelines:
    """A process that has all libraries and forks one child for each run; it dies with this one.

    Args:
        env: of all runs; each adds its own.
        log: what the runs say.
    """

    def __init__(self, env: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=dict(env),
            )
        self._log = log

    def run(
        self,
        recipe: Path,
        env: Mapping[str, str],
        upto: str = "merge",
        overrides: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """{stage: "built" or "cached"} of one run; raises AssertionError when it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        wish = {"recipe": str(recipe), "env": dict(env), "upto": upto}
        wish["overrides"] = dict(overrides or {})
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        told = json.loads(line) if line else {"error": "the forking process ended"}
        assert "error" not in told, f"{told['error']}\n{self._log.read_text()[-3000:]}"
        return told

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class _Report:
    def log(self, message: str) -> None:
        print(message, file=sys.stderr)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None: ...


def train_here(job: Any) -> dict[str, Any]:
    """The train stage without torchrun: its worker's function in this process."""
    from regrow.infra import hub
    from regrow.tasks.train.job import CheckpointPlace, WorkerJob
    from regrow.tasks.train.worker import train

    work = job.scratch / "train"
    work.mkdir(parents=True)
    worker_job = WorkerJob(
        spec=job.spec,
        placement=job.placement,
        prepared=job.inputs["prepare"],
        base_model=hub.local_directory(job.placement.base_model),
        out=job.out,
        work=work,
        checkpoints=CheckpointPlace(job.checkpoints, f"checkpoints/{job.stage.key}"),
        start_adapter=None,
        tracking=None,
    )
    train(worker_job)
    return json.loads(worker_job.result_path.read_text())


def _build(recipe: Path, upto: str, overrides: Mapping[str, str]) -> dict[str, str]:
    from regrow.configs.load import load_recipe
    from regrow.flows.workplace import Workplace
    from regrow.infra.settings import load_settings
    from regrow.tasks.plan import make_plan

    loaded = load_recipe(recipe, overrides)
    place = Workplace(load_settings(), loaded.recipe.store)
    plan = make_plan(loaded.recipe, loaded.name, place.memo)
    here = replace(plan.train, runner="tests.services.pipelines:train_here")
    told = {}
    for stage in plan.upto(upto):
        stage = here if stage.name == "train" else stage
        inputs = {n: here if s.name == "train" else s for n, s in stage.inputs.items()}
        outcome = place.builder.build(replace(stage, inputs=inputs), _Report())
        told[stage.title] = "cached" if outcome.cached else "built"
    return told


def _child(wish: dict[str, Any], answers: int) -> None:
    try:
        os.environ.update(wish["env"])
        told = _build(Path(wish["recipe"]), wish["upto"], wish["overrides"])
    except BaseException as error:  # noqa: BLE001 (how a run ends is its parent's to judge)
        traceback.print_exc()
        told = {"error": f"{type(error).__name__}: {error}"}
    os.write(answers, (json.dumps(told) + "\n").encode())
    sys.stderr.flush()
    os._exit(0)


def _serve() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import s3fs  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    # All of it: what a fork imported later could by then be another version of the file.
    import regrow.configs.load
    import regrow.flows.workplace
    import regrow.infra.hub
    import regrow.tasks.merge.run
    import regrow.tasks.plan
    import regrow.tasks.prepare.run
    import regrow.tasks.train.job
    import regrow.tasks.train.worker  # noqa: F401
    from regrow.infra.launch import die_with_parent

    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    die_with_parent(9)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _child(json.loads(line), answers)
        status = os.waitpid(child, 0)[1]
        if status:
            os.write(answers, (json.dumps({"error": f"ended with {status}"}) + "\n").encode())


if __name__ == "__main__":
    _serve()

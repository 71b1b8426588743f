"""Real ranks of the worker as processes, for tests: laid out, started, killed, heard, weighed."""

from __future__ import annotations

import atexit
import importlib.util
import json
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from regrow.configs.zero import zero_stage
from regrow.infra.launch import WorkerFailed
from regrow.infra.settings import child_environment
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.metrics import read_metrics
from regrow.tasks.train.part import WORKER
from regrow.tasks.train.sharding import Sharding
from tests.forked_ranks import Forker, Group
from tests.tasks.train.weighing_worker import KILL, Held

ROOT = Path(__file__).parents[3]
FSDP = {"version": 2, "reshard_after_forward": True, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


def zero(stage: int) -> Sharding:
    """DeepSpeed as the shipped file of that stage says."""
    path = ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    return Sharding(deepspeed=json.loads(path.read_text()))


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)
WAYS = {
    "ddp": Sharding(),
    "fsdp2": Sharding(fsdp=FSDP),
    "zero2": zero(2),
    "zero3": zero(3),
    # Both ranks share each row.
    "cp": Sharding(context_parallel_size=2),
    "cp-fsdp2": Sharding(fsdp=FSDP, context_parallel_size=2),
    "cp-zero3": Sharding(deepspeed=zero(3).deepspeed, context_parallel_size=2),
}

MODULE = "tests.tasks.train.weighing_worker"


@cache
def _forker() -> Forker:
    """One for all tests of this process. (torchrun's part is in the tests of the train stage.)"""
    env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(ROOT)  # MODULE is one of the tests
    made = Forker(child_environment(env))
    atexit.register(made.close)
    return made


def _attempt(job: WorkerJob, ranks: int, env: dict[str, str]) -> tuple[list[int], str]:
    """(exit status of each rank as `os.waitpid` gives it, all they said)."""
    job.work.mkdir(parents=True, exist_ok=True)
    job.write(job.work / "job.json")
    log = job.work / "log"
    log.unlink(missing_ok=True)
    statuses = Group(_forker(), ranks, env, job.work / "job.json", log, MODULE).finish()
    return statuses, log.read_text()


def run_ranks(job: WorkerJob, ranks: int) -> list[str]:
    """Train with so many ranks; the lines they said.

    Whatever divides the model must have done so: see `check_division`.
    """
    statuses, said = _attempt(job, ranks, {})
    assert not any(statuses), f"{statuses}\n{said[-8000:]}"
    check_division(job, Held.read(job.work), ranks)
    return said.splitlines()


def run_and_kill(job: WorkerJob, ranks: int, step: int, rank: int) -> list[str]:
    """Train until a rank is killed after a step, when the checkpoint before it is there."""
    statuses, said = _attempt(job, ranks, {KILL: f"{rank} {step}"})
    assert statuses[rank] == signal.SIGKILL, f"{statuses}\n{said[-8000:]}"
    return said.splitlines()


def run_forked(
    module: str,
    args: Sequence[str],
    *,
    num_processes: int,
    on_line: Callable[[str], None],
    log_path: Path,
    env: Mapping[str, str],
    **options: Any,
) -> None:
    """In place of `regrow.infra.launch.run_workers`: without torchrun, and the time it takes."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.touch()
    before = len(log_path.read_text())
    (job,) = args
    error = Path(job).with_name("error.json")
    error.unlink(missing_ok=True)
    told = {**env, "TORCHELASTIC_ERROR_FILE": str(error)}
    statuses = Group(_forker(), num_processes, told, Path(job), log_path, module).finish()
    for line in log_path.read_text()[before:].splitlines():
        on_line(line)
    if any(statuses):
        content = json.loads(error.read_text())["message"]
        raise WorkerFailed(content["message"], None, "", log_path)


def resumed_after(said: list[str]) -> int | None:
    """The step after which a training says that it goes on."""
    found = re.search(r"resuming after step (\d+) of", "\n".join(said))
    return int(found[1]) if found else None


def pass_on(
    job_of: Callable[[str, str, Any, str], WorkerJob],
    kind: str,
    ways: Sequence[tuple[Any, int]],
    steps: int = 20,
) -> WorkerJob:
    """One training by one way after the other, each with so many ranks; the job of the last.

    A checkpoint is due at every fourth step. One step after it the last rank of each way but the
    last is killed, and the next way goes on from there.
    """
    part = steps // len(ways) // 4 * 4
    assert part
    for number, (way, ranks) in enumerate(ways):
        job = job_of(f"part-{number}", kind, way, "checkpoints/a")
        if number < len(ways) - 1:
            said = run_and_kill(job, ranks, step=part * (number + 1) + 1, rank=ranks - 1)
        else:
            said = run_ranks(job, ranks)
        assert resumed_after(said) == (part * number or None)
    return job


def check_division(job: WorkerJob, held: list[Held], ranks: int) -> None:
    """Fails where a rank holds more than its part, or less than the whole of what is not divided.

    Parts are uneven where a dimension is odd, and DeepSpeed keeps small parameters whole.
    """
    assert len(held) == ranks
    sharding = job.placement.sharding
    stage = zero_stage(sharding.deepspeed)
    for rank in held:
        weights, stepped = rank.weights / rank.all_weights, rank.stepped / rank.all_stepped
        if ranks == 1 or not (sharding.shards or stage):
            assert (weights, stepped) == (1, 1), rank
            continue
        part = sharding.dp_replicate_size / ranks
        assert part / 1.2 < stepped < part * 1.6, rank
        # Quantized weights stay whole under FSDP2 (`regrow.tasks.train.undivided`).
        if sharding.shards and job.spec.quantization is None:
            assert part / 1.2 < weights < part * 1.6, rank
        elif not sharding.shards:
            assert weights == 1, rank


def rank_pids(work: Path) -> dict[int, int]:
    """{rank: process id} of the living ranks below this process that train in a directory."""
    return _ranks_among(psutil.Process(), str(work / "job.json"))


def rank_pids_of(pid: int) -> dict[int, int]:
    """{local rank: process id} of the living ranks below a process."""
    return _ranks_among(psutil.Process(pid), WORKER)


def _ranks_among(process: psutil.Process, word: str) -> dict[int, int]:
    found = {}
    for child in process.children(recursive=True):
        try:
            words, env = child.cmdline(), child.environ()
        except psutil.Error:
            continue
        if word in words and "LOCAL_RANK" in env:
            found[int(env["LOCAL_RANK"])] = child.pid
    return found


def losses(path: Path) -> dict[int, float]:
    """{step: loss} of a metrics file."""
    return {r["step"]: r["loss"] for r in read_metrics(path) if "loss" in r}


def tensors(job: WorkerJob) -> dict[str, torch.Tensor]:
    """The weights that a training gave."""
    (path,) = job.out.glob("*.safetensors")
    return load_file(path)


def largest_difference(job: WorkerJob, other: WorkerJob) -> float:
    """Between the weights of two trainings, which have the same names and types."""
    ours, theirs = tensors(job), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


def follows(job: WorkerJob, other: WorkerJob, weights: float = 1e-3) -> bool:
    """Whether two trainings have one curve and one result; how far they are apart is printed.

    Args:
        weights: largest difference; a step of Adam is up to the learning rate, 1e-2 or 1e-3.
    """
    ours, theirs = losses(job.metrics_path), losses(other.metrics_path)
    assert ours.keys() == theirs.keys()
    apart = max(abs(ours[step] - theirs[step]) for step in theirs)
    difference = largest_difference(job, other)
    print(f"{job.out.parent.name}: losses within {apart:.1e}, weights within {difference:.1e}")
    return apart < 1e-4 and difference < weights

"""Trains through an existing Ray cluster: Ray places the workers, torchrun's agents run in them.

Each Ray worker is an actor that runs one machine's ranks, as `regrow.tasks.train.node` does where
there is no Ray. Regrow must be installed on the cluster's machines, and all need one store. The
only importer of Ray.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from regrow.infra.artifacts import ArtifactStore
from regrow.infra.launch import WorkerFailed, free_port
from regrow.tasks.stage import Reporter, StageError
from regrow.tasks.train.cluster import RayWorkers
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.machines import failures, keep_files, most_telling
from regrow.tasks.train.part import Call, Ended, failure_of, localize, take_part

_POLL = 0.5
_GRACE = 30.0  # for ranks that lost their peers to end in good order, as in `meeting`
_END = 90.0  # for ranks that were told to stop: a checkpoint, then torchrun's own 30 s
_GONE = "the Ray worker has gone"


class Machine:
    """The actor: one machine's ranks of one attempt."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._lines: list[str] = []
        self._read = 0

    def place(self) -> tuple[str, int]:
        """(address, free port) of this machine."""
        return ray.util.get_node_ip_address(), free_port()

    def take_part(self, call_json: str, rank: int, handover: str) -> str:
        """Run the ranks; `Ended` as JSON. The first machine puts the result into the store, as the
        artifact `handover`."""
        call = Call.from_json(call_json)
        work = Path(tempfile.mkdtemp(prefix="regrow-ray-"))
        try:
            job = localize(call, work / "train")
            ended = take_part(call, rank, job, self._lines.append, work / "log", self._stop)
            if rank == 0 and ended.failure is None:
                ended = _hand_over(call, job, handover)
        except (StageError, ValueError, OSError) as error:
            ended = Ended(failure_of(f"StageError: {error}"))
        except Exception as error:  # noqa: BLE001 (it is told, and not as the loss of a worker)
            told = f"{type(error).__name__}: {error}"
            ended = Ended(failure_of(told, rank=rank, trace=traceback.format_exc()))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return ended.to_json()

    def lines(self) -> list[str]:
        """What the ranks have said since the last call."""
        found = self._lines[self._read :]
        self._read += len(found)
        return found

    def stop(self) -> None:
        """End the ranks in good order."""
        self._stop.set()


def _hand_over(call: Call, job: WorkerJob, key: str) -> Ended:
    artifacts = ArtifactStore.open_url(call.store)
    artifacts.remove(key)  # of an earlier run that ended before it was fetched
    artifacts.publish(key, job.out, stage="handover", spec=None, inputs={}, result={})
    return Ended(files={job.result_path.name: job.result_path.read_text()})


class RayCluster:
    """`Machines` of a Ray cluster."""

    def __init__(
        self, workers: RayWorkers, store: str, prepared: str, handover: str, report: Reporter
    ) -> None:
        """`store` and `prepared`: where the rows are, see `Call`; `handover`: a key for the result.

        Raises:
            StageError: when there is no cluster.
        """
        self._workers, self._report = workers, report
        self._store, self._prepared, self._handover = store, prepared, handover
        self._is_ours = not ray.is_initialized()
        try:
            if self._is_ours:
                ray.init(address="auto", log_to_driver=False, configure_logging=False)
        except ConnectionError as error:
            raise StageError(
                f"launcher: ray: no Ray cluster is found ({error}). Start one with `ray start "
                "--head`, name yours in RAY_ADDRESS, or run inside `ray job submit`"
            ) from error

    def run(self, job: WorkerJob, on_line: Callable[[str], None], log: Path) -> None:
        """See `Machines.run`."""
        count = self._workers.count or machines_with(self._workers.resources, ray.nodes())
        group = self._reserve(count, job.placement.hang_timeout)
        machines: list[Any] = []
        try:
            machines = [_machine(group, index) for index in range(count)]
            address, port = _place(machines[0], log)
            call = Call(job.to_json(), self._store, self._prepared, count, address, port)
            ends = self._attend(call, machines, on_line, log)
        finally:
            for machine in machines:
                ray.kill(machine)
            remove_placement_group(group)
        keep_files(ends, job.work)
        failed = failures(ends, log)
        if failed:
            raise most_telling(failed)
        self._take_over(job)

    def _reserve(self, count: int, patience: float | None) -> Any:
        resources = dict(self._workers.resources) or {"CPU": 1}
        group = placement_group([resources] * count, strategy="SPREAD")
        if not group.wait(patience or 1e9):
            remove_placement_group(group)
            raise StageError(
                f"the Ray cluster does not have {count} times {resources} free within "
                f"{patience:g} s; it has {ray.available_resources()}. Lower ray_num_workers or "
                "resources_per_worker, or raise hang_timeout"
            )
        self._report.log(f"training on {count} Ray workers with {resources} each")
        return group

    def _attend(
        self, call: Call, machines: Sequence[Any], on_line: Callable[[str], None], log: Path
    ) -> dict[int, Ended]:
        """Pass lines on until all parts have ended; once one failed, the others are ended too."""
        text = call.to_json()
        running = {
            machine.take_part.remote(text, rank, self._handover): rank
            for rank, machine in enumerate(machines)
        }
        ends: dict[int, Ended] = {}
        failed_at: float | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file, _stopped(machines, running):
            while running:
                done, _ = ray.wait(list(running), num_returns=len(running), timeout=_POLL)
                for line in _lines(machines[0]):
                    file.write(line + "\n")
                    on_line(line)
                for reference in done:
                    rank = running.pop(reference)
                    ends[rank] = _ended(reference)
                    if ends[rank].failure and failed_at is None:
                        failed_at = time.monotonic()
                if failed_at is not None and time.monotonic() - failed_at > _GRACE:
                    _stop(machines)
        return ends

    def _take_over(self, job: WorkerJob) -> None:
        """Fetch what the first machine has put into the store."""
        artifacts = ArtifactStore.open_url(self._store)
        record = artifacts.lookup(self._handover)
        if record is None:
            raise StageError(
                f"the result of the Ray workers is not in {self._store}: machines that train "
                "together need one store: set `store` to a URL or a shared directory"
            )
        shutil.copytree(artifacts.fetch(record), job.out)
        artifacts.remove(self._handover)

    def close(self, why: str) -> None:
        """See `Machines.close`."""
        if self._is_ours:
            ray.shutdown()


def machines_with(resources: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> int:
    """How many living machines of a cluster have what one worker needs; 1 where none has, so that
    what is missing is named. A head node often has no GPU."""
    able = [
        node
        for node in nodes
        if node["Alive"]
        and all(node["Resources"].get(name, 0) >= need for name, need in resources.items())
    ]
    return max(1, len(able))


def _place(machine: Any, log: Path) -> tuple[str, int]:
    """Where the ranks meet. Raises WorkerFailed when the first machine has gone already."""
    try:
        return ray.get(machine.place.remote())
    except RayError as error:
        raise WorkerFailed(f"{_GONE}: {type(error).__name__}", 0, "", log, "SIGKILL") from error


def _machine(group: Any, index: int) -> Any:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    bundle: Mapping[str, float] = group.bundle_specs[index]
    others = {name: value for name, value in bundle.items() if name not in ("CPU", "GPU")}
    made = ray.remote(Machine).options(
        num_cpus=bundle.get("CPU", 0),
        num_gpus=bundle.get("GPU", 0),
        resources=others,
        scheduling_strategy=strategy,
        max_concurrency=4,  # its ranks, their lines, a wish to stop
    )
    return made.remote()


@contextlib.contextmanager
def _stopped(machines: Sequence[Any], running: Mapping[Any, int]) -> Any:
    """Whatever ends the block, the ranks end in good order."""
    try:
        yield
    finally:
        if running:
            _stop(machines)
            ray.wait(list(running), num_returns=len(running), timeout=_END)


def _stop(machines: Sequence[Any]) -> None:
    for machine in machines:
        machine.stop.remote()  # a machine that has gone needs none


def _lines(machine: Any) -> list[str]:
    try:
        return ray.get(machine.lines.remote())
    except RayError:
        return []  # it has gone, which its end tells


def _ended(reference: Any) -> Ended:
    try:
        return Ended.from_json(ray.get(reference))
    except RayTaskError as error:  # the actor lives: this is an error of ours, not its loss
        return Ended(failure_of(f"{type(error.cause).__name__}: {error.cause}", trace=str(error)))
    except RayError as error:
        return Ended(failure_of(f"{_GONE}: {type(error).__name__}", "SIGKILL"))

"""One machine's part in an attempt that several machines make together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.infra.artifacts import ArtifactStore
from regrow.infra.build_folder import VARIABLE as EXTENSIONS
from regrow.infra.build_folder import build_folder, usual_folder
from regrow.infra.device_files import Devices
from regrow.infra.digests import DigestMemo
from regrow.infra.launch import WorkerFailed, run_workers
from regrow.infra.nodes import Nodes
from regrow.infra.settings import VISIBLE_DEVICES, load_settings
from regrow.infra.store import Store
from regrow.tasks import identity
from regrow.tasks.stage import StageError
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.spec import TrainPlacement, TrainSpec

WORKER = "regrow.tasks.train.rank"
EVIDENCE = ("stacks-rank-*.txt", "non-finite-rank-*.json")
"""What a failed worker leaves in its directory for people."""

# How gloo and NCCL word the loss of a rank that died without an error of its own.
PEER_LOST = r"Connection (closed|reset) by peer|remote process exited|DistBackendError|NCCL timeout"


@dataclass(frozen=True)
class Call:
    """What every machine is told of an attempt."""

    job: Mapping[str, Any]
    """`WorkerJob.to_json`, with the paths of who calls."""
    store: str
    """URL of the artifact store that all machines share."""
    prepared: str
    """Key of the prepared rows in it."""
    machines: int
    address: str
    port: int
    """Where the ranks meet: on machine 0."""

    def nodes(self, rank: int) -> Nodes:
        """The group of ranks, seen from one machine."""
        return Nodes(self.machines, rank, self.address, self.port)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Call:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Ended:
    """How a machine's part came to its end."""

    failure: Mapping[str, Any] | None = None
    """{"message", "rank", "trace", "signal", "log"} of what failed first on it; None: nothing."""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """{name: text} of what its worker left of its early end."""

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Ended:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


def failure_of(
    message: str,
    signal: str | None = None,
    rank: int | None = None,
    trace: str = "",
    log: Path | None = None,
) -> dict[str, Any]:
    """The parts of a `WorkerFailed` of this machine, for `Ended`."""
    place = f"{socket.gethostname()}:{log or ''}"
    return {"message": message, "rank": rank, "trace": trace, "signal": signal, "log": place}


def localize(call: Call, work: Path) -> WorkerJob:
    """The job with this machine's paths; what is missing here is fetched.

    Raises:
        StageError: when the machines share no store.
    """
    job = WorkerJob.from_json(call.job)
    prepared = job.prepared
    home = load_settings().home
    memo = DigestMemo(home / "digests.sqlite")
    artifacts = ArtifactStore(Store(call.store), home / "cache", memo)
    # A path below a store is the same data on every machine; one below a cache may be anything.
    if artifacts.store.local is None or not _is_whole(prepared):
        record = artifacts.lookup(call.prepared)
        if record is None:
            raise StageError(
                f"{socket.gethostname()} does not find the prepared data in {call.store}: machines "
                "that train together need one store: set `store` to a URL or a shared directory"
            )
        prepared = artifacts.fetch(record)
    return dataclasses.replace(
        job,
        prepared=prepared,
        base_model=identity.weights_at(job.placement.base_model, job.spec.base_model_digest),
        start_adapter=start_adapter(job.spec, job.placement),
        out=work / "final",
        work=work,
    )


def _is_whole(prepared: Path) -> bool:
    """Whether all rows are there: an evaluation before may have brought a part of the artifact."""
    if not (prepared / "index.json").is_file():
        return False
    splits = json.loads((prepared / "index.json").read_text())["splits"].values()
    files = [shard["file"] for split in splits for shard in split["shards"]]
    return all((prepared / file).is_file() for file in files)


def start_adapter(spec: TrainSpec, placement: TrainPlacement) -> Path | None:
    """The adapter that training starts from, on this machine, if there is one."""
    if placement.start_adapter is None:
        return None
    assert spec.adapter is not None, "an adapter to start from without an adapter to train"
    return identity.adapter_at(placement.start_adapter, spec.adapter.start)


def run_ranks(
    job: WorkerJob,
    on_line: Callable[[str], None],
    log: Path,
    nodes: Nodes | None = None,
    stop: threading.Event | None = None,
    devices: Devices | None = None,
) -> None:
    """Run a job's ranks on this machine; see `regrow.infra.launch.run_workers`.

    Args:
        devices: the GPUs that they are to see.
    """
    env = dict(job.placement.reporters.environment)
    files = list(devices.files) if devices else []
    if devices:
        env[VISIBLE_DEVICES] = devices.words
    path = job.work / "job.json"
    job.write(path)
    with contextlib.ExitStack() as stack:
        if job.placement.sharding.deepspeed is not None:  # it compiles its operators
            folder = usual_folder()
            files.append(stack.enter_context(build_folder(folder)))
            env[EXTENSIONS] = str(folder)
        run_workers(
            WORKER,
            [str(path)],
            num_processes=job.placement.num_processes,
            on_line=on_line,
            log_path=log,
            env=env,
            nodes=nodes,
            stop=stop,
            keep=tuple(files),
        )


def take_part(
    call: Call,
    rank: int,
    job: WorkerJob,
    on_line: Callable[[str], None],
    log: Path,
    stop: threading.Event,
) -> Ended:
    """Run this machine's ranks of an attempt until they end, or `stop` is set."""
    job.work.mkdir(parents=True, exist_ok=True)
    failure = None
    try:
        run_ranks(job, on_line, log, call.nodes(rank), stop)
    except WorkerFailed as error:
        failure = failure_of(error.message, error.signal, error.rank, error.trace, error.log_path)
    files = {
        found.name: found.read_text()
        for pattern in (*EVIDENCE, job.preempted_path.name)
        for found in sorted(job.work.glob(pattern))
    }
    return Ended(failure, files)

"""Starts a training's ranks: on this machine, or together with the others it belongs to."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from regrow.infra.beside import beside
from regrow.infra.device_files import Devices
from regrow.infra.launch import WorkerFailed, free_port
from regrow.infra.nodes import Nodes
from regrow.tasks.stage import Reporter, StageError
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.meeting import Meeting
from regrow.tasks.train.part import PEER_LOST, Call, Ended, run_ranks

_POLL = 0.2
_TELL_EVERY = 60.0
_LATECOMERS = 300.0  # machines of one job come within minutes of each other
_LAST_WORDS = 60.0  # for the parts of other machines to end after one failed (30 s of grace each)


class Machines(Protocol):
    """Where the ranks run."""

    def run(self, job: WorkerJob, on_line: Callable[[str], None], log: Path) -> None:
        """One attempt. Raises WorkerFailed, or StageError for what the user can mend."""
        ...

    def close(self, why: str) -> None:
        """Training is over; `why` it failed, or "" when it did not."""
        ...


class ThisMachine:
    """All ranks here, on these GPUs (None: on whichever)."""

    def __init__(self, devices: Devices | None = None) -> None:
        self._devices = devices

    def run(self, job: WorkerJob, on_line: Callable[[str], None], log: Path) -> None:
        """See `Machines.run`."""
        run_ranks(job, on_line, log, devices=self._devices)

    def close(self, why: str) -> None:
        """Nothing is open."""


class FirstMachine:
    """Ranks here and on the machines that follow this one (`regrow.tasks.train.node`)."""

    def __init__(self, nodes: Nodes, store: str, prepared: str, report: Reporter) -> None:
        """`store` and `prepared`: where the others find the rows, see `Call`."""
        self._nodes, self._store, self._prepared = nodes, store, prepared
        self._report = report
        self._meeting = Meeting.host(nodes, say=report.log)
        self._attempt = 0

    def run(self, job: WorkerJob, on_line: Callable[[str], None], log: Path) -> None:
        """See `Machines.run`."""
        number, self._attempt = self._attempt, self._attempt + 1
        nodes = self._nodes
        call = Call(
            job.to_json(), self._store, self._prepared, nodes.count, nodes.address, free_port()
        )
        self._meeting.call(number, call)
        try:
            self._await_others(number, job.placement.hang_timeout)
        except StageError:
            self._meeting.tell_failure(number)  # those that are ready wait for us
            raise
        stop = threading.Event()
        with beside(partial(self._meeting.watch, number, stop), "meeting"):
            try:
                run_ranks(job, on_line, log, call.nodes(0), stop)
            except WorkerFailed as failure:
                self._meeting.tell_failure(number)
                ends = self._last_words(number)
                keep_files(ends, job.work)
                raise most_telling([failure, *failures(ends, log)]) from failure

    def close(self, why: str) -> None:
        """See `Machines.close`."""
        self._meeting.close(self._attempt, why)

    def _await_others(self, number: int, patience: float | None) -> None:
        begin = told = time.monotonic()
        while True:
            missing, faults = self._meeting.not_ready(number)
            if faults:
                raise StageError("; ".join(faults))
            if not missing:
                return
            now = time.monotonic()
            names = ", ".join(map(str, missing))
            if patience is not None and now - begin > patience:
                raise StageError(
                    f"machine {names} of {self._nodes.count} did not come within {patience:g} s: "
                    "start `python -m regrow.tasks.train.node` there, or raise hang_timeout"
                )
            if now - told > _TELL_EVERY:
                told = now
                self._report.log(f"waiting for machine {names} of {self._nodes.count}")
            time.sleep(_POLL)

    def _last_words(self, number: int) -> dict[int, Ended]:
        end = time.monotonic() + _LAST_WORDS
        ends = self._meeting.ends(number)
        while len(ends) < self._nodes.count - 1 and time.monotonic() < end:
            time.sleep(_POLL)
            ends = self._meeting.ends(number)
        return ends


def send_away(nodes: Nodes, say: Callable[[str], None], why: str = "") -> None:
    """On machine 0, where there is nothing to train: the others, who wait for it, hear it and end.

    Args:
        why: what failed before; "" when nothing did.
    """
    say(f"telling the {nodes.count - 1} other machines that there is nothing to train")
    # Attempts are numbered from 0, and whoever comes asks for that one.
    Meeting.host(nodes, say=say).close(0, why, seconds=_LAST_WORDS if why else _LATECOMERS)


def failures(ends: Mapping[int, Ended], log: Path) -> list[WorkerFailed]:
    """What failed on other machines, in order of machines."""
    found: list[WorkerFailed] = []
    for _, ended in sorted(ends.items()):
        what: Any = ended.failure
        if what:
            place = Path(f"{log} and {what['log']}")
            found.append(
                WorkerFailed(what["message"], what["rank"], what["trace"], place, what["signal"])
            )
    return found


def most_telling(found: list[WorkerFailed]) -> WorkerFailed:
    """The failure that the others follow from: the first that is no loss of a peer and no order
    to stop."""

    def weight(failure: WorkerFailed) -> int:
        if failure.signal:
            return 3 if failure.signal == "SIGTERM" else 1
        return 2 if re.search(PEER_LOST, failure.message) else 0

    return min(found, key=weight)


def keep_files(ends: Mapping[int, Ended], work: Path) -> None:
    """Put the evidence of other machines beside our own; files are named by global rank."""
    for ended in ends.values():
        for name, text in ended.files.items():
            if not (work / name).exists():
                (work / name).write_text(text)

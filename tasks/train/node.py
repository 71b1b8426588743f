"""Takes part in a training that machine 0 leads: `python -m regrow.tasks.train.node` on each other.

Machine 0 runs the pipeline, with `regrow run recipe.yaml`. This process waits for its train stage,
runs this machine's ranks in each of its attempts, and ends with it: with code 0 when training has
come to its end, 1 when it failed. `regrow.infra.nodes` says how the machines are told of each
other; all need one store.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from functools import partial
from pathlib import Path

from regrow.infra.beside import beside
from regrow.infra.nodes import Nodes, nodes_here
from regrow.infra.settings import load_settings
from regrow.tasks.stage import StageError
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.meeting import Lost, Meeting, Over
from regrow.tasks.train.part import Call, Ended, failure_of, localize, take_part

logger = logging.getLogger("regrow.tasks.train.node")  # __name__ is __main__ when launched


def follow(nodes: Nodes, work: Path, logs: Path) -> str:
    """Take part until training is over; why it failed, or "" when it did not.

    When machine 0 goes without a word, its next run is waited for: the cluster starts it again.
    """
    name, attempt = "", 0
    while True:
        meeting = Meeting.join(nodes, logger.info)
        if meeting.name != name:  # not the same one, its connection having been lost
            name, attempt = meeting.name, 0
        try:
            while True:
                call = meeting.next_call(attempt)
                job = _get_ready(meeting, attempt, call, nodes.rank, work / f"attempt-{attempt}")
                attempt += 1  # had the answer been lost, the same call would be answered again
                if job is not None:
                    _take_part(meeting, attempt - 1, call, job, nodes.rank, logs)
        except Over as over:
            return over.why
        except Lost as lost:
            logger.warning("machine 0 has gone (%s)", lost)


def _get_ready(
    meeting: Meeting, attempt: int, call: Call, rank: int, here: Path
) -> WorkerJob | None:
    """The job in a directory that is new; None when this machine cannot take part."""
    try:
        if here.exists():  # of machine 0's run before, which had an attempt of that number too
            shutil.rmtree(here)
        job = localize(call, here)
    except Exception as error:  # machine 0 is told, whatever it is, and says it
        known = isinstance(error, (StageError, ValueError, OSError))
        logger.error("%s", error, exc_info=not known)
        told = str(error) if known else f"{type(error).__name__}: {error}"
        meeting.tell_ready(attempt, f"machine {rank}: {told}")
        return None
    meeting.tell_ready(attempt)
    return job


def _take_part(
    meeting: Meeting, attempt: int, call: Call, job: WorkerJob, rank: int, logs: Path
) -> None:
    logger.info("training begins: %d machines, attempt %d", call.machines, attempt + 1)
    stop, log = threading.Event(), logs / f"train-machine-{rank}.log"
    with beside(partial(meeting.watch, attempt, stop), "meeting"):
        try:
            ended = take_part(call, rank, job, logger.info, log, stop)
        except KeyboardInterrupt:
            with contextlib.suppress(Lost):  # machine 0 may be told to stop at the same moment
                meeting.tell_end(attempt, Ended(failure_of("it was told to stop", "SIGTERM")))
            raise
        except Exception as error:  # machine 0 would wait for an end that never comes
            logger.exception("this machine's part failed")
            told = f"{type(error).__name__}: {error}"
            ended = Ended(failure_of(told, trace=traceback.format_exc()))
    meeting.tell_end(attempt, ended)
    shutil.rmtree(job.work, ignore_errors=True)


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends the ranks in good order first: they save a checkpoint together."""
    raise KeyboardInterrupt


def main() -> int:
    """Entry of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    nodes = nodes_here()
    if nodes is None or nodes.is_first:
        sys.stderr.write(
            "this machine is the first or the only one: `regrow run recipe.yaml` is for it\n"
        )
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    home = load_settings().home
    (home / "work").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="node-", dir=home / "work") as work:
        try:
            why = follow(nodes, Path(work), home / "logs")
        except KeyboardInterrupt:
            return 128 + signal.SIGTERM
    if why:
        logger.error("training failed on machine 0: %s", why)
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())

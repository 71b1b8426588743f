"""An evaluation in a process of its own: what it had of a GPU, CUDA's context too, ends with it.

In the process of the run the context, some hundred MiB, would stay on a GPU that is another run's
from then on. Started as `python -m regrow.tasks.evaluate.alone FD`, which reads a job from a
connection, and writes there what the evaluation says, and how it ended.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from regrow.infra.launch import die_with_parent
from regrow.infra.settings import child_environment
from regrow.tasks.stage import StageError, StageJob


def run_alone(job: StageJob) -> dict[str, Any]:
    """The result of `run.on_device` in a new process, which keeps the job's GPUs until it ends.

    Args:
        job: its inputs are whole directories, and nothing is fetched for it any more.

    Raises:
        StageError: as the evaluation does, or when its process ends without a word.
    """
    assert job.devices is not None
    assert job.fetch is None
    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "regrow.tasks.evaluate.alone", str(theirs.fileno())],
        env=child_environment(),
        pass_fds=[theirs.fileno(), *job.devices.files],
        start_new_session=True,  # Ctrl-C is for us, who end it
        preexec_fn=die_with_parent,
    )
    theirs.close()
    try:
        ours.send(replace(job, report=None, units=None))  # what cannot be sent
        return _heard(ours, job)
    except (EOFError, ConnectionError) as error:
        code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise StageError(
            f"the evaluation's process ended without a word ({how}); SIGKILL often means that the "
            "machine's memory was full"
        ) from error
    finally:
        process.kill()
        process.wait()
        ours.close()


def _heard(connection: Connection, job: StageJob) -> dict[str, Any]:
    while True:
        what, given = connection.recv()
        if what == "result":
            return given
        if what == "error":
            raise given
        getattr(job.report, what)(*given)


@dataclass(frozen=True)
class _Report:
    """What the evaluation says, told to the process that started it."""

    connection: Connection

    def progress(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        self.connection.send(("progress", (done, total, unit, note)))

    def log(self, message: str) -> None:
        self.connection.send(("log", (message,)))


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, as it can be sent."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 (whatever a class of errors does when it is copied)
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.add_note(error.__notes__[-1])
        return told


def main() -> None:
    """Entry of the process."""
    connection = Connection(int(sys.argv[1]))
    job = connection.recv()
    from regrow.tasks.evaluate.run import on_device

    try:
        result = on_device(replace(job, report=_Report(connection)))
    except Exception as error:  # noqa: BLE001 (it is raised where it is waited for)
        connection.send(("error", _portable(error)))
    else:
        connection.send(("result", result))


if __name__ == "__main__":
    main()

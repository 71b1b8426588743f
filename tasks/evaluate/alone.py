"""An evaluation in a process of its own: what it had of a GPU, CUDA's context too, ends with it.

In the process of the run the context, some hundred MiB, would stay on a GPU that is another run's
from then on. Started as `python -m regrow.tasks.evaluate.alone FD`, which reads a job from a
connection, and writes there what the evaluation says, and how it ended. What libraries print goes
into a log file, with secrets masked.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import IO, Any

from regrow.infra.imports import importing
from regrow.infra.launch import die_with_parent
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import child_environment
from regrow.tasks.stage import StageError, StageJob

_LAST_LINES = 5  # of its output, shown when it ended without a word
_LOG_SECONDS = 5  # for the rest of its output; a process that it left behind may keep the pipe


class _Ended(Exception):
    """The other process takes and says nothing any more."""


def run_alone(job: StageJob) -> dict[str, Any]:
    """The result of `run.on_device` in a new process, which keeps the job's GPUs until it ends.

    Args:
        job: its inputs are whole directories, and nothing is fetched for it any more.

    Raises:
        StageError: as the evaluation does, or when its process ends without a word.
        Exception: any other that the evaluation ended with, and its causes.
    """
    assert job.fetch is None
    log = _log_path(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = Pipe()
    with log.open("a", encoding="utf-8", buffering=1) as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "regrow.tasks.evaluate.alone", str(theirs.fileno())],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            pass_fds=[theirs.fileno(), *(job.devices.files if job.devices else ())],
            start_new_session=True,  # Ctrl-C is for us, who end it
            preexec_fn=die_with_parent,
        )
        theirs.close()
        last: deque[str] = deque(maxlen=_LAST_LINES)
        writer = Thread(target=_keep, args=(process.stdout, file, last), daemon=True)
        writer.start()
        try:
            return _answer(ours, job)
        except _Ended as error:
            code = process.wait()
            writer.join(_LOG_SECONDS)
            raise StageError(_without_a_word(code, last, log)) from error
        finally:
            process.kill()
            process.wait()
            writer.join(_LOG_SECONDS)
            ours.close()


def _log_path(job: StageJob) -> Path:
    return (job.logs or job.scratch) / f"evaluate-{job.stage.key[:12]}.log"


def _keep(output: IO[str], file: IO[str], last: deque[str]) -> None:
    """Write all output down; on when the disk is full too, or who prints would wait for ever."""
    with output:
        for line in output:
            last.append(mask_secrets(line))
            with contextlib.suppress(OSError, ValueError):  # the latter: closed by who waited
                file.write(last[-1])


def _without_a_word(code: int, last: Iterable[str], log: Path) -> str:
    names = {each.value: each.name for each in signal.Signals}
    how = names.get(-code, f"signal {-code}") if code < 0 else f"exit code {code}"
    text = f"the evaluation's process ended without a word ({how})"
    if how == "SIGKILL":
        text += "; that often means that the machine's memory was full"
    return f"{text}\n{''.join(last)}Its output: {log}"


def _answer(connection: Connection, job: StageJob) -> dict[str, Any]:
    with _watched():
        connection.send(replace(job, report=None, units=None))  # what cannot be sent
    while True:
        with _watched():
            what, given = connection.recv()
        if what == "result":
            return given
        if what == "error":
            raise _as_error(given)
        getattr(job.report, what)(*given)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:  # the latter also in the middle of a message
        raise _Ended from error


@dataclass(frozen=True)
class _Report:
    """What the evaluation says, told to the process that started it."""

    connection: Connection

    def progress(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        self.connection.send(("progress", (done, total, unit, note)))

    def log(self, message: str) -> None:
        self.connection.send(("log", (message,)))


_Told = list[tuple[bytes, str]]
"""An error and its causes: each pickled (empty: it cannot be), and in words."""


def _as_told(error: BaseException) -> _Told:
    error.add_note("".join(traceback.format_exception(error)))
    told: _Told = []
    cause: BaseException | None = error
    while cause is not None:
        words = str(cause) if isinstance(cause, StageError) else f"{type(cause).__name__}: {cause}"
        try:
            told.append((pickle.dumps(cause), words))
        except Exception:  # noqa: BLE001 (whatever a class of errors does when it is copied)
            told.append((b"", words))
        cause = cause.__cause__ or cause.__context__
    return told


def _as_error(told: _Told) -> BaseException:
    """The error again, and its causes; a StageError for one whose class is not known here."""
    found = [_unpickled(*each) for each in told]
    for error, cause in pairwise(found):
        error.__cause__ = cause
    return found[0]


def _unpickled(pickled: bytes, words: str) -> BaseException:
    with contextlib.suppress(Exception):  # a class of the model's own code, or one hard to copy
        error = pickle.loads(pickled)
        if isinstance(error, BaseException):
            return error
    return StageError(words)


def main() -> None:
    """Entry of the process."""
    connection = Connection(int(sys.argv[1]))
    try:
        job = connection.recv()
        with importing():
            from regrow.tasks.evaluate.run import on_device
        answer = "result", on_device(replace(job, report=_Report(connection)))
    except Exception as error:  # noqa: BLE001 (it is raised where it is waited for)
        traceback.print_exc()  # into the log
        answer = "error", _as_told(error)
    connection.send(answer)


if __name__ == "__main__":
    main()

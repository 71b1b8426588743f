"""The journal in a process of its own: MLflow is imported, and written to, beside the run.

MLflow takes more than a second to import, and to open a database another; two threads that import
large packages at once can meet each other's half-imported modules. Started as this module's `main`
with a connection's number, it reads what to do there, one call after the other, and answers each.
"""

from __future__ import annotations

import atexit
import contextvars
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from regrow.flows.progress import say
from regrow.infra.beside import beside
from regrow.infra.imports import importing
from regrow.infra.launch import die_with_parent
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import Settings, child_environment

if TYPE_CHECKING:
    from regrow.flows.journal import Closing, Journal
    from regrow.infra.tracking import Tracker
    from regrow.tasks.build import Outcome
    from regrow.tasks.stage import Stage

_PROGRAM = "from regrow.flows.journal_process import main; main()"
_WHO = "the process that writes into MLflow"
_WORD_SECONDS = 20.0  # who waits longer for MLflow is told so
_ANSWER_SECONDS = 300.0  # MLflow itself asks a server that is overloaded for minutes
_HURRIED_SECONDS = 10.0  # ... once the run was told to stop: containers are killed 30 s after
_TAIL_BYTES = 2000  # of what the process has printed, where it ended by itself


@dataclass(frozen=True)
class Place:
    """What a journal is about, and where it writes."""

    settings: Settings
    store_url: str
    tracking_uri: str
    experiment: str
    name: str
    """Of the run."""


class JournalProcess:
    """A `Journal` elsewhere; one thread at a time calls its methods, `hurry` and `close` apart.

    They raise what the journal's do, and TrackingError when its process does not answer. One that
    ended (memory was full) is started once more, and goes on with what the first had learned.
    When the thread that started it ends, so does the process.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._run_url: str | None = None
        self._stage_urls: dict[str, str] = {}
        self._memory: dict[str, Any] | None = None
        self._lock = threading.Lock()  # of the following: a run that stops may close it meanwhile
        self._closed, self._hung, self._spares = False, False, 1
        self._limit = _ANSWER_SECONDS
        self._start()

    def _start(self) -> None:
        self._hung = False
        self._connection, theirs = Pipe()
        with theirs:  # open here too, it would keep us waiting for a process that has ended
            # Without a name, as what is in it is not masked; `_drop` closes it.
            self._log = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                env=child_environment(),
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for us, who tell it how the run ended
                preexec_fn=_stay_to_the_end,
            )
        with suppress(OSError):  # told at the first call
            self._connection.send((self.place, self._memory))
            self._memory = self._memory or {}

    def begin(
        self, recipe_text: str, params: Mapping[str, Any], tags: Mapping[str, str], prefect: str
    ) -> None:
        """See `Journal.begin`."""
        self._ask("begin", recipe_text, params, tags, prefect)

    def start_stage(self, stage: Stage, gpus: str = "") -> str:
        """See `Journal.start_stage`."""
        return self._ask("start_stage", stage, gpus)

    def fail_stage(self, run_id: str, message: str, status: str) -> None:
        """See `Journal.fail_stage`."""
        self._ask("fail_stage", run_id, message, status)

    def finish_stage(self, outcome: Outcome, run_id: str | None) -> None:
        """See `Journal.finish_stage`."""
        self._ask("finish_stage", outcome, run_id)

    def register(self, outcome: Outcome, name: str, model: Stage) -> str:
        """See `Journal.register`."""
        return self._ask("register", outcome, name, model)

    def end(self, closing: Closing) -> None:
        """See `Journal.end`; the process ends too."""
        try:
            self._ask("end", closing)
        finally:
            self._ask_pages(closing)
            self.close()

    def _ask_pages(self, closing: Closing) -> None:
        from regrow.infra.tracking import TrackingError

        if self._process.poll() is None:
            stages = [outcome.stage for outcome in closing.outcomes]
            with suppress(TrackingError):
                self._run_url, self._stage_urls = self._ask(_PAGES, stages)

    def hurry(self) -> None:
        """Wait less for an answer: the run was told to stop, or MLflow did not answer before."""
        self._limit = min(self._limit, _HURRIED_SECONDS)

    def close(self) -> None:
        """End the process; what it has answered is written."""
        with self._lock:
            self._closed = True
            self._drop()

    def _drop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._log.close()

    @property
    def run_url(self) -> str | None:
        """See `Journal.run_url`; None before the end."""
        return self._run_url

    def stage_url(self, stage: Stage) -> str | None:
        """See `Journal.stage_url`; None before the end."""
        return self._stage_urls.get(stage.key)

    def _ask(self, what: str, *args: Any) -> Any:
        from regrow.infra.tracking import TrackingError

        while True:
            try:
                with beside(self._watch, "journal-watch"):
                    self._connection.send((what, args))
                    how, answer, self._memory = self._connection.recv()
                self._spares = 1
                break
            except (EOFError, OSError) as error:
                why, hung = f"{_WHO} {self._end()}", self._hung
                if not self._started_again() or hung:
                    raise TrackingError(why) from error
                say(f"{why}; it was started again")
        if how == "error":
            raise answer
        if how == "broken":
            message, trace = answer
            wrong = TrackingError(message)
            wrong.add_note(trace)
            raise wrong
        return answer

    def _watch(self, over: threading.Event) -> None:
        """Kill the process when its answer takes too long."""
        begin, told = time.monotonic(), False
        while not over.wait(0.1):
            waited = time.monotonic() - begin
            if waited > self._limit:
                self._hung = True
                self.hurry()
                self._process.kill()
                return
            if waited > _WORD_SECONDS and not told:
                told = True
                say(f"waiting for MLflow at {mask_secrets(self.place.tracking_uri)}")

    def _started_again(self) -> bool:
        with self._lock:
            if self._closed or not self._spares:
                return False
            self._spares -= 1
            self._drop()
            try:
                self._start()
            except OSError as error:  # no memory for a process, say
                say(f"warning: {_WHO} could not be started again: {error}")
                return False
            return True

    def _end(self) -> str:
        """How the process ended."""
        with self._lock:
            if self._closed:
                return "is closed"
            if self._hung:
                return "did not answer any more and was ended"
            try:
                code = self._process.wait(5)
            except subprocess.TimeoutExpired:
                return "does not answer"
            if code == -signal.SIGKILL:
                return "was killed; that often means that the machine's memory was full"
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            return f"ended by itself ({how}){self._last_words()}"

    def _last_words(self) -> str:
        self._log.seek(0)
        words = mask_secrets(self._log.read().decode(errors="replace")).strip()
        return f"; it said:\n{words[-_TAIL_BYTES:]}" if words else ""


def _stay_to_the_end() -> None:
    """Whoever tells all processes to stop means the run, and that has last words to write."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # lasts through exec
    die_with_parent(signal.SIGKILL)


_PAGES = "pages"
_started: contextvars.ContextVar[JournalProcess | None] = contextvars.ContextVar(
    "journal", default=None
)


def start_journal(place: Place) -> None:
    """Have the process come up now, while this one is busy with other things."""
    process = JournalProcess(place)
    atexit.register(process.close)
    _started.set(process)


def journal_of(place: Place) -> JournalProcess:
    """The process that `start_journal` has started for this, or a new one."""
    process = _started.get()
    _started.set(None)
    if process is not None and process.place == place:
        return process
    if process is not None:
        process.close()
    return JournalProcess(place)


class _Gone(Exception):
    """Whoever asked has ended."""


def main() -> None:
    """Entry of the process."""
    connection = Connection(int(sys.argv[1]))
    with suppress(_Gone):
        desk = _Desk(*_heard(connection))
        while True:
            answer = desk.answer(*_heard(connection))
            try:
                connection.send(answer)
            except OSError as error:
                raise _Gone from error
    os._exit(0)  # nothing is left to do, and what it imported is not walked through


def _heard(connection: Connection) -> Any:
    try:
        packed = connection.recv_bytes()
    except (EOFError, OSError) as error:
        raise _Gone from error
    return pickle.loads(packed)


class _Desk:
    """Where questions are answered; what is wrong with MLflow here is told to who asks."""

    def __init__(self, place: Place, memory: dict[str, Any] | None) -> None:
        self._place, self._memory = place, memory
        """What the journal of a process before this one knew; None: there was none."""
        self._journal: Journal | None = None
        self._wrong: tuple[str, str] | None = None
        try:
            with importing():
                self._tracker = _opened(place)
        except Exception as error:  # noqa: BLE001 (an import may raise anything)
            trace = "".join(traceback.format_exception(error))
            told = f"MLflow cannot be used: {type(error).__name__}: {error}"
            self._wrong = (mask_secrets(told), mask_secrets(trace))

    def answer(self, what: str, args: tuple[Any, ...]) -> tuple[str, Any, dict[str, Any] | None]:
        """How it went, what came of it, and what the journal now knows."""
        if self._wrong:
            return "broken", self._wrong, self._memory
        try:
            if self._journal is None:
                self._journal = self._new_journal()
            how, result = "done", _answer(self._journal, what, args)
        except Exception as error:  # noqa: BLE001 (it is raised where it is waited for)
            how, result = "error", _sendable(error)
        return how, result, self._journal.memory() if self._journal else self._memory

    def _new_journal(self) -> Journal:
        from regrow.flows.journal import Journal
        from regrow.flows.workplace import Workplace

        place = self._place
        artifacts = Workplace(place.settings, place.store_url).artifacts
        journal = Journal(self._tracker, artifacts, place.name)
        if self._memory is not None:
            journal.go_on(self._memory)
        return journal


def _opened(place: Place) -> Tracker:
    """Import MLflow, and make or open a database of its own on this machine, before it is needed.

    What MLflow says against it is told to who uses it first, after another try.
    """
    from regrow.flows import journal, workplace  # noqa: F401 (needed at the first question)
    from regrow.infra import tracking
    from regrow.tasks import plan  # noqa: F401 (what stages are made of)

    tracker = tracking.Tracker(place.tracking_uri, place.experiment)
    tracking.preload()
    if tracker.uri.startswith("sqlite:///"):
        with suppress(tracking.TrackingError):
            tracker.connect()
    return tracker


def _answer(journal: Any, what: str, args: tuple[Any, ...]) -> Any:
    if what != _PAGES:
        return getattr(journal, what)(*args)
    pages = {stage.key: journal.stage_url(stage) for stage in args[0]}
    return journal.run_url, {key: page for key, page in pages.items() if page}


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same, where its class is hard to copy."""
    error.add_note(mask_secrets("".join(traceback.format_exception(error))))
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    told = RuntimeError(mask_secrets(f"{type(error).__name__}: {error}"))
    told.add_note(error.__notes__[-1])
    return told

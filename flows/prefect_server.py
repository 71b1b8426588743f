"""A Prefect server that lives as long as one run: started first, ready by the time the flow is.

Prefect would start one by itself, but only once the flow begins, and import all of the server into
our process to do so; started here, it comes up while MLflow and Prefect are imported (a run with
nothing to do: 8 s instead of 16 s, measured on 2 cores). It serves the same local database, so
`regrow ui` shows the runs afterwards.
"""

from __future__ import annotations

import atexit
import fcntl
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from regrow.flows.progress import say
from regrow.infra.launch import die_with_parent
from regrow.infra.reachable import require_answer
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import child_environment, use_private_prefect

_HOST = "127.0.0.1"
_ANSWER_SECONDS = 10  # a server on another continent answers in one
_READY_SECONDS = 120  # 13 s with the migrations of a fresh database (platform.md B1), if not alone
_TURN_SECONDS = 600.0  # for others that start at the same time; each takes some seconds
_WORD_SECONDS = 5.0  # who waits longer for them is told why
_PROGRAM = "from regrow.flows.server_process import main; main()"
_BACKLOG = 128  # connections that wait while the server comes up: one of each thread that asks


class ServerFailed(RuntimeError):  # noqa: N818 (the name says what is the matter)
    """The server did not come up; the message names its log."""


def require_server(url: str) -> None:
    """Raises ServerFailed when no server answers there."""
    try:
        require_answer(f"{url.rstrip('/')}/health", _ANSWER_SECONDS)
    except OSError as error:
        raise ServerFailed(
            f"PREFECT_API_URL: nothing answers at {mask_secrets(url)} ({error}). Start it "
            "(`prefect server start`, or `regrow ui`), or unset PREFECT_API_URL"
        ) from error


class PrivateServer:
    """The server process of this run.

    Its socket is opened here and handed to it, so its address is known before it is there (Prefect
    reads the address when it is imported), and no other program can take the port meanwhile.

    Args:
        home: local directory for the log.
        prefect_home: local directory of Prefect's database, and so of the lock by which two runs
            that start at once do not migrate a new one together (they would fail each other:
            platform.md B1).
    """

    def __init__(self, home: Path, prefect_home: Path) -> None:
        for folder in (home, prefect_home):
            folder.mkdir(parents=True, exist_ok=True)
        self._log = (home / "prefect-server.log").open("a")
        self._lock: IO[str] = (prefect_home / "regrow-server.lock").open("w")
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket()
        # Inherited by each connection; uvicorn takes a socket that is handed over for a local one,
        # and would let answers wait for more to send.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.bind((_HOST, 0))
        self._socket.listen(_BACKLOG)
        self._url = f"http://{_HOST}:{self._socket.getsockname()[1]}"

    def start(self) -> None:
        """Start the process, if no other is just starting, and return at once.

        From now on this process uses the server: what it asks is answered once that is up.
        """
        use_private_prefect(f"{self._url}/api")
        if self._is_our_turn():  # else `wait` waits for that one first
            self._launch()

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            ServerFailed: when it does not come up, or another does not cease to start.
        """
        if self._process is None:
            self._wait_for_our_turn()
            self._launch()
        self._socket.close()
        if not self._answers():
            raise ServerFailed(f"Prefect's local server did not start; its log is {self._log.name}")
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # the process has it open too
        self._lock.close()

    def _is_our_turn(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _wait_for_our_turn(self) -> None:
        begin, told = time.monotonic(), False
        while not self._is_our_turn():
            waited = time.monotonic() - begin
            if waited > _TURN_SECONDS:
                raise ServerFailed(
                    f"Prefect's local server of another run has been starting, or ending, for "
                    f"{waited:.0f} s; end that run's processes, which have {self._lock.name} open"
                )
            if waited > _WORD_SECONDS and not told:
                told = True
                say("waiting for another run, whose local Prefect server is starting")
            time.sleep(0.05)

    def _launch(self) -> None:
        handed = self._socket.fileno()
        command = ["--factory", "prefect.server.api.server:create_app"]
        command += ["--fd", str(handed), "--log-level", "warning"]
        with self._log as log:
            log.truncate(0)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *command],
                env=child_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                # The lock too: a server whose run was killed ends when its database is made, and
                # until then no other may begin with that.
                pass_fds=[handed, self._lock.fileno()],
                preexec_fn=die_with_parent,
                start_new_session=True,  # Ctrl-C is for us: the server must hear how the run ended
            )
        # Registered before Prefect is imported, so it is called after Prefect's own last words.
        atexit.register(_end, self._process)

    def _answers(self) -> bool:
        """Whether the process answers, waited for while it lives."""
        assert self._process is not None
        end = time.monotonic() + _READY_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self._url}/api/health", timeout=5).close()
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
            else:
                return True
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """All that the run had to say has been answered: nothing is lost by not waiting for it."""
    process.kill()
    process.wait()

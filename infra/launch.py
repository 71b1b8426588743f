"""Start worker processes with torchrun, stream what they say, and end them without orphans.

Facts this rests on (measured, shared reference platform.md part B7): torchrun's workers sit in
sessions of their own, so killing the agent's group leaves them running; the agent told to stop ends
its workers, after 30 s even those that ignore it; and an agent whose parent died needs the kernel's
parent-death signal to notice.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from regrow.infra.beside import beside
from regrow.infra.nodes import Nodes
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import child_environment

_GRACE_SECONDS = 40  # the agent needs 30 s for workers that ignore SIGTERM (measured: 31 s)
_POLL_SECONDS = 0.5  # how soon a wish to stop is seen; nobody waits for it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHER = "REGROW_LAUNCHER"  # tells ranks the process id of who started their agent
# How torchrun words the end of a rank that a signal ended.
_SIGNALLED = re.compile(r"Signal \d+ \((SIG\w+)\) received by PID")


class WorkerFailed(RuntimeError):  # noqa: N818 (the name says what is the matter)
    """A worker process ended with an error.

    `message` is the exception of the first rank that failed, `trace` its traceback, `log_path`
    the file with all output, `signal` the name of the signal that ended it, if one did.
    """

    def __init__(
        self, message: str, rank: int | None, trace: str, log_path: Path, signal: str | None = None
    ) -> None:
        who = "the worker" if rank is None else f"rank {rank} of the worker"
        super().__init__(f"{who} failed: {message}\nIts output, with the traceback: {log_path}")
        self.message, self.rank, self.trace, self.log_path = message, rank, trace, log_path
        self.signal = signal


def world_size() -> int:
    """How many ranks the launcher of this process started; 1 without one."""
    return int(child_environment().get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """This process's number among those of its machine; 0 without a launcher."""
    return int(child_environment().get("LOCAL_RANK") or 0)


def die_with_parent(death_signal: int = signal.SIGTERM) -> None:
    """Ask the kernel to send `death_signal` to this process when its parent ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal))


def end_with_agent() -> None:
    """A rank that torchrun started calls this first: it does not outlive its agent, even a killed
    one, whose locks (see `keep` of `run_workers`) torchrun does not pass on to ranks.
    """
    env = child_environment()
    if "TORCHELASTIC_RUN_ID" not in env:
        return
    die_with_parent(signal.SIGKILL)
    if _LAUNCHER in env and _grandparent() != int(env[_LAUNCHER]):
        sys.exit("the process that started this rank has ended")  # before it could be watched


def _grandparent() -> int | None:
    try:
        return psutil.Process(os.getppid()).ppid()
    except psutil.NoSuchProcess:
        return None


def run_workers(
    module: str,
    args: Sequence[str],
    *,
    num_processes: int,
    on_line: Callable[[str], None],
    log_path: Path,
    env: Mapping[str, str] | None = None,
    nodes: Nodes | None = None,
    stop: threading.Event | None = None,
    keep: Sequence[int] = (),
) -> None:
    """Run `python -m module args` in `num_processes` ranks on this machine and wait for the end.

    Args:
        on_line: gets each line of output as it comes.
        log_path: all output is appended here too.
        nodes: the machines whose ranks form one group, each with as many; None: this one alone.
        stop: ends the ranks when another thread sets it.
        keep: open files that last, with their locks, until the ranks have ended, come what may
            (if the module calls `end_with_agent`).

    Raises:
        WorkerFailed: with the exception of the rank that failed first.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        command = [sys.executable, "-m", "torch.distributed.run", *_group(nodes)]
        command += [f"--nproc-per-node={num_processes}", "--max-restarts=0", "-m", module, *args]
        agent = subprocess.Popen(
            command,
            env=_environment(error_file, num_processes, env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
            pass_fds=keep,
        )
        try:
            assert agent.stdout is not None
            with log_path.open("a") as log, _stopped_by(stop, agent):
                signalled = _stream(agent.stdout, on_line, log)
                code = agent.wait()
        finally:
            stop_tree(agent)
        if code != 0:
            raise _failure(code, error_file, log_path, signalled)


def _environment(error_file: Path, num_processes: int, extra: Mapping[str, str]) -> dict[str, str]:
    own = {
        "TORCHELASTIC_ERROR_FILE": str(error_file),
        "OMP_NUM_THREADS": _threads(num_processes),
        _LAUNCHER: str(os.getpid()),
    }
    # The launcher of a cluster may set torchrun's options by variables; ours are all given.
    found = child_environment({**own, **extra}).items()
    return {name: value for name, value in found if not name.startswith("PET_")}


def _group(nodes: Nodes | None) -> list[str]:
    """torchrun's arguments for who belongs together."""
    if nodes is None:
        return ["--standalone"]
    return [
        f"--nnodes={nodes.count}",
        f"--node-rank={nodes.rank}",
        f"--master-addr={nodes.address}",
        f"--master-port={nodes.port}",
    ]


@contextlib.contextmanager
def _stopped_by(stop: threading.Event | None, agent: subprocess.Popen[str]) -> Iterator[None]:
    """Inside, the agent and its ranks are ended once `stop` is set."""
    if stop is None:
        yield
        return

    def watch(over: threading.Event) -> None:
        while not over.is_set():
            if stop.wait(_POLL_SECONDS):
                stop_tree(agent)
                return

    with beside(watch, "stop-workers"):
        yield


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def _threads(num_processes: int) -> str:
    """Compute threads a rank, unless the user chose: the cores shared out, so none fight."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return child_environment().get("OMP_NUM_THREADS") or str(max(1, cores // num_processes))


def _stream(output: IO[str], on_line: Callable[[str], None], log: IO[str]) -> str | None:
    """Pass lines on until the end; the signal that ended a rank, if torchrun names one."""
    signalled = None
    for said in output:
        line = mask_secrets(said)
        log.write(line)
        log.flush()
        on_line(line.rstrip("\n"))
        found = _SIGNALLED.search(line)
        signalled = found[1] if found else signalled
    return signalled


def stop_tree(process: subprocess.Popen[str], grace_seconds: float = _GRACE_SECONDS) -> None:
    """End a process and all its descendants: TERM, a time of grace, then KILL."""
    descendants = _descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    for survivor in [*descendants, *_descendants(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _failure(code: int, error_file: Path, log_path: Path, signalled: str | None) -> WorkerFailed:
    """The failing rank's exception, as torchrun's error file gives it (or the exit code)."""
    if error_file.exists():
        content = json.loads(error_file.read_text())["message"]
        if isinstance(content, str):
            told = mask_secrets(content)
            return WorkerFailed(told, None, told, log_path, signalled)
        extra = content.get("extraInfo", {})
        return WorkerFailed(
            mask_secrets(content["message"]),
            extra.get("rank"),
            mask_secrets(extra.get("py_callstack", "")),
            log_path,
            signalled,
        )
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    signalled = signalled or (name if code < 0 else None)
    return WorkerFailed(f"it ended with {signalled or name}", None, "", log_path, signalled)

"""Starts ranks of the train worker by forking a process that has their libraries already.

A start of torchrun and its ranks is 10 to 20 seconds of imports; here it is a moment, so that a
test can start a dozen of them, or kill a hundred. They are processes of their own, as torchrun's
are, with the same variables. As a script this file is the process that forks: its first argument
names the modules to have, a JSON line on its input starts a rank ({"env", "entry", "job", "log"})
or waits for one ({"wait": pid}); the answer is a line with the process id, or with what
`os.waitpid` gave.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

WORKER = "regrow.tasks.train.worker"
LIBRARIES = (WORKER, "transformers.models.llama.modeling_llama")


class Forker:
    """The process that forks; it dies with this one."""

    def __init__(self, env: Mapping[str, str], also: Sequence[str] = ()) -> None:
        """`also`: modules that ranks will need beside the worker's own, where they are there."""
        self._process: Any = subprocess.Popen(
            [sys.executable, __file__, json.dumps([*LIBRARIES, *also])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(env),
        )

    def start(self, env: dict[str, str], job: Path, log: Path, module: str = WORKER) -> int:
        """Fork a rank that calls a module's `main`; its process id."""
        return self._ask({"env": env, "entry": module, "job": str(job), "log": str(log)})

    def wait(self, pid: int) -> int:
        """Wait for the end of a rank; its exit status as `os.waitpid` gives it."""
        return self._ask({"wait": pid})

    def _ask(self, question: dict[str, Any]) -> int:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Group:
    """The ranks of one attempt, ended as torchrun does: all, once one has failed."""

    def __init__(
        self,
        forker: Forker,
        ranks: int,
        env: dict[str, str],
        job: Path,
        log: Path,
        module: str = WORKER,
    ) -> None:
        self._forker, port = forker, _free_port()
        self.pids: list[int] = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            place |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            rank_env = env | {name: str(value) for name, value in place.items()}
            self.pids.append(forker.start(rank_env, job, log, module))

    def ended(self) -> list[int]:
        """Process ids of the ranks that have ended."""
        return [pid for pid in self.pids if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE]

    def finish(self, grace: float = 30.0, limit: float = 600.0) -> list[int]:
        """Wait for all; when one fails, or none ends within the limit (a collective operation that
        hangs), the others get a moment, SIGTERM, and then SIGKILL."""
        statuses: dict[int, int] = {}
        latest = time.monotonic() + limit
        while not any(statuses.values()) and len(statuses) < len(self.pids):
            if time.monotonic() > latest:
                break
            for pid in self.ended_unread(statuses):
                statuses[pid] = self._forker.wait(pid)
            time.sleep(0.01)
        left = [pid for pid in self.pids if pid not in statuses]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            end = time.monotonic() + grace
            while time.monotonic() < end and len(statuses) < len(self.pids):
                for pid in self.ended_unread(statuses):
                    statuses[pid] = self._forker.wait(pid)
                time.sleep(0.01)
            left = [pid for pid in self.pids if pid not in statuses]
        return [statuses[pid] for pid in self.pids]

    def ended_unread(self, known: Mapping[int, int]) -> list[int]:
        """Those of the ended whose status nobody has asked for."""
        unread = [pid for pid in self.pids if pid not in known]
        return [pid for pid in unread if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE]


def _free_port() -> int:
    from regrow.infra.launch import free_port

    return free_port()


def _be_a_rank(question: dict[str, Any]) -> None:
    from regrow.infra.launch import die_with_parent

    die_with_parent(signal.SIGKILL)
    os.environ.update(question["env"])
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    code = 1
    try:
        importlib.import_module(question["entry"]).main([question["job"]])
        code = 0
    except SystemExit as wish:
        code = int(wish.code or 0)
    except BaseException:  # noqa: BLE001 (what a rank ends with is in its log)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(modules: Sequence[str]) -> None:
    from regrow.infra.launch import die_with_parent

    die_with_parent(signal.SIGKILL)
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries say while they are imported is no answer
    for name in modules:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitpid(question["wait"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                _be_a_rank(question)
        os.write(answers, f"{answer}\n".encode())


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))

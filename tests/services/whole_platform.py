"""A Prefect server and an MLflow server on PostgreSQL, workers to kill, and questions to both."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.services.servers import (
    Postgres,
    ServerFailed,
    answers_http,
    free_port,
    start,
    stop,
    wait_until,
)

# What a step takes on a machine with other work is up to ten times what it takes on an idle one.
PATIENCE = 600.0
_TRIES = 4  # between choosing a free port and using it, a minute may pass on a busy machine


@dataclass(frozen=True)
class Platform:
    """The addresses of both servers."""

    prefect: str
    mlflow: str
    home: Path

    @property
    def env(self) -> dict[str, str]:
        """Variables that lead a program there."""
        return {
            "PREFECT_API_URL": f"{self.prefect}/api",
            "PREFECT_HOME": str(self.home),
            "MLFLOW_TRACKING_URI": self.mlflow,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # Asks for work every second: the ten of its default only make tests longer.
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }

    def post(self, path: str, body: Any) -> Any:
        """Ask Prefect's API."""
        request = urllib.request.Request(
            f"{self.prefect}/api/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def get(self, path: str) -> Any:
        """Ask Prefect's API."""
        with urllib.request.urlopen(f"{self.prefect}/api/{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def deployment(self, name: str, flow: str = "finetune") -> dict[str, Any]:
        """A deployment by its name."""
        return self.get(f"deployments/name/{flow}/{name}")

    def start_run(self, name: str, recipe: dict[str, Any] | None = None) -> str:
        """Start a deployment as its form does; the id of the run."""
        made = self.deployment(name)
        changed = {"recipe": made["parameters"]["recipe"] | (recipe or {})}
        path = f"deployments/{made['id']}/create_flow_run"
        return self.post(path, {"parameters": changed})["id"]

    def runs(self, name: str, flow: str = "finetune") -> list[dict[str, Any]]:
        """All runs of a deployment."""
        found = {"deployments": {"id": {"any_": [self.deployment(name, flow)["id"]]}}}
        return self.post("flow_runs/filter", found)

    def run(self, run_id: str) -> dict[str, Any]:
        """A run as it is now."""
        return self.get(f"flow_runs/{run_id}")

    def set_state(self, run_id: str, **state: Any) -> Any:
        """What a button of Prefect's page does."""
        return self.post(f"flow_runs/{run_id}/set_state", {"state": state, "force": False})

    def states(self, run_id: str) -> list[str]:
        """Names of the states that a run has been in, in order."""
        found = self.get(f"flow_run_states/?flow_run_id={run_id}")
        return [state["name"] for state in sorted(found, key=lambda state: state["timestamp"])]

    def stage_states(self, run_id: str) -> dict[str, list[str]]:
        """{stage: names of the last states of its task runs, in order}."""
        found = self.post(
            "task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}, "sort": "ID_DESC"}
        )
        stages: dict[str, list[str]] = {}
        for task in sorted(found, key=lambda task: task["created"]):
            stages.setdefault(task["name"], []).append(task["state_name"])
        return stages

    def await_state(self, run_id: str, *names: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """Wait until the run is in one of these states."""
        return eventually(lambda: self._in_state(run_id, names), lambda: self._why(run_id), seconds)

    def _in_state(self, run_id: str, names: tuple[str, ...]) -> dict[str, Any] | None:
        run = self.run(run_id)
        return run if run["state_name"] in names else None

    def _why(self, run_id: str) -> str:
        body = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"}
        lines = [log["message"] for log in self.post("logs/filter", body)[-30:]]
        return f"{self.states(run_id)}, {self.run(run_id)['state']['message']}\n" + "\n".join(lines)


def eventually(ask: Callable[[], Any], why: Callable[[], str], seconds: float) -> Any:
    """What `ask` says as soon as it says anything."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < end, why()
        time.sleep(0.2)
    return answer


@contextlib.contextmanager
def platform_on(postgres: Postgres, folder: Path) -> Iterator[Platform]:
    """Both servers, each on a database of its own; ended with the block."""
    env = {n: v for n, v in os.environ.items() if not n.startswith(("PREFECT_", "MLFLOW_"))}
    env |= {"DO_NOT_TRACK": "true", "PREFECT_HOME": str(folder)}
    env |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    env["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    database = postgres.database().replace("postgresql://", "postgresql+asyncpg://")
    env["PREFECT_API_DATABASE_CONNECTION_URL"] = database
    # Looks for what the clock wants every few seconds instead of every minute.
    env["PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS"] = "5"
    mlflow = ["mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    mlflow += ["--backend-store-uri", postgres.database()]
    mlflow += ["--artifacts-destination", str(folder / "mlartifacts")]
    servers = [
        Server("mlflow", mlflow, "/health", folder, env),
        Server("prefect", ["prefect", "server", "start"], "/api/health", folder, env),
    ]
    try:
        mlflow_url, prefect_url = [server.ready() for server in servers]
        yield Platform(prefect_url, mlflow_url, folder)
    finally:
        for server in servers:
            stop(server.process)


class Server:
    """A Python module that serves HTTP; started at once, on another port if its own is taken."""

    def __init__(
        self, name: str, command: list[str], health: str, folder: Path, env: dict[str, str]
    ) -> None:
        self._name, self._health, self._env = name, health, env
        self._command, self._log = [sys.executable, "-m", *command], folder / f"{name}.log"
        self._start()

    def _start(self) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        # Prefect's pages ask at 4200, wherever they are served, unless they are told otherwise.
        env = self._env | {"PREFECT_SERVER_UI_API_URL": f"{self._url}/api"}
        self.process = start([*self._command, "--port", str(port)], self._log, env=env)

    def ready(self) -> str:
        """Wait until it answers; its address."""
        for _ in range(_TRIES):
            wait_until(self._name, self._answers_or_ended, PATIENCE)
            if self.process.poll() is None:
                return self._url
            self._start()
        raise ServerFailed(f"{self._name} does not start:\n{self._log.read_text()[-3000:]}")

    def _answers_or_ended(self) -> bool:
        return self.process.poll() is not None or answers_http(self._url + self._health)


class Worker:
    """A Prefect worker in a directory of its own, with a home (and local cache) of its own."""

    def __init__(self, folder: Path, env: dict[str, str], pool: str) -> None:
        folder.mkdir()
        self.home, self.log = folder / "home", folder / "worker.log"
        self._env = env | {"REGROW_HOME": str(self.home)}
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
        # Started in `folder`, the directory of its log.
        self.process: subprocess.Popen[bytes] = start(command, self.log, env=self._env)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def said(self) -> str:
        """All it and its runs have said so far."""
        return self.log.read_text(errors="replace")

    def await_line(self, text: str, after: int = 0, seconds: float = PATIENCE) -> int:
        """Wait until a line with `text` is said, after so many characters; where it ends."""

        def found() -> int | None:
            place = self.said().find(text, after)
            return place + len(text) if place >= 0 else None

        return eventually(found, lambda: f"never said {text!r}:\n{self.said()[-5000:]}", seconds)

    def flows(self) -> list[psutil.Process]:
        """The processes of the runs that it started."""
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        """`kill -9` of the worker and all that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            kill_all([parent, *parent.children(recursive=True)])
        self.process.wait(30)

    def survivors(self) -> list[str]:
        """Command lines of living processes that work in its home."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("REGROW_HOME") == str(self.home)
                if mine and process.pid != self.process.pid:
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def kill_all(processes: list[psutil.Process]) -> None:
    """`kill -9`, the first first, so that no parent sees its child die."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)

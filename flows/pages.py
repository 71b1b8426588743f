"""`regrow ui`: the MLflow and Prefect pages on loopback, from one command, ended together."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request

from regrow.flows.progress import say
from regrow.flows.workplace import Workplace
from regrow.infra.launch import die_with_parent, stop_tree
from regrow.infra.settings import child_environment, load_settings, quiet_environment

_HOST = "127.0.0.1"
# MLflow opens in its GenAI mode unless told what the work is about.
_QUERIES = {"MLflow": "/?workflowType=machine_learning", "Prefect": ""}
_READY_SECONDS = 120  # MLflow on a new database took 16 s, Prefect 13 s (platform.md, parts B, C)


def serve_pages(mlflow_port: int, prefect_port: int) -> int:
    """Serve both until interrupted; the exit code."""
    quiet_environment()
    settings = load_settings()
    workplace = Workplace(settings)
    settings.home.mkdir(parents=True, exist_ok=True)
    servers: list[tuple[str, str, subprocess.Popen[str]]] = []
    try:
        if settings.tracking_uri is None:
            command = ["-m", "mlflow", "server", "--host", _HOST, "--port", str(mlflow_port)]
            command += ["--backend-store-uri", workplace.tracking_uri, "--workers", "1"]
            command += ["--default-artifact-root", (settings.home / "mlartifacts").as_uri()]
            servers.append(_start("MLflow", f"http://{_HOST}:{mlflow_port}", command))
        if settings.prefect_api_url is None:
            command = ["-m", "prefect", "server", "start", "--host", _HOST]
            command += ["--port", str(prefect_port)]
            url = f"http://{_HOST}:{prefect_port}"
            # Its pages would ask at Prefect's usual port, whichever they are served on.
            servers.append(_start("Prefect", url, command, PREFECT_SERVER_UI_API_URL=f"{url}/api"))
        for name, url, process in servers:
            _wait(name, url, process)
        for name, remote in (
            ("MLflow", settings.tracking_uri),
            ("Prefect", settings.prefect_api_url),
        ):
            if remote is not None:
                say(f"{name:8} {remote} (a server you named; not started here)")
        say(f"Runs started with PREFECT_API_URL=http://{_HOST}:{prefect_port}/api show there too.")
        say("Ctrl-C ends both.")
        while all(process.poll() is None for _, _, process in servers) and servers:
            time.sleep(0.5)
    except KeyboardInterrupt:
        return 0
    finally:
        for _, _, process in servers:
            stop_tree(process, grace_seconds=10)
    return 1 if servers else 0


def _start(
    name: str, url: str, command: list[str], **settings: str
) -> tuple[str, str, subprocess.Popen[str]]:
    # MLflow's job runner would add eight processes and 700 MB that nothing here uses (platform.md).
    environment = child_environment({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **settings})
    log = (load_settings().home / f"{name.lower()}-server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
        start_new_session=True,
    )
    return name, url, process


def _wait(name: str, url: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + _READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
        else:
            say(f"{name:8} {url}{_QUERIES[name]}")
            return
    log = load_settings().home / f"{name.lower()}-server.log"
    say(
        f"{name} did not start; its log is {log} (is port {url.rsplit(':', 1)[1]} taken?)",
        sys.stderr,
    )

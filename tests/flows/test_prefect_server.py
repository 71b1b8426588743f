"""A run's own Prefect server: its address is known at once, and a failure names its log."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from regrow.flows import pages, prefect_server, run_command
from regrow.flows.prefect_server import PrivateServer, ServerFailed, _end
from regrow.infra.settings import load_settings

# Answers on the socket that it is handed, as uvicorn does, once it has read a line of `gate`.
_ANSWERS = """
import http.server, os, socket, sys
open(os.environ["GATE"]).readline()
class Server(http.server.HTTPServer):
    address_family = socket.AF_UNIX
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def address_string(self):
        return ""
given = int(sys.argv[sys.argv.index("--fd") + 1])
server = Server("", Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=given)
server.serve_forever()
"""


@pytest.fixture
def gate(tmp_path: Path, monkeypatch) -> Path:
    """A server waits until something is written into this pipe. The environment is put back."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    monkeypatch.setenv("GATE", str(path))
    for name in ("PREFECT_API_URL", "REGROW_PRIVATE_PREFECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return path


def test_a_machine_without_sockets_is_not_told_as_a_bad_home(tmp_path, monkeypatch):
    def no_socket(_home, _prefect_home):
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(run_command, "PrivateServer", no_socket)
    with pytest.raises(OSError, match="Cannot assign"):
        run_command._server(replace(load_settings(), home=tmp_path, prefect_api_url=None))


def test_address_is_known_before_the_server_is_there(gate, tmp_path, monkeypatch):
    """Prefect reads it when it is imported, which happens while the server comes up."""
    monkeypatch.setattr(prefect_server, "_PROGRAM", _ANSWERS)
    server = PrivateServer(tmp_path, tmp_path)
    server.start()
    process = server._process
    assert process is not None
    pipe = os.open(gate, os.O_RDWR)  # so that opening does not wait for the server's end
    try:
        url = os.environ["PREFECT_API_URL"]
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"{url}/health", timeout=0.2)  # it waits, and is not refused
        os.write(pipe, b"\n")
        server.wait()
        urllib.request.urlopen(f"{url}/health", timeout=60).close()
        assert os.environ["PREFECT_API_URL"] == url
    finally:
        _end(process)
        os.close(pipe)


def test_server_that_ends_is_told_with_its_log(gate, tmp_path, monkeypatch):
    monkeypatch.setattr(prefect_server, "_PROGRAM", "raise SystemExit('no disk')")
    server = PrivateServer(tmp_path, tmp_path)
    server.start()
    with pytest.raises(ServerFailed, match=r"its log is .*prefect-server\.log"):
        server.wait()
    assert "no disk" in (tmp_path / "prefect-server.log").read_text()


def test_two_that_start_at_once_do_not_make_one_database_together(gate, tmp_path, monkeypatch):
    monkeypatch.setattr(prefect_server, "_PROGRAM", "raise SystemExit(1)")
    # Of two projects too, whose runs share a database of Prefect's.
    first = PrivateServer(tmp_path / "one", tmp_path / "prefect")
    second = PrivateServer(tmp_path / "two", tmp_path / "prefect")
    first.start()
    second.start()
    assert first._process is not None
    assert second._process is None
    assert first._url != second._url


def test_who_waits_for_another_runs_server_is_told_and_not_for_ever(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prefect_server, "_WORD_SECONDS", 0.02)
    monkeypatch.setattr(prefect_server, "_TURN_SECONDS", 0.2)
    first, second = (PrivateServer(tmp_path / name, tmp_path) for name in ("one", "two"))
    assert first._is_our_turn()
    with pytest.raises(ServerFailed, match=r"has been starting, or ending, .*regrow-server\.lock"):
        second.wait()
    assert capsys.readouterr().out.count("waiting for another run") == 1


def test_prefects_pages_ask_where_they_are_served(monkeypatch, tmp_path):
    """Unless told, they ask at port 4200, and say that no server is there."""
    started: list[dict[str, str]] = []

    def start(name: str, url: str, command: list[str], **settings: str):
        started.append({"name": name, **settings})
        raise KeyboardInterrupt

    monkeypatch.setattr(pages, "_start", start)
    monkeypatch.setenv("REGROW_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.com")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert pages.serve_pages(5001, 4300) == 0
    (prefect,) = started
    assert prefect["PREFECT_SERVER_UI_API_URL"] == "http://127.0.0.1:4300/api"


def test_run_imports_neither_torch_nor_matplotlib_before_a_stage_needs_them():
    """Of a run that finds all its stages done, what is imported is most of its time."""
    asked = "import sys, regrow.flows.finetune; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_server_of_a_run_begins_before_the_stages_machinery_is_imported():
    """A run is ready when its server is."""
    late = "{'fsspec', 'prefect', 'mlflow', 'regrow.tasks.plan', 'regrow.tasks.build'}"
    asked = f"import sys, regrow.flows.run_command; print({late} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_server_of_one_run_leaves_block_types_to_one_that_stays():
    """Without a note that they are there: else `regrow ui` would leave them out too."""
    asked = """
from regrow.infra.settings import quiet_environment
quiet_environment(private_server=True)
from prefect.settings import get_current_settings
server = get_current_settings().server
print(server.register_blocks_on_start, server.memoize_block_auto_registration)
"""
    env = {name: value for name, value in os.environ.items() if "BLOCK" not in name}
    done = subprocess.run(
        [sys.executable, "-c", asked], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False False"


def test_a_server_whose_run_was_killed_keeps_others_from_its_database(gate, tmp_path, monkeypatch):
    """Until it has ended: it may be at making it."""
    monkeypatch.setattr(prefect_server, "_PROGRAM", "open(__import__('os').environ['GATE']).read()")
    killed = PrivateServer(tmp_path, tmp_path)
    killed.start()
    process = killed._process
    assert process is not None
    killed._lock.close()  # as the kernel does
    second = PrivateServer(tmp_path, tmp_path)
    second.start()
    assert second._process is None
    _end(process)
    third = PrivateServer(tmp_path, tmp_path)
    third.start()
    assert third._process is not None
    _end(third._process)

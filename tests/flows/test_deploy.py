"""`regrow deploy` needs a Prefect server that stays; with one see tests/services."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from regrow.configs.load import Loaded, load_recipe
from regrow.flows.deploy import Wish, _given, deploy
from regrow.flows.job_variables import Resources
from regrow.infra.settings import load_settings
from regrow.tasks.stage import StageError
from tests.flows.conftest import Place


def test_without_a_server_that_stays_it_says_so(place: Place):
    done = place.regrow("deploy", str(place.recipe))
    assert done.returncode == 1
    assert "PREFECT_API_URL" in done.stdout


def test_a_worker_finds_the_places_of_who_deployed(place: Place, monkeypatch):
    """It stands in a directory of its own, which ends with the run."""
    monkeypatch.chdir(place.root)
    place.write_recipe(output_dir="./out", store="s3://bucket/store")
    loaded: Loaded = load_recipe(place.recipe)
    given = _given(loaded)
    assert given["output_dir"] == str(Path(place.root / "out").absolute())
    assert given["store"] == "s3://bucket/store"


class _Refusing(BaseHTTPRequestHandler):
    code = 401

    def _answer(self) -> None:
        body = b'{"detail": "Unauthorized"}'
        self.send_response(self.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_PUT = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def refusing():
    """The address of a server that refuses all."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()
    thread.join()


def deploy_at(url: str, place: Place, **wish) -> list[str]:
    with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
        return deploy(load_recipe(place.recipe), load_settings(), Wish(**wish))


def test_server_that_refuses_is_one_clear_message(place: Place, refusing: str):
    with pytest.raises(StageError, match="401; check PREFECT_API_AUTH_STRING"):
        deploy_at(refusing, place)


def test_server_that_is_away_is_one_clear_message(place: Place):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/api"
        with pytest.raises(StageError, match="PREFECT_API_URL: the Prefect server"):
            deploy_at(url, place)


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({"gpus": -1}, "--gpus -1"),
        ({"gpus": 1}, "--gpus 1: one run of this recipe uses 2"),
        ({"resources": Resources(gpus=-2)}, "--gpus-per-run -2"),
        ({"on_change": "s3://b/x", "every": 0}, "--every 0"),
        ({"on_change": "/data/x", "pool_type": "kubernetes"}, "a pod does not see"),
    ],
)
def test_wish_that_cannot_come_true_is_refused_before_anything_is_made(place, wish, told):
    place.write_recipe(num_processes=2)
    with pytest.raises(StageError, match=told):
        deploy_at("http://127.0.0.1:9/api", place, **wish)

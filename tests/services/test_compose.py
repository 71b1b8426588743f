"""What compose.yaml starts is healthy, locked, and runs a pipeline that tells nobody a secret."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.infra.test_deploy_files import SECRETS
from tests.services.composed import BUCKET, Composed
from tests.services.servers import Postgres, S3Server, program
from tests.services.whole_platform import PATIENCE

# Three minutes of processor time: more than CI has.
pytestmark = [pytest.mark.services, pytest.mark.extended]


@pytest.fixture(scope="module")
def composed(
    postgres_server: Postgres, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Composed]:
    made = Composed(tmp_path_factory.mktemp("composed"), postgres_server, s3_server)
    made.prepare()
    bucket = made.run("bucket")
    assert bucket.stdout == f"made bucket {BUCKET}\n"
    with made.up("prefect", "mlflow"):
        yield made


def ask(
    url: str, login: str | None = None, body: Any = None, host: str | None = None
) -> tuple[int, Any]:
    """(status, answer) of a request, with user:password or without."""
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None)
    request.add_header("Content-Type", "application/json")
    if login is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    if host is not None:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] in b"{[" and text else text
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_both_pages_ask_for_a_password(composed):
    secrets = composed.variables
    prefect = f"http://127.0.0.1:{composed.prefect}/api/admin/version"
    mlflow = f"http://127.0.0.1:{composed.mlflow}/api/2.0/mlflow/experiments/search?max_results=5"
    for url, login in (
        (prefect, secrets["PREFECT_AUTH_STRING"]),
        (mlflow, f"admin:{secrets['MLFLOW_ADMIN_PASSWORD']}"),
    ):
        assert ask(url)[0] == 401
        assert ask(url, "admin:wrong")[0] == 401
        assert ask(url, login)[0] == 200
    assert ask(f"http://127.0.0.1:{composed.mlflow}/")[0] == 401, "the page itself"


def test_mlflow_answers_to_its_names_alone(composed):
    """A page of somebody else's that has its name lead here gets nothing."""
    url = f"http://127.0.0.1:{composed.mlflow}/api/2.0/mlflow/experiments/search?max_results=5"
    login = f"admin:{composed.variables['MLFLOW_ADMIN_PASSWORD']}"
    assert ask(url, login, host=f"mlflow:{composed.mlflow}")[0] == 200
    assert ask(url, login, host="evil.example.com")[0] == 403


def test_the_bucket_is_made_once(composed):
    assert composed.run("bucket").stdout == f"bucket {BUCKET} is there\n"


@pytest.fixture(scope="module")
def told(composed, tiny_llama_dir) -> str:
    """All that was said while a recipe was deployed and run by the worker."""
    from tests.flows.conftest import Place, rows, small_recipe

    work = composed.folder / "work"
    work.mkdir()
    place = Place(work, work / "tiny.yaml", composed.env("worker"))
    place.recipe.write_text(json.dumps(small_recipe(tiny_llama_dir, work / "outputs")))
    place.write_rows("rows.jsonl", rows(40))
    deployed = composed.run("worker", "regrow", "deploy", str(place.recipe))
    assert deployed.returncode == 0, deployed.stdout
    login = composed.variables["PREFECT_AUTH_STRING"]
    api = f"http://127.0.0.1:{composed.prefect}/api"
    with composed.up("worker"):
        status, made = ask(f"{api}/deployments/name/finetune/tiny", login)
        assert status == 200, made
        run = ask(f"{api}/deployments/{made['id']}/create_flow_run", login, {})[1]
        end = time.monotonic() + PATIENCE
        while (now := ask(f"{api}/flow_runs/{run['id']}", login)[1])["state_type"] not in (
            "COMPLETED",
            "FAILED",
            "CRASHED",
        ):
            assert time.monotonic() < end, now["state"]
            time.sleep(0.5)
    said = (composed.folder / "worker.log").read_text(errors="replace")
    assert now["state_type"] == "COMPLETED", f"{now['state']['message']}\n{said[-5000:]}"
    return deployed.stdout + said


def test_the_worker_of_the_file_runs_a_deployment_on_the_locked_servers(composed, told):
    assert "[train]" in told
    login = f"admin:{composed.variables['MLFLOW_ADMIN_PASSWORD']}"
    api = f"http://127.0.0.1:{composed.mlflow}/api/2.0/mlflow"
    names = ask(f"{api}/experiments/search?max_results=10", login)[1]["experiments"]
    ids = [experiment["experiment_id"] for experiment in names]
    runs = ask(f"{api}/runs/search", login, {"experiment_ids": ids, "max_results": 100})[1]["runs"]
    assert {"FINISHED"} == {run["info"]["status"] for run in runs}
    assert len(runs) > 6


def test_no_secret_is_found_anywhere_afterwards(composed, told, tmp_path):
    places = {"terminal": told.encode()}
    for name in ("prefect", "mlflow", "mlflow_auth"):
        place = ["-h", "127.0.0.1", "-p", str(composed.postgres.port)]
        dump = subprocess.run(
            [program("pg_dump"), *place, "-U", composed.postgres.user, name],
            env={**os.environ, "PGPASSWORD": composed.postgres.password},
            capture_output=True,
            check=True,
            timeout=PATIENCE,
        )
        places[f"database {name}"] = dump.stdout
    client = composed.s3.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for item in page["Contents"]:
            body = client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()
            places[f"s3 {item['Key']}"] = body
    for path in Path(composed.folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            places[str(path)] = path.read_bytes()
    assert any(b"learning_rate" in body for n, body in places.items() if n.startswith("database"))
    assert any("record.json" in name for name in places)
    planted = planted_in(composed)
    found = [
        (name, place)
        for name, secret in planted.items()
        for place, body in places.items()
        if secret.encode() in body
    ]
    assert not found


def planted_in(composed: Composed) -> dict[str, str]:
    """The secrets, and the forms in which they travel."""
    names = [*SECRETS, "HF_TOKEN"]
    secrets = {name: composed.variables[name] for name in names}
    secrets["prefect, without the user"] = secrets["PREFECT_AUTH_STRING"].partition(":")[2]
    login = f"admin:{secrets['MLFLOW_ADMIN_PASSWORD']}"
    for name, text in (("prefect", secrets["PREFECT_AUTH_STRING"]), ("mlflow", login)):
        secrets[f"{name}, as a header"] = base64.b64encode(text.encode()).decode()
    return secrets

"""Without any network but loopback nothing hangs, a pipeline runs, and no secret is left behind."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import time

import pytest

from tests.flows.conftest import SCRIPT, Place, kill_tree

pytestmark = pytest.mark.services

# Loopback is down in a new network namespace; this needs no program but Python.
_LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket() as s:
    SIOCSIFFLAGS, IFF_UP = 0x8914, 1
    fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
os.execv(sys.argv[1], sys.argv[1:])
"""
_ALONE = ["unshare", "--map-root-user", "--net", sys.executable, "-c", _LOOPBACK_UP]
# A tiny pipeline takes 30 s where nothing else runs, and tests run where much does; what this is
# about are time-outs of libraries, of which the hub's takes 51 s for each file it asks for.
_PATIENCE = 500.0
PLANTED = {
    "HF_TOKEN": "hf_PlAnTeDpLaNtEdPlAnTeD",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access/key",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
    "PREFECT_API_AUTH_STRING": "admin:planted-prefect-password",
}


def alone(place: Place, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command without network, as if it were a user's first: nothing says that there is none."""
    env = {k: v for k, v in place.env.items() if not k.startswith(("HF_HUB", "DO_NOT_TRACK"))}
    process = subprocess.Popen(
        [*(_ALONE if may_be_alone() else []), str(SCRIPT), *words],
        cwd=place.root,
        env=env | {"HF_HOME": str(place.root / "hf")} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
    return subprocess.CompletedProcess(words, process.returncode, output)


@functools.cache
def may_be_alone() -> bool:
    """Whether a network namespace may be made here."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([*_ALONE, "/bin/true"]).returncode == 0


needs_a_namespace = pytest.mark.skipif(
    not may_be_alone(), reason="no network namespace may be made here"
)


def test_a_pipeline_runs_without_network_and_leaves_no_secret(place):
    done = alone(place, "run", str(place.recipe), **PLANTED)
    assert done.returncode == 0, done.stdout
    places = {"terminal": done.stdout.encode()}
    places |= {str(p): p.read_bytes() for p in place.root.rglob("*") if p.is_file()}
    assert any(name.endswith("mlflow.db") for name in places)
    assert any(name.endswith("prefect.db") for name in places)
    secrets = [*PLANTED.values(), "planted-prefect-password"]
    assert not [(s, n) for s in secrets for n, body in places.items() if s.encode() in body]


@needs_a_namespace
def test_a_model_of_the_hub_is_missed_soon_and_clearly(place):
    place.write_recipe(base_model="nobody/never-made")
    begin = time.monotonic()
    done = alone(place, "plan", str(place.recipe))
    assert done.returncode == 1, done.stdout
    assert "nobody/never-made" in done.stdout
    assert "HF_HUB_OFFLINE" in done.stdout
    assert time.monotonic() - begin < 60


@needs_a_namespace
def test_a_server_out_of_reach_is_told_soon(place):
    begin = time.monotonic()
    address = "http://prefect.example.com:4200/api"
    done = alone(place, "run", str(place.recipe), PREFECT_API_URL=address)
    assert done.returncode == 1, done.stdout
    assert f"PREFECT_API_URL: nothing answers at {address}" in done.stdout
    assert time.monotonic() - begin < 60

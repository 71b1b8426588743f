"""Telemetry is off unless asked for, servers hear loopback alone, passwords leave addresses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from regrow.infra.settings import SettingError, load_settings, quiet_environment, split_credentials

ROOT = Path(__file__).parents[2]
# Says of each library whether it would tell its makers anything.
_ASK = """
import json
from regrow.infra.settings import quiet_environment
quiet_environment()
from huggingface_hub import constants
from mlflow.telemetry.utils import is_telemetry_disabled
from prefect._internal.analytics.enabled import is_telemetry_enabled
from prefect.settings import get_current_settings
print(json.dumps({
    "hub": not constants.HF_HUB_DISABLE_TELEMETRY,
    "mlflow": not is_telemetry_disabled(),
    "prefect": is_telemetry_enabled(),
    "prefect server": get_current_settings().server.analytics_enabled,
}))
"""
_ASK_HUB = """
from regrow.infra.settings import quiet_environment
quiet_environment()
from huggingface_hub import constants
print(not constants.HF_HUB_DISABLE_TELEMETRY)
"""
_SPEAKS_OF_TELEMETRY = re.compile(r"TRACK|TELEMETRY|ANALYTICS|USAGE_STATS|DOWNLOAD_COUNTS|^CI$")


def say(code: str, **variables: str) -> str:
    """What a new process prints, in whose environment nothing is said about telemetry."""
    env = {k: v for k, v in os.environ.items() if not _SPEAKS_OF_TELEMETRY.search(k)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_nobody_is_told_anything_unless_asked():
    told = json.loads(say(_ASK))
    assert told == dict.fromkeys(told, False)


def test_who_asks_for_telemetry_gets_it():
    assert say(_ASK_HUB, HF_HUB_DISABLE_TELEMETRY="0", DO_NOT_TRACK="0") == "True"


def test_the_images_say_the_same():
    for name in ("Dockerfile.cpu", "Dockerfile.cuda"):
        text = (ROOT / "infra/deploy" / name).read_text()
        for said in (
            "DO_NOT_TRACK=true",
            "PREFECT_SERVER_ANALYTICS_ENABLED=false",
            "MLFLOW_DISABLE_TELEMETRY=true",
            "HF_HUB_DISABLE_TELEMETRY=1",
        ):
            assert said in text, f"{name} lacks {said}"


def test_our_servers_hear_loopback_alone():
    for name in ("flows/pages.py", "flows/prefect_server.py"):
        text = (ROOT / name).read_text()
        assert '_HOST = "127.0.0.1"' in text
        assert "0.0.0.0" not in text


@pytest.fixture
def bare(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "REGROW_STORE", "PGPASSWORD"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def load_all():
    quiet_environment()
    return load_settings()


def test_passwords_leave_the_addresses_of_servers(bare):
    bare.setenv("MLFLOW_TRACKING_URI", "http://me:p%40ss@host:5000/x")
    bare.setenv("PREFECT_API_URL", "https://me:sesame@prefect/api")
    quiet_environment()
    settings = load_settings()
    assert settings.tracking_uri == "http://host:5000/x"
    assert settings.prefect_api_url == "https://prefect/api"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p@ss"
    assert os.environ["PREFECT_API_AUTH_STRING"] == "me:sesame"


def test_what_is_said_apart_wins_over_the_address(bare):
    bare.setenv("MLFLOW_TRACKING_URI", "http://me:old@host")
    bare.setenv("MLFLOW_TRACKING_PASSWORD", "new")
    quiet_environment()
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "new"


def test_a_database_gets_its_password_from_the_variable_of_postgresql(bare):
    bare.setenv("MLFLOW_TRACKING_URI", "postgresql://me:sesame@host/mlflow")
    quiet_environment()
    assert load_settings().tracking_uri == "postgresql://me@host/mlflow"
    assert os.environ["PGPASSWORD"] == "sesame"


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("REGROW_STORE", "s3://key:sesame@bucket"),
        ("MLFLOW_TRACKING_URI", "mysql://me:sesame@host/mlflow"),
    ],
)
def test_other_addresses_with_a_password_are_refused(bare, name, address):
    bare.setenv(name, address)
    with pytest.raises(SettingError, match=name) as error:
        load_all()
    assert "sesame" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://bucket/x", "sftp://me@host/x", "/a/b@c", "http://host:80"])
def test_an_address_without_password_stays(url):
    assert split_credentials(url) == (url, None)

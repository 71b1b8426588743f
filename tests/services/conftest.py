"""Real servers, started once per session; each test gets a database or a bucket of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.flows.conftest import place as place  # a fixture: a tiny pipeline
from tests.services.servers import (
    Bucket,
    Postgres,
    S3Server,
    ServerMissing,
    SshServer,
    mock_s3,
    postgres,
    radosgw,
    sshd,
)
from tests.services.whole_platform import Platform, platform_on


def _missing(error: ServerMissing) -> None:
    if os.environ.get("CI"):
        pytest.fail(str(error))
    pytest.skip(str(error))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL; `.database()` gives the URL of a new database."""
    try:
        with postgres() as server:
            yield server
    except ServerMissing as error:
        _missing(error)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Ceph's S3 gateway; `.bucket()` gives a new bucket, whose `.env` leads a program there."""
    try:
        with radosgw() as server:
            yield server
    except ServerMissing as error:
        _missing(error)


@pytest.fixture(scope="session")
def ssh_server() -> Iterator[SshServer]:
    """OpenSSH's server; `.url(folder)` is a folder of this machine through it."""
    try:
        with sshd() as server:
            yield server
    except ServerMissing as error:
        _missing(error)


@pytest.fixture(scope="session")
def platform(
    postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """A Prefect server and an MLflow server on PostgreSQL."""
    with platform_on(postgres_server, tmp_path_factory.mktemp("platform")) as servers:
        yield servers


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> str:
    """The URL of a new, empty PostgreSQL database."""
    return postgres_server.database()


@pytest.fixture(scope="session")
def mock_s3_server() -> Iterator[S3Server]:
    """An imitation of S3 in this process, for tests that need no real one."""
    with mock_s3() as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new, empty bucket; this process's environment leads there too, but for REGROW_STORE."""
    return _lead_to(s3_server.bucket(), monkeypatch)


@pytest.fixture
def mock_bucket(mock_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The same on the imitation."""
    return _lead_to(mock_s3_server.bucket(), monkeypatch)


def _lead_to(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in bucket.env.items():
        if name != "REGROW_STORE":
            monkeypatch.setenv(name, value)
    return bucket

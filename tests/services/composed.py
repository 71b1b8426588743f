"""The services of compose.yaml without Docker: their commands, environment and health checks."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.infra.test_deploy_files import DEPLOY, SECRETS, compose
from tests.services.servers import Postgres, S3Server, free_port, program, start, stop, wait_until
from tests.services.whole_platform import PATIENCE

BIN = Path(sys.executable).parent
BUCKET = "composed"


@dataclass(frozen=True)
class Composed:
    """Where the names of compose.yaml lead on this machine."""

    folder: Path
    postgres: Postgres
    s3: S3Server
    prefect: int = field(default_factory=free_port)
    mlflow: int = field(default_factory=free_port)
    worker: int = field(default_factory=free_port)
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    """Part of each secret that is planted, so that what is found is of this run."""

    @property
    def variables(self) -> dict[str, str]:
        """What `.env` would say."""
        planted = {name: f"{value}-{self.token}" for name, value in SECRETS.items()}
        return planted | {
            "POSTGRES_PASSWORD": self.postgres.password,
            "S3_ACCESS_KEY": self.s3.access_key,
            "S3_SECRET_KEY": self.s3.secret_key,
            "S3_BUCKET": BUCKET,
            "HF_TOKEN": f"hf_{self.token}",
            "HF_HUB_OFFLINE": "1",
        }

    def here(self, text: str) -> str:
        """`text` of the file, its addresses those of this machine."""
        text = re.sub(r"\bpostgres:5432\b", f"127.0.0.1:{self.postgres.port}", text)
        text = text.replace("http://s3:9000", self.s3.endpoint)
        text = re.sub(r"http://(prefect|mlflow):", "http://127.0.0.1:", text)
        for there, port in (("4200", self.prefect), ("5000", self.mlflow), ("8080", self.worker)):
            text = re.sub(rf"\b{there}\b", str(port), text)
        text = text.replace("0.0.0.0", "127.0.0.1").replace("/opt/regrow/infra/deploy", str(DEPLOY))
        text = text.replace(f"{DEPLOY}/mlflow/basic_auth.ini", f"{self.folder}/basic_auth.ini")
        return text.replace("/var/lib/regrow", str(self.folder / "home"))

    def prepare(self) -> None:
        """Make the databases, and the one file with an address in it for the address of here."""
        place = ["-h", "127.0.0.1", "-p", str(self.postgres.port), "-U", self.postgres.user]
        script = [
            "-d",
            "postgres",
            "-v",
            "ON_ERROR_STOP=1",
            "-f",
            DEPLOY / "postgres/databases.sql",
        ]
        env = {**os.environ, "PGPASSWORD": self.postgres.password}
        subprocess.run([program("psql"), *place, *script], env=env, check=True, timeout=PATIENCE)
        users = (DEPLOY / "mlflow/basic_auth.ini").read_text()
        (self.folder / "basic_auth.ini").write_text(self.here(users))

    def service(self, name: str) -> dict[str, Any]:
        """A service as the file has it."""
        return compose(variables=self.variables)["services"][name]

    def env(self, name: str) -> dict[str, str]:
        """A service's environment: nothing of this process's but the way to the programs."""
        given = self.service(name)["environment"].items()
        ours = {key: self.here(str(value)) for key, value in given}
        # The image says these, see Dockerfile.cpu.
        image = {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
        return {
            "PATH": f"{BIN}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_WEBSERVER_PORT": str(self.worker),
            "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            **image,
            **ours,
        }

    def command(self, words: list[str]) -> list[str]:
        """Words of the file as a command here."""
        found = [self.here(word) for word in words]
        return [str(BIN / found[0]), *found[1:]]

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`docker compose run NAME WORDS`; without words the service's own command."""
        command = self.command(list(words) or self.service(name)["command"])
        return subprocess.run(
            command,
            env=self.env(name),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )

    def healthy(self, name: str) -> bool:
        """What the service's health check says, run as it is written."""
        mark, *words = self.service(name)["healthcheck"]["test"]
        assert mark == "CMD"
        return self.run(name, *words).returncode == 0

    @contextlib.contextmanager
    def up(self, *names: str) -> Iterator[None]:
        """`docker compose up --wait NAMES`, and down again."""
        with contextlib.ExitStack() as ending:
            for name in names:
                log = self.folder / f"{name}.log"
                command = self.command(self.service(name)["command"])
                ending.callback(stop, start(command, log, env=self.env(name)))
            for name in names:
                wait_until(f"{name}, see {self.folder}", lambda n=name: self.healthy(n), PATIENCE)
            yield

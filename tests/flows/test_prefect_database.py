"""The database that a home's first run makes for Prefect is the one that Prefect would make."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

# Ours, and then Prefect's own on one processor, where its threads hand over fastest.
_BOTH = """
import asyncio, os, sys
from regrow.flows.server_process import _database_maker
assert os.waitpid(_database_maker(), 0)[1] == 0
assert _database_maker() is None  # it is there now
from prefect.server.database import provide_database_interface
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import temporary_database_config
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
theirs = AioSqliteConfiguration("sqlite+aiosqlite:///" + sys.argv[1])
with temporary_database_config(theirs):
    asyncio.run(provide_database_interface().create_db())
"""


def content(database: Path) -> dict[Any, Any]:
    """Each table's and index's definition, and the rows of each table."""
    with closing(sqlite3.connect(database)) as file:
        parts = file.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        # Alembic keeps the constraints of a table that it copies in a set.
        found: dict[Any, Any] = {
            (kind, name): sorted(line.strip(" ,") for line in (sql or "").splitlines())
            for kind, name, sql in parts
        }
        for kind, name, _ in parts:
            if kind == "table":
                found[name] = file.execute(f'SELECT * FROM "{name}"').fetchall()
    return found


@pytest.mark.slow
def test_ours_has_all_that_prefects_own_has(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs.db"
    ours.mkdir()
    names = [name for name in os.environ if name.startswith("PREFECT_")]
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", _BOTH, str(theirs)],
        env=env | {"PREFECT_HOME": str(ours)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    assert len(content(theirs)) > 200
    assert content(ours / "prefect.db") == content(theirs)
    assert not (ours / "prefect.db.new").exists()


def test_a_server_whose_database_cannot_be_made_beside_it_makes_it_itself(tmp_path):
    """What made it tells why, and leaves nothing under the database's name."""
    program = """
import os
from regrow.flows import prefect_database, server_process
def broken(url, prefect):
    open(url.removeprefix("sqlite:///"), "w").write("half")
    raise RuntimeError("a migration of another kind")
prefect_database.migrate = broken
assert os.waitpid(server_process._database_maker(), 0)[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: a migration of another kind" in done.stderr
    assert not (tmp_path / "prefect.db").exists()

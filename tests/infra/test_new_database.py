"""A new database: whole or not there, made without waiting for the disk, never over another's."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from regrow.infra.new_database import make_whole


def made(url: str) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
        file.execute("CREATE TABLE ours (x)")


def tables(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as file:
        return [name for (name,) in file.execute("SELECT name FROM sqlite_master")]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "some.db"


def test_one_that_another_program_made_meanwhile_stays(database):
    def slowly(url: str) -> None:
        made(url)
        database.write_text("theirs")

    make_whole(database, slowly)
    assert database.read_text() == "theirs"
    assert os.listdir(database.parent) == ["some.db"]


def test_it_gets_its_name_where_there_are_no_hard_links(database, monkeypatch):
    def refused(_path: Path, _target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    make_whole(database, made)
    assert tables(database) == ["ours"]
    assert os.listdir(database.parent) == ["some.db"]


def test_one_that_cannot_be_made_has_no_name(database):
    def half(url: str) -> None:
        made(url)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_whole(database, half)
    assert not database.exists()
    make_whole(database, made)
    assert tables(database) == ["ours"]


def test_only_while_it_is_made_the_disk_is_not_waited_for(database):
    def synchronous(url: str) -> int:
        with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS ours (x)")
            return connection.exec_driver_sql("PRAGMA synchronous").scalar_one()

    levels: list[int] = []
    make_whole(database, lambda url: levels.append(synchronous(url)))
    levels.append(synchronous(f"sqlite:///{database}"))
    assert levels == [0, 2]  # OFF and FULL, https://sqlite.org/pragma.html#pragma_synchronous

"""A new SQLite database that is there whole or not at all, whoever is killed while making it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection
from typing import Any


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time: two that migrate the same new database fail each other."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_whole(database: Path, make: Callable[[str], object]) -> None:
    """Have a database made, which gets its name when it is whole: migrations that were killed on
    the way cannot be gone on with.

    Args:
        make: gets the URL of a file that is not there yet.
    """
    made = database.with_name(database.name + ".new")
    for name in (made.name, f"{made.name}-journal"):
        made.with_name(name).unlink(missing_ok=True)
    with _unsynced():
        make(f"sqlite:///{made}")
    with made.open("rb") as file:
        os.fsync(file.fileno())  # else its name could be on the disk before it is
    _name(made, database)


def _name(made: Path, database: Path) -> None:
    """Unlike a rename, this leaves a database as it is that some other program made meanwhile."""
    try:
        database.hardlink_to(made)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        made.rename(database)
        return
    made.unlink()


@contextmanager
def _unsynced() -> Iterator[None]:
    """Inside, SQLAlchemy's connections to SQLite do not wait for the disk at each statement.

    That can be seconds where others write too; after a power failure, what has no name is thrown
    away.
    """
    from sqlalchemy import Engine, event

    event.listen(Engine, "connect", _unsync)
    try:
        yield
    finally:
        event.remove(Engine, "connect", _unsync)


def _unsync(connection: Any, _record: Any) -> None:
    if isinstance(connection, Connection):
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")

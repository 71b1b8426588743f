"""A new SQLite database that is there whole or not at all, whoever is killed while making it."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


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
    make(f"sqlite:///{made}")
    made.rename(database)

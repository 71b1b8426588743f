"""The process of a run's own Prefect server, which makes a new database while it imports the rest.

A database of Prefect's is made by some 9,000 statements, each of which goes through two threads
that wait for each other. A process of its own makes it: it begins with it when it can, on one
processor, where threads hand over fastest, and without searching for garbage (3.4 s instead of
4.9 s on an idle machine with 2 cores).
"""

from __future__ import annotations

import asyncio
import gc
import os
import traceback
from pathlib import Path

from regrow.infra.launch import die_with_parent


def main() -> None:
    """Serve as uvicorn's command line says."""
    gc.disable()  # while all is imported (0.5 s less)
    maker = _database_maker()
    import uvicorn
    from prefect.server.api.server import create_app

    create_app()  # it is kept, and uvicorn gets the same
    if maker is not None:
        os.waitpid(maker, 0)
    gc.freeze()
    gc.enable()
    uvicorn.main()


def _database_maker() -> int | None:
    """The id of a process that makes the database; None where there is none to make.

    What it cannot make, or leaves half made, the server goes on with, and says what is wrong.
    """
    from prefect.server.database import provide_database_interface
    from prefect.settings import get_current_settings
    from sqlalchemy import make_url

    database = provide_database_interface()
    url = make_url(database.database_config.connection_url)
    file = url.database or ":memory:"
    if url.get_backend_name() != "sqlite" or ":memory:" in file or Path(file).exists():
        return None
    if not get_current_settings().server.database.migrate_on_start:
        return None
    import alembic.command  # noqa: F401 (here, beside nothing else)

    server = os.getpid()
    if maker := os.fork():
        return maker
    try:
        die_with_parent()
        if os.getppid() == server:  # else it ended before it could be watched
            _on_one_processor()
            asyncio.run(database.create_db())
    except Exception:  # noqa: BLE001 (see above)
        traceback.print_exc()
    finally:
        os._exit(0)


def _on_one_processor() -> None:
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

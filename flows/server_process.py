"""The process of a run's own Prefect server, which makes a new database while it imports the rest.

A process of its own makes it, as soon as what that needs is imported.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from regrow.infra.imports import importing
from regrow.infra.launch import die_with_parent
from regrow.infra.new_database import alone, make_whole


def main() -> None:
    """Serve as uvicorn's command line says."""
    with importing():
        maker = _database_maker()
        import uvicorn
        from prefect.server.api.server import create_app

        create_app()  # it is kept, and uvicorn gets the same
        if maker is not None:
            os.waitpid(maker, 0)
    uvicorn.main()


def _database_maker() -> int | None:
    """The id of a process that makes the database; None where there is none to make.

    What it cannot make, the server makes itself, or says what is wrong.
    """
    from prefect.server.database import provide_database_interface
    from prefect.settings import get_current_settings
    from sqlalchemy import make_url

    database = provide_database_interface()
    url = make_url(database.database_config.connection_url)
    file = url.database or ":memory:"
    path = Path(file)
    if url.get_backend_name() != "sqlite" or url.query or ":memory:" in file or path.exists():
        return None
    if not get_current_settings().server.database.migrate_on_start:
        return None
    import alembic.command  # noqa: F401 (the server needs it too)

    from regrow.flows.prefect_database import migrate

    server = os.getpid()
    if maker := os.fork():
        return maker
    try:
        die_with_parent()
        if os.getppid() == server:  # else it ended before it could be watched
            # Beside the database, which runs with other homes may share.
            with alone(path.with_name(path.name + ".lock")):
                if not path.exists():
                    make_whole(path, lambda url: migrate(url, database))
    except Exception:  # noqa: BLE001 (see above)
        traceback.print_exc()
    finally:
        os._exit(0)

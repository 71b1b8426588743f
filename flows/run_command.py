"""`regrow run`, and the commands that stop at an earlier stage. Imports Prefect.

What is needed to begin comes first, and the rest while a server of this run's own and the process
that writes into MLflow come up: those are what the start of a run waits for.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.configs.load import Loaded, load_recipe
from regrow.flows.explained import explains
from regrow.flows.journal_process import start_journal
from regrow.flows.prefect_server import PrivateServer, require_server
from regrow.flows.progress import say
from regrow.infra.imports import importing
from regrow.infra.settings import (
    SettingError,
    Settings,
    environment,
    load_settings,
    prefect_home,
    quiet_environment,
)

if TYPE_CHECKING:
    from regrow.flows.session import Session
    from regrow.flows.workplace import Workplace

_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: what waits in a queue can be started again


@explains
def run_recipe(
    recipe: str, overrides: Sequence[str], last: str = "", show: int | None = None
) -> int:
    """Run the pipeline, up to the stage `last` if given, and print the table of its stages."""
    quiet_environment()
    loaded = load_recipe(recipe, overrides, environment=environment())
    server = _server(load_settings())
    workplace = _opened(loaded, last)
    start_journal(workplace.journal_place(loaded.recipe, loaded.name))
    _import_the_rest()
    from regrow.flows.finetune import finetune, stages_upto
    from regrow.flows.heartbeat import ours_instead

    with ours_instead():
        if server is not None:
            server.wait()
        if last:
            state = stages_upto(loaded.recipe, last, loaded.name, return_state=True)
        else:
            state = finetune(loaded.recipe, loaded.name, return_state=True)
    if state.name == "Preempted":
        say(f"\nstopped before its end: {state.message}", sys.stderr)
        return _TRY_AGAIN
    if not state.is_completed():
        say(f"\nfailed: {state.message}", sys.stderr)
        say(
            "Nothing that was complete is lost: mend it and run the same command again.", sys.stderr
        )
        return 1
    _print_end(state.result(), workplace, show)
    return 0


def _server(settings: Settings) -> PrivateServer | None:
    """A server that is coming up for this run; None where the user names one, which is there.

    Raises:
        ServerFailed: when the one that is named does not answer.
        SettingError: when our home, or Prefect's, can hold nothing.
    """
    if settings.prefect_api_url is not None:
        require_server(settings.prefect_api_url)
        return None
    try:
        server = PrivateServer(settings.home, prefect_home())
    except OSError as error:
        if error.filename is None:  # not of a file: no socket, say
            raise
        raise _useless_home(settings.home, error) from error
    quiet_environment(private_server=True)
    server.start()
    return server


def _useless_home(home: Path, error: OSError) -> SettingError:
    ours = not home.is_dir() or Path(error.filename).is_relative_to(home)
    name, place = ("REGROW_HOME", home) if ours else ("PREFECT_HOME", prefect_home())
    return SettingError(f"{name}: {place} can hold nothing ({error}); choose another folder")


def _opened(loaded: Loaded, last: str) -> Workplace:
    """The recipe's places; what is wrong with its plan ends the run here."""
    from regrow.flows.commands import planned

    return planned(loaded, last)[0]


def _import_the_rest() -> None:
    """Import Prefect."""
    with importing():
        import fastapi.encoders  # noqa: F401 (Prefect imports it, as the next two, in a flow)
        from prefect import flow_engine, task_engine  # noqa: F401

        from regrow.flows import finetune  # noqa: F401
    atexit.register(gc.freeze)  # what the stages imported is not walked through at the end either


def _print_end(session: Session, workplace: Workplace, shown: int | None) -> None:
    from regrow.flows.show import end_table

    say("\n" + end_table(session, workplace))
    if shown:
        from regrow.tasks.prepare.preview import show as show_examples

        record = session.outcomes[0].record
        say("\n" + show_examples(workplace.artifacts.fetch(record), shown))

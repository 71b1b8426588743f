"""`regrow run`, and the commands that stop at an earlier stage. Imports Prefect, and MLflow.

What is needed to begin comes first, and the rest while a server of this run's own comes up: that is
what the start of a run waits for.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from regrow.configs.load import Loaded, load_recipe
from regrow.flows.explained import explains
from regrow.flows.prefect_server import PrivateServer, require_server
from regrow.flows.progress import say
from regrow.infra.settings import (
    SettingError,
    Settings,
    environment,
    load_settings,
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
    _import_the_rest()
    if server is not None:
        _open_mlflow(loaded, workplace)
        server.wait()
    from regrow.flows.finetune import finetune, stages_upto

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
        SettingError: when the home can hold nothing.
    """
    if settings.prefect_api_url is not None:
        require_server(settings.prefect_api_url)
        return None
    try:
        server = PrivateServer(settings.home)
    except OSError as error:
        if error.filename is None:  # not of a file: no socket, say
            raise
        raise SettingError(
            f"REGROW_HOME: {settings.home} can hold nothing ({error}); choose another folder"
        ) from error
    quiet_environment(private_server=True)
    server.start()
    return server


def _opened(loaded: Loaded, last: str) -> Workplace:
    """The recipe's places; what is wrong with its plan ends the run here."""
    from regrow.flows.commands import planned

    return planned(loaded, last)[0]


def _import_the_rest() -> None:
    """Import MLflow and Prefect.

    Here, and not by the thread that first writes into MLflow: two threads that import large
    packages at once can meet each other's half-imported modules. And as what lasts until the
    process ends: searched for garbage again and again while it grows, and walked through once more
    at the end, it would take a second longer (3.2 s instead of 4.1 s, measured on 2 cores).
    """
    from regrow.infra import tracking

    gc.disable()
    try:
        tracking.preload()
        from regrow.flows import finetune  # noqa: F401 (imports Prefect)
    finally:
        gc.freeze()
        gc.enable()
    atexit.register(gc.freeze)  # what the stages imported is not walked through at the end either


def _open_mlflow(loaded: Loaded, workplace: Workplace) -> None:
    """Make or open a database of MLflow's on this machine, while the server makes its own.

    One after the other they take two seconds longer in a home's first run, and one in any other
    (measured on 2 cores). What is wrong with it is told when it is used.
    """
    from regrow.infra.tracking import TrackingError

    tracker = workplace.tracker(loaded.recipe)
    if tracker.uri.startswith("sqlite:///"):
        with suppress(TrackingError):
            tracker.connect()


def _print_end(session: Session, workplace: Workplace, shown: int | None) -> None:
    from regrow.flows.show import end_table

    say("\n" + end_table(session, workplace))
    if shown:
        from regrow.tasks.prepare.preview import show as show_examples

        record = session.outcomes[0].record
        say("\n" + show_examples(workplace.artifacts.fetch(record), shown))
